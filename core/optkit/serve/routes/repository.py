"""Which models there are, and loading and unloading them at run time.

`/v1/models` is OpenAI's; the rest is the model repository extension of the Open Inference Protocol:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_model_repository.md
"""

from __future__ import annotations

import logging
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response

from optkit.errors import OptkitError
from optkit.serve.errors import ApiError, unavailable
from optkit.serve.models import Known
from optkit.serve.routes.asking import serving_of
from optkit.serve.sse import json_reply

__all__ = ["Name", "router"]

_log = logging.getLogger(__name__)

router = APIRouter()

Name = Annotated[str, Path(max_length=256)]
_STATES = {"unloaded": "UNAVAILABLE", "loading": "LOADING", "ready": "READY", "unloading": "UNLOADING"}


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The models that are loaded."""
    known = [one for one in serving_of(request).models.known() if one.served is not None]
    return json_reply({"object": "list", "data": [_facts(one) for one in known]})


@router.get("/v1/models/{name}")
async def model(name: Name, request: Request) -> Response:
    """One model that is loaded."""
    return json_reply(_facts(serving_of(request).models.one(name)))


@router.post("/v2/repository/index")
async def index(request: Request) -> Response:
    """All models, loaded or not."""
    known = serving_of(request).models.known()
    return json_reply([{"name": one.name, "state": _STATES[one.state], "reason": ""} for one in known])


@router.post("/v2/repository/models/{name}/load")
async def load(name: Name, request: Request) -> Response:
    """Load a model that the operator named; answers when it is ready."""
    _only_admins(request)
    try:
        await serving_of(request).models.load(name)
    except OptkitError as error:
        request.state.record.error = str(error)
        _log.error("loading %s failed: %s", name, error)
        raise unavailable("the model cannot be loaded; the server's log says why") from error
    return json_reply({})


@router.post("/v2/repository/models/{name}/unload")
async def unload(name: Name, request: Request) -> Response:
    """Unload a model; what it has not answered ends with an error."""
    _only_admins(request)
    serving = serving_of(request)
    await serving.models.unload(name)
    serving.metrics.forget(name)
    return json_reply({})


def _only_admins(request: Request) -> None:
    if not request.state.tenant.admin:
        raise ApiError(403, "this needs an admin key", kind="permission_error", code="insufficient_permissions")


def _facts(one: Known) -> dict[str, Any]:
    if one.served is None:
        raise ApiError(404, "the model is not loaded", param="model", code="model_not_found")
    return {
        "id": one.name,
        "object": "model",
        "created": one.served.created,
        "owned_by": "optkit",
        "kind": one.kind,
        "state": one.state,
        "max_model_len": one.served.max_length,
    }
