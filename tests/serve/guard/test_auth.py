"""Nothing is reached without a key, and no web page of another site is answered."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.types import Message

from optkit.serve.guard.auth import Auth
from optkit.serve.guard.keys import LOCAL, Keys

KEY, ADMIN = "client-0123456789abcdef", "admin-0123456789abcdef"


def keys() -> Keys:
    loaded = Keys.load({"OPTKIT_API_KEYS": KEY, "OPTKIT_ADMIN_KEYS": ADMIN})
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def guarded(start: Any) -> Any:
    return start(lambda app, _: Auth(app, keys()))


@pytest.fixture(scope="module")
def open_server(start: Any) -> Any:
    return start(lambda app, _: Auth(app, None))


@pytest.fixture
def unseen(guarded: Any) -> Iterator[Any]:
    guarded.app.seen.clear()
    yield guarded
    assert guarded.app.seen == []


async def call(app: Any, scope: dict[str, Any]) -> None:
    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        pass

    await app(scope, receive, send)


def basic(text: str) -> str:
    return "Authorization: Basic " + base64.b64encode(text.encode()).decode()


PATHS = [
    *(
        "/",
        "/metrics",
        "//metrics",
        "/metrics/",
        "/%6detrics",
        "/METRICS",
        "/./metrics",
        "/x/../metrics",
        "/metrics?key=x",
    ),
    *("/docs", "/redoc", "/openapi.json", "/health", "/ready", "/v1/models", "/no/such/path", "/favicon.ico", "*"),
    *("http://127.0.0.1/metrics", "http://evil.example/metrics", "/metrics%2f", "/metrics;a", "/%E2%82%AC"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "TRACE", "PUT", "DELETE"])
def test_every_path_and_method_needs_a_key(unseen: Any, method: str, path: str) -> None:
    answer = unseen.ask(f"{method} {path}")
    assert answer.status == 401
    assert answer.headers.get_all("www-authenticate") == ["Bearer"]
    if method != "HEAD":
        assert answer.error["type"] == "invalid_request_error"
        assert answer.error["code"] == "invalid_api_key"


@pytest.mark.parametrize("target", ["127.0.0.1:80", "/metrics"])
def test_connect_opens_nothing(unseen: Any, target: str) -> None:
    assert unseen.ask(f"CONNECT {target}").status in (400, 401)


def test_an_upgrade_to_a_web_socket_is_an_ordinary_request(unseen: Any) -> None:
    handshake = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: eA==")
    assert unseen.ask("GET /", *handshake).status == 401


@pytest.mark.parametrize(
    "headers",
    [
        ["Authorization:"],
        ["Authorization: Bearer"],
        ["Authorization: Bearer "],
        [f"Authorization: {KEY}"],
        [f"Authorization: Bearer {KEY}x"],
        [f"Authorization: Bearer {KEY[:-1]}"],
        [f"Authorization: Bearer {KEY} {KEY}"],
        [f"Authorization: Bearer {KEY},{KEY}"],
        [f"Authorization: Token {KEY}"],
        [f"Authorization: Bearer {KEY}", f"Authorization: Bearer {KEY}"],
        [f"Authorization: Bearer {KEY}", "Authorization: Bearer other"],
        [f"X-Api-Key: {KEY}"],
        [f"Cookie: key={KEY}"],
        ["Authorization: Basic"],
        ["Authorization: Basic !!!"],
        ["Authorization: Basic /w=="],
        [basic(KEY)],
        [basic(f"{KEY}:")],
        [basic(f"user:{KEY}x")],
        [basic(f"user:x:{KEY}")],
        ["Authorization: Bearer \xe9\xe9\xe9"],
    ],
)
def test_what_is_not_one_known_key_is_refused(unseen: Any, headers: list[str]) -> None:
    assert unseen.ask("GET /v1/models", *headers).status == 401


@pytest.mark.parametrize(
    "header",
    [f"Authorization: Bearer {KEY}", f"authorization: bearer  {KEY} ", basic(f"anybody:{KEY}"), basic(f":{KEY}")],
)
def test_a_key_opens_everything(guarded: Any, header: str) -> None:
    assert guarded.ask("GET /metrics", header).status == 200


def test_a_browser_is_asked_for_a_password(unseen: Any) -> None:
    answer = unseen.ask("GET /", "Accept: text/html,application/xhtml+xml;q=0.9,*/*;q=0.8")
    assert answer.status == 401
    assert answer.headers.get_all("www-authenticate") == ['Basic realm="optkit", charset="UTF-8"', "Bearer"]


def test_the_application_learns_whose_request_it_is() -> None:
    tenants: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        tenants.append(scope["state"]["tenant"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    def scope(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
        return {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost"), *headers]}

    asyncio.run(call(Auth(app, None), scope()))
    for key in (KEY, ADMIN):
        asyncio.run(call(Auth(app, keys()), scope((b"authorization", f"Bearer {key}".encode()))))
    assert tenants[0] == LOCAL
    assert [tenant.admin for tenant in tenants] == [True, False, True]
    assert len({tenant.salt for tenant in tenants}) == 3


def test_web_sockets_are_closed_and_lifespan_passes() -> None:
    reached: list[str] = []
    sent: list[Message] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    for kind in ("lifespan", "websocket"):
        asyncio.run(Auth(app, None)({"type": kind, "headers": []}, receive, send))
    assert reached == ["lifespan"]
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9:80", "[::1]", "[::1]:8000", "LocalHost:8000"])
def test_without_keys_names_of_this_machine_are_answered(open_server: Any, host: str) -> None:
    assert open_server.say(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()).status == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "0.0.0.0", "[::]", "192.168.0.1:8000"])
def test_without_keys_a_name_that_was_rebound_is_refused(open_server: Any, host: str) -> None:
    answer = open_server.say(f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    assert answer.status == 403
    assert "localhost" in answer.error["message"]


def test_without_keys_a_request_without_host_is_refused(open_server: Any) -> None:
    assert open_server.say(b"GET / HTTP/1.0\r\n\r\n").status == 403


def test_with_keys_any_host_is_fine(guarded: Any) -> None:
    request = f"GET / HTTP/1.1\r\nHost: llm.example\r\nAuthorization: Bearer {KEY}\r\n\r\n"
    assert guarded.say(request.encode()).status == 200


FOREIGN = [
    ["Origin: http://evil.example"],
    ["Origin: null"],
    ["Origin: http://127.0.0.1"],
    ["Origin: http://127.0.0.1:1"],
    ["Sec-Fetch-Site: cross-site"],
    ["Sec-Fetch-Site: same-site"],
    ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: iframe"],
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_pages_of_other_sites_are_refused_with_and_without_keys(
    open_server: Any, guarded: Any, headers: list[str]
) -> None:
    for answer in (
        open_server.ask("GET /", *headers),
        open_server.ask("OPTIONS /v1/completions", "Access-Control-Request-Method: POST", *headers),
        guarded.ask("POST /v1/completions", f"Authorization: Bearer {KEY}", *headers),
    ):
        assert answer.status == 403
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]


@pytest.mark.parametrize(
    "headers", [["Sec-Fetch-Site: same-origin"], ["Sec-Fetch-Site: none"], ["Origin: http://127.0.0.1:{port}"]]
)
def test_the_page_of_the_server_itself_is_answered(open_server: Any, headers: list[str]) -> None:
    own = [header.format(port=open_server.port) for header in headers]
    assert open_server.ask("POST /v1/completions", *own).status == 200


def test_a_link_on_another_site_leads_to_the_page_and_a_form_does_not(open_server: Any) -> None:
    link = ["Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate", "Sec-Fetch-Dest: document"]
    assert open_server.ask("GET /", *link).status == 200
    assert open_server.ask("POST /v1/files", *link).status == 403
