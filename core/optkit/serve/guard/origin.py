"""Which web pages may talk to the server: its own. Others run in browsers that reach it and may carry its password.

Host against DNS rebinding, Origin and Sec-Fetch-Site against requests from other sites:
https://web.dev/articles/fetch-metadata
"""

from __future__ import annotations

import ipaddress
import re

from starlette.datastructures import Headers
from starlette.types import Scope

from optkit.serve.errors import ApiError
from optkit.serve.guard.keys import is_loopback

__all__ = ["check_origin", "host_name"]

_HOST = re.compile(r"(?P<name>[A-Za-z0-9._~-]+|\[(?P<address>[0-9A-Fa-f:.]+)\])(?::[0-9]{1,5})?")


def host_name(host: str) -> str | None:
    """The name or address in a Host header, without brackets and port; None where the header is not one."""
    match = _HOST.fullmatch(host)
    if match is None:
        return None
    address = match["address"]
    if address is None:
        return match["name"]
    try:
        return str(ipaddress.IPv6Address(address))
    except ValueError:
        return None


def check_origin(scope: Scope, headers: Headers, *, local: bool) -> None:
    """Refuse what a web page of another site sends.

    Args:
        scope: of the request.
        headers: of the request.
        local: there are no keys, so that only names of this machine may stand in Host.

    Raises:
        ApiError: 400 for a Host that is none, 403 for what is refused.
    """
    hosts = headers.getlist("host")
    name = host_name(hosts[0]) if len(hosts) == 1 else None
    if hosts and name is None:
        raise ApiError(400, "the Host header is not one host")
    if local and (name is None or not is_loopback(name)):
        raise ApiError(
            403, "without API keys the server answers to localhost and 127.0.0.1 only; the Host header names another"
        )
    # Browsers send Origin with everything but plain GETs; those give themselves away by Sec-Fetch-Site.
    own = {f"http://{host.lower()}" for host in hosts} | {f"https://{host.lower()}" for host in hosts}
    if any(origin.lower() not in own for origin in headers.getlist("origin")):
        raise _foreign()
    sites = headers.getlist("sec-fetch-site")
    if any(site not in ("same-origin", "none") for site in sites) and not _is_followed_link(scope, headers):
        raise _foreign()


def _is_followed_link(scope: Scope, headers: Headers) -> bool:
    # The page that holds the link sees nothing of the answer, and no GET changes anything.
    return (
        scope["method"] in ("GET", "HEAD")
        and headers.getlist("sec-fetch-mode") == ["navigate"]
        and headers.getlist("sec-fetch-dest") == ["document"]
    )


def _foreign() -> ApiError:
    return ApiError(403, "requests from web pages of other sites are refused")
