"""Models by name: several in one server, loaded and unloaded while it runs, and only those that the operator named."""

from __future__ import annotations

from tests.serve.conftest import ADMIN, KEY

ASK = {"prompt": "fox", "max_tokens": 4, "temperature": 0}


def names(server):
    return [one["id"] for one in server.get("/v1/models").json()["data"]]


def states(server):
    return {one["name"]: one["state"] for one in server.post("/v2/repository/index", {}).json()}


def test_two_artifacts_answer_by_name_and_a_third_one_is_loaded_on_demand(serve, scripted):
    one, two, three = (scripted(name=name) for name in ("one", "two", "three"))
    server = serve(one, f"second={two}", available=three, keys=(KEY,), admin_keys=(ADMIN,))
    assert names(server) == ["one", "second"]
    assert server.post("/v1/completions", {**ASK, "model": "second"}).json()["model"] == "second"
    unnamed = server.post("/v1/completions", ASK)
    assert unnamed.status_code == 400
    assert unnamed.json()["error"]["param"] == "model"
    assert states(server) == {"one": "READY", "second": "READY", "three": "UNAVAILABLE"}
    waits = server.post("/v1/completions", {**ASK, "model": "three"})
    assert (waits.status_code, waits.json()["error"]["message"]) == (503, "the model is not loaded")

    assert server.post("/v2/repository/models/three/load", {}).status_code == 200
    assert server.post("/v1/completions", {**ASK, "model": "three"}).status_code == 200
    assert server.post("/v2/repository/models/one/unload", {}).status_code == 200
    assert names(server) == ["second", "three"]
    assert states(server)["one"] == "UNAVAILABLE"
    assert not [one for one in server.metrics() if one.labels.get("model_name") == "one"]
    assert server.get("/ready").status_code == 200


def test_unloading_ends_what_is_open_with_an_error(serve, scripted):
    from tests.serve.test_lifecycle import events, stream

    server = serve(scripted(0.05))
    with stream(server) as answer:
        received = events(answer)
        next(received)
        assert server.post("/v2/repository/models/scripted/unload", {}).status_code == 200
        *_, last = received
    assert "error" in last
    assert server.get("/ready").status_code == 503
    assert server.post("/v2/repository/models/scripted/load", {}).status_code == 200
    assert server.post("/v1/completions", ASK).status_code == 200


def test_only_admins_load_and_unload(serve, scripted):
    server = serve(scripted(), keys=(KEY,), admin_keys=(ADMIN,))
    server.key = KEY
    refused = server.post("/v2/repository/models/scripted/unload", {})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_permissions")
    assert names(server) == ["scripted"]


def test_a_name_that_nobody_gave_is_not_found(server):
    for name in ("nobody", "../tiny", "..%2f..%2fetc%2fpasswd", "/etc/passwd", "tiny\\..", "http://example.org"):
        missing = server.post("/v1/completions", {**ASK, "model": name})
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
        assert server.post(f"/v2/repository/models/{name}/load", {}).status_code == 404


def test_an_encoder_is_no_language_model_and_the_other_way_round(server):
    assert server.post("/v1/completions", {**ASK, "model": "encoder"}).status_code == 404
    assert server.post("/v1/embeddings", {"input": "a", "model": "tiny"}).status_code == 404
    # One of each kind: nobody needs a name.
    assert server.post("/v1/completions", ASK).json()["model"] == "tiny"
    assert server.post("/v1/embeddings", {"input": "a"}).json()["model"] == "encoder"
