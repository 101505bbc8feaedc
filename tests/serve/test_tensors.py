"""The Open Inference Protocol, over a model of arrays and over an encoder."""

from __future__ import annotations

import numpy as np
import pytest

X = {"name": "x", "shape": [2, 3], "datatype": "FP32", "data": [1, 2, 3, 4.5, 5, 6]}


@pytest.fixture(scope="module")
def tensors(scripted_server, tensors_artifact):
    with scripted_server(tensors_artifact()) as server:
        yield server


def test_it_describes_its_arrays(tensors):
    assert tensors.get("/v2").json()["name"] == "optkit"
    assert tensors.get("/v2/health/ready").json() == {"ready": True}
    assert tensors.get("/v2/models/tensors/ready").json() == {"name": "tensors", "ready": True}
    facts = tensors.get("/v2/models/tensors/versions/1").json()
    assert facts["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    assert {one["name"] for one in facts["outputs"]} == {"y", "sum"}
    assert tensors.get("/v2/models/other").status_code == 404


@pytest.mark.parametrize("data", [X["data"], [[1, 2, 3], [4.5, 5, 6]]])
def test_it_gives_what_the_model_gives(tensors, data):
    answer = tensors.post("/v2/models/tensors/infer", {"id": "7", "inputs": [{**X, "data": data}]}).json()
    assert (answer["id"], answer["model_name"]) == ("7", "tensors")
    outputs = {one["name"]: one for one in answer["outputs"]}
    assert outputs["y"]["shape"] == [2, 3]
    assert outputs["y"]["data"] == [2, 4, 6, 9, 10, 12]
    wanted = {"inputs": [X], "outputs": [{"name": "y"}]}
    assert len(tensors.post("/v2/models/tensors/infer", wanted).json()["outputs"]) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "z"}, "z"),
        ({"datatype": "INT64"}, "INT64"),
        ({"datatype": "BYTES"}, "datatype"),
        ({"shape": [2, 4]}, "do not fill"),
        ({"shape": [1 << 30, 1 << 30]}, "more than"),
        ({"data": ["a"] * 6}, "no array"),
        ({"data": [[1, 2], [3], 4, 5, 6, 7]}, "no array"),
        ({"shape": [3, 2]}, ""),
        ({"shape": [0, 3], "data": []}, ""),
    ],
)
def test_what_does_not_fit_is_a_400(tensors, change, said):
    refused = tensors.post("/v2/models/tensors/infer", {"inputs": [{**X, **change}]})
    assert refused.status_code == 400, refused.text
    assert said in refused.json()["error"]["message"]


def test_an_encoder_takes_arrays_too(server):
    ids = {"name": "input_ids", "shape": [2, 4], "datatype": "INT64", "data": [1, 7, 8, 2, 1, 9, 2, 0]}
    mask = {"name": "attention_mask", "shape": [2, 4], "datatype": "INT64", "data": [1, 1, 1, 1, 1, 1, 1, 0]}
    [hidden] = server.post("/v2/models/encoder/infer", {"inputs": [ids, mask]}).json()["outputs"]
    assert (hidden["name"], hidden["shape"]) == ("last_hidden_state", [2, 4, 32])
    assert np.isfinite(hidden["data"]).all()
    far = {**ids, "data": [1, 7, 8, 2, 1, 99999, 2, 0]}
    assert server.post("/v2/models/encoder/infer", {"inputs": [far, mask]}).status_code == 400
