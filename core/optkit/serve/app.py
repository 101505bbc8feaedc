"""The ASGI application: middleware, endpoints, and errors in one shape."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

import optkit
from optkit.engine.openai.faults import fault_of
from optkit.serve.batches.routes import router as batches
from optkit.serve.errors import ApiError, Refused, internal
from optkit.serve.guard.auth import Auth
from optkit.serve.guard.keys import Keys
from optkit.serve.guard.limits import Limits
from optkit.serve.guard.replies import reply, send_error
from optkit.serve.observing.middleware import Observed
from optkit.serve.observing.routes import router as observing
from optkit.serve.openapi import document
from optkit.serve.page import router as page
from optkit.serve.routes import encoders, language, repository, tensors
from optkit.serve.serving import Serving

__all__ = ["create_app"]

_PHRASES = {404: "there is no endpoint of that name", 405: "this endpoint does not take that method"}


def create_app(serving: Serving, keys: Keys | None) -> ASGIApp:
    """The application of one server.

    Its lifespan starts `serving` and ends it; a server that has entered the context already switches lifespan off.

    Args:
        serving: what it serves.
        keys: that let in; None lets in whoever reaches this machine's loopback.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with serving:
            yield

    app = FastAPI(
        title="optkit",
        version=optkit.__version__,
        summary="OpenAI-compatible inference of optkit artifacts",
        lifespan=lifespan,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.openapi = lambda: document(app, keys=keys is not None)  # type: ignore[method-assign]
    app.state.serving = serving
    for router in (language.router, encoders.router, tensors.router, repository.router, batches, observing, page):
        app.include_router(router)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unforeseen)
    guarded: ASGIApp = Limits(Draining(app, serving), serving.settings)
    return Observed(Auth(guarded, keys), serving.metrics, serving.tracing)


class Draining:
    """Counts the requests that are being answered, and refuses new work when the server is about to end."""

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app, self._serving = app, serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._serving.draining and scope["method"] == "POST":
            self._serving.metrics.rejected("", "draining")
            error = Refused(
                503, "the server is about to end; try again", kind="server_error", code="draining", headers=_LATER
            )
            await send_error(error, scope, receive, send)
            return
        scope["state"]["record"].tenant = scope["state"]["tenant"].name
        self._serving.open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._serving.open -= 1


_LATER = {"retry-after": "10", "connection": "close"}


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return reply(error)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    # Without where FastAPI found it: the body, the query or the path.
    message, param = fault_of([{**one, "loc": one["loc"][1:]} for one in error.errors()])
    return reply(ApiError(400, message, param=param))


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = _PHRASES.get(error.status_code, "the request cannot be read")
    return reply(ApiError(error.status_code, message, headers=error.headers))


async def _unforeseen(_: Request, __: Exception) -> Response:
    return reply(internal())  # it is raised again, and logged outside
