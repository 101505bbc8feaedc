"""Arrays in, arrays out: the Open Inference Protocol, version 2, for encoders and plain tensor models.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md; numbers are JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request, Response
from pydantic import Field

import optkit
from optkit.engine.openai.fields import Strict
from optkit.serve.errors import ApiError
from optkit.serve.models import Encoder, Tensors
from optkit.serve.routes.asking import asker_of, serving_of, whole
from optkit.serve.routes.repository import Name
from optkit.serve.sse import json_reply
from optkit.serve.work import Asker, accounted
from optkit.steps import TensorSpec

__all__ = ["router"]

router = APIRouter(prefix="/v2")

_NUMPY = {
    "BOOL": "bool",
    **{f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
}
_NAMES = {name: datatype for datatype, name in _NUMPY.items()}
_VERSION = "1"
"""Of every model: an artifact of another digest is another model."""

Identifier = Annotated[str, Field(min_length=1, max_length=256)]


class InferInput(Strict):
    """One array of a request."""

    name: Identifier
    shape: list[Annotated[int, Field(ge=0, lt=1 << 31)]] = Field(min_length=1, max_length=16)
    datatype: Annotated[str, Field(max_length=16)]
    data: list[Any] = Field(max_length=1 << 22)
    """Row by row, flat or nested."""


class InferOutput(Strict):
    """An output that is wanted."""

    name: Identifier


class InferBody(Strict):
    """Of `/v2/models/{name}/infer`."""

    id: Annotated[str, Field(max_length=256)] | None = None
    inputs: list[InferInput] = Field(min_length=1, max_length=64)
    outputs: list[InferOutput] | None = Field(default=None, max_length=64)
    """All, if there are none."""


@router.get("")
async def server() -> Response:
    """What this server is."""
    return json_reply({"name": "optkit", "version": optkit.__version__, "extensions": ["model_repository"]})


@router.get("/health/live")
async def live() -> Response:
    """Whether the server answers. Whether its models do, `/health` says."""
    return json_reply({"live": True})


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """Whether all that is loaded can take requests."""
    serving = serving_of(request)
    states = await asyncio.gather(*(one.engine.health() for one in serving.models.loaded()))
    able = not serving.draining and all(state.ok for state in states)
    return json_reply({"ready": able}, 200 if able else 503)


@router.get("/models/{name}/ready")
@router.get("/models/{name}/versions/1/ready")
async def model_ready(name: Name, request: Request) -> Response:
    """Whether one model can take requests."""
    served = serving_of(request).models.one(name).served
    able = served is not None and (await served.engine.health()).ok
    return json_reply({"name": name, "ready": able}, 200 if able else 503)


@router.get("/models/{name}")
@router.get("/models/{name}/versions/1")
async def metadata(name: Name, request: Request) -> Response:
    """Names, types and shapes of a model's arrays; -1 where any size is taken."""
    model = serving_of(request).models.tensors(name)
    return json_reply(
        {
            "name": name,
            "versions": [_VERSION],
            "platform": f"optkit_{next(iter(model.artifact.manifest.recipe['backend']))}",
            "inputs": _described(model.engine.inputs),
            "outputs": _described(model.engine.outputs),
        }
    )


@router.post("/models/{name}/infer")
@router.post("/models/{name}/versions/1/infer")
async def infer(body: InferBody, name: Name, request: Request) -> Response:
    """Run a model on some arrays. Requests of one shape share a call of the model, as its batching strategy says."""
    model = serving_of(request).models.tensors(name)
    return await whole(request, _inferred(body, model, request, asker_of(request)))


async def _inferred(body: InferBody, model: Encoder | Tensors, request: Request, asker: Asker) -> dict[str, Any]:
    with accounted(model.name, asker.record, serving_of(request).metrics):
        inputs = await asyncio.to_thread(_arrays, body)
        wanted = [one.name for one in body.outputs or ()] or list(model.engine.outputs)
        if not set(wanted) <= model.engine.outputs.keys():
            raise ApiError(400, "outputs: the model has none of that name", param="outputs")
        with model.gate.passing():
            outputs = await model.engine.infer(inputs, timeout=asker.timeout)
        answer = await asyncio.to_thread(lambda: [_output(name, outputs[name]) for name in wanted])
    head = {"model_name": model.name, "model_version": _VERSION}
    return {**head, **({} if body.id is None else {"id": body.id}), "outputs": answer}


def _described(specs: Mapping[str, TensorSpec]) -> list[dict[str, Any]]:
    return [
        {"name": name, "datatype": _NAMES[one.dtype], "shape": [-1 if size is None else size for size in one.shape]}
        for name, one in specs.items()
    ]


def _arrays(body: InferBody) -> dict[str, npt.NDArray[np.generic]]:
    arrays = {}
    for one in body.inputs:
        if one.name in arrays:
            raise ApiError(400, "inputs: the same name twice", param="inputs")
        arrays[one.name] = _array(one)
    return arrays


def _array(one: InferInput) -> npt.NDArray[np.generic]:
    wanted = _NUMPY.get(one.datatype)
    if wanted is None:
        raise ApiError(400, f"datatype: there are {', '.join(_NUMPY)}", param="datatype")
    if np.prod(one.shape, dtype=object) > _MOST:
        raise ApiError(400, f"shape: more than {_MOST} numbers", param="shape")
    dtype = np.dtype(wanted)
    kinds = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}[dtype.kind]
    try:
        given = np.array(one.data)
    except (ValueError, OverflowError):  # ragged
        given = np.array(None)
    if given.size and given.dtype.kind not in kinds:
        raise ApiError(400, f"data: no array of {one.datatype} numbers", param="data")
    if given.size != np.prod(one.shape, dtype=object):
        raise ApiError(400, f"data: {given.size} numbers do not fill the shape", param="data")
    if dtype.kind in "iu" and given.size:
        bounds = np.iinfo(dtype)
        if int(given.min()) < bounds.min or int(given.max()) > bounds.max:
            raise ApiError(400, f"data: a number is outside {one.datatype}", param="data")
    with np.errstate(over="ignore"):
        return given.astype(dtype).reshape(one.shape)


_MOST = 1 << 22


def _output(name: str, array: npt.NDArray[np.generic]) -> dict[str, Any]:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ApiError(
            500, "the model's answer has NaN or infinite numbers, which JSON cannot say", kind="server_error"
        )
    shape = list(array.shape)
    return {"name": name, "datatype": _NAMES[str(array.dtype)], "shape": shape, "data": array.ravel().tolist()}
