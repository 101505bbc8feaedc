"""Endpoints for those who operate a server: whether it lives, whether it can be given work, and what it counts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

import optkit
from optkit.engine.async_engine import Health
from optkit.engine.one_step import TensorStats
from optkit.engine.stats import Stats
from optkit.errors import OptkitError
from optkit.serve.observing.metrics import Metrics

__all__ = ["router"]

_PATIENCE = 3.0
"""Seconds for an engine's answer; an engine itself gives up waiting for its worker a second earlier."""
_LATER = {"retry-after": "5"}

router = APIRouter(tags=["operations"])


@router.get("/health")
@router.head("/health", include_in_schema=False)
async def health(request: Request) -> Response:
    """200 when the worker of every loaded model answers and its steps go on; 503 otherwise, and then it helps to
    restart the server."""
    found = await _health(request.app.state.serving)
    models = {
        name: {
            "state": one.state,
            "silent_seconds": round(one.silent, 3),
            "hung": one.hung,
            "restarts": one.restarts,
        }
        for name, one in found.items()
    }
    fine = all(one.ok for one in found.values())
    return JSONResponse({"status": "ok" if fine else "failing", "models": models}, 200 if fine else 503)


@router.get("/ready")
@router.head("/ready", include_in_schema=False)
async def ready(request: Request) -> Response:
    """200 when every loaded model takes requests; 503 when one does not, none is loaded, or the server is about to
    end."""
    serving: _Serving = request.app.state.serving
    found = {} if serving.draining else await _health(serving)
    if found and all(one.ok for one in found.values()):
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "draining" if serving.draining else "not ready"}, 503, _LATER)


@router.get("/metrics")
@router.head("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    serving: _Serving = request.app.state.serving
    served = list(serving.models.loaded())
    await asyncio.gather(*(_observe(one, serving.metrics) for one in served))
    serving.metrics.processes({one.name: one.engine.pid for one in served if one.engine.pid is not None})
    return Response(serving.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/version")
@router.head("/version", include_in_schema=False)
async def version() -> Response:
    """The server's version."""
    return JSONResponse({"version": optkit.__version__})


async def _health(serving: _Serving) -> dict[str, Health]:
    served = list(serving.models.loaded())
    found = await asyncio.gather(*(_health_of(one.engine) for one in served))
    return dict(zip((one.name for one in served), found, strict=True))


async def _health_of(engine: _Engine) -> Health:
    try:
        return await asyncio.wait_for(engine.health(), _PATIENCE)
    except TimeoutError:
        return Health("failed", _PATIENCE, True, 0)


async def _observe(served: _Served, metrics: Metrics) -> None:
    health = await _health_of(served.engine)
    metrics.worker(served.name, health)
    if health.state != "ready":
        return
    worker = served.engine.pid
    try:
        stats = await asyncio.wait_for(served.engine.stats(), _PATIENCE)
    except (TimeoutError, OptkitError):  # it died, or is stuck: `worker_up` tells, and the next scrape asks again
        return
    # From here on nothing waits, so that answers count in the order in which they came; and one that came from a
    # process that has been replaced since then counts for nobody.
    if worker != served.engine.pid:
        return
    if isinstance(stats, Stats):
        metrics.engine(served.name, stats, worker)
    else:
        metrics.tensors(served.name, stats, worker)


class _Engine(Protocol):
    @property
    def pid(self) -> int | None: ...

    async def health(self) -> Health: ...

    async def stats(self) -> Stats | TensorStats: ...


class _Served(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def engine(self) -> _Engine: ...


class _Models(Protocol):
    def loaded(self) -> Iterable[_Served]: ...


class _Serving(Protocol):
    @property
    def models(self) -> _Models: ...

    @property
    def metrics(self) -> Metrics: ...

    @property
    def draining(self) -> bool: ...
