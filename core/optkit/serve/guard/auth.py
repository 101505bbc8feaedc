"""A key for every request, whatever its path: there is no list of exceptions."""

from __future__ import annotations

import base64
import binascii

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from optkit.serve.errors import ApiError
from optkit.serve.guard.keys import LOCAL, Keys, Tenant
from optkit.serve.guard.origin import check_origin
from optkit.serve.guard.replies import reply

__all__ = ["Auth"]


class Auth:
    """ASGI middleware that lets known keys through and says whose they are in `scope["state"]["tenant"]`.

    A key comes as `Authorization: Bearer KEY`, or as the password of `Authorization: Basic`, which is how a browser
    gets to the page.

    Args:
        app: what is protected.
        keys: None lets everybody on this machine in; `keys.check_address` sees to it that nobody else can connect.
    """

    def __init__(self, app: ASGIApp, keys: Keys | None) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = Headers(scope=scope)
            try:
                check_origin(scope, headers, local=self._keys is None)
            except ApiError as error:
                await reply(error)(scope, receive, send)
                return
            tenant = self._tenant(headers)
            if tenant is None:
                await _unauthorized(headers)(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
            await self._app(scope, receive, send)

    def _tenant(self, headers: Headers) -> Tenant | None:
        if self._keys is None:
            return LOCAL
        given = headers.getlist("authorization")
        key = _key(given[0]) if len(given) == 1 else None
        return None if key is None else self._keys.tenant(key)


def _key(authorization: str) -> str | None:
    scheme, _, credentials = authorization.partition(" ")
    credentials = credentials.strip()
    if scheme.lower() == "bearer":
        return credentials
    if scheme.lower() == "basic":
        try:
            pair = base64.b64decode(credentials, validate=True).decode()
        except (binascii.Error, ValueError):
            return None
        return pair.partition(":")[2]
    return None


def _unauthorized(headers: Headers) -> Response:
    response = reply(ApiError(401, "no valid API key was given", code="invalid_api_key"))
    # Programs would open a dialog for nothing. One header each: browsers look no further than the first in a header.
    if "text/html" in headers.get("accept", ""):
        response.headers.append("www-authenticate", 'Basic realm="optkit", charset="UTF-8"')
    response.headers.append("www-authenticate", "Bearer")
    return response
