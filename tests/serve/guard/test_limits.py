"""Bodies end at their limit, however they come: declared, chunked, compressed, slow."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import tracemalloc
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.serve.errors import ApiError
from optkit.serve.guard.limits import Limits
from optkit.serve.settings import Settings

LIMIT = 100_000
SETTINGS = Settings(max_body_bytes=LIMIT, max_file_bytes=4 * LIMIT, body_timeout=0.2)
BODY = bytes(range(256)) * 300


def bomb(megabytes: int) -> bytes:
    """A gzip stream of that many MiB of zeros, made without compressing them all."""
    stream = zlib.compressobj(wbits=31)
    head = stream.compress(bytes(1 << 20)) + stream.flush(zlib.Z_FULL_FLUSH)
    block = stream.compress(bytes(1 << 20)) + stream.flush(zlib.Z_FULL_FLUSH)
    return head + block * (megabytes - 1) + stream.flush()


class Reader:
    """An application that reads its body. `swallows` is what frameworks do: their own answer for every error."""

    def __init__(self, *, swallows: bool = False) -> None:
        self.digest, self.length, self.swallows = hashlib.sha256(), 0, swallows
        self.headers: list[tuple[bytes, bytes]] = []
        self.after: str | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.headers = scope["headers"]
        status = 200
        try:
            message = {"more_body": True}
            while message.get("more_body"):
                message = await receive()
                self.digest.update(message.get("body", b""))
                self.length += len(message.get("body", b""))
            self.after = (await receive())["type"]
        except ApiError:
            if not self.swallows:
                raise
            status = 400
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"of the application"})


def run(
    app: Any, parts: list[bytes], headers: dict[str, str] | None = None, path: str = "/v1/completions"
) -> tuple[int, dict[bytes, bytes]]:
    """The status and the headers of the answer to a body of `parts`."""
    pairs = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": pairs}
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages += [{"type": "http.request", "body": b"", "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Limits(app, SETTINGS)(scope, receive, send))
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    return sent[0]["status"], dict(sent[0]["headers"])


@given(
    data=st.binary(max_size=2000).map(lambda some: some * 40), sizes=st.lists(st.integers(0, 5000)), encoding=st.data()
)
def test_a_body_arrives_the_same_in_whatever_pieces_it_comes(data: bytes, sizes: list[int], encoding: Any) -> None:
    name = encoding.draw(st.sampled_from(["", "identity", "gzip", "x-gzip", "deflate", "GZIP"]))
    sent = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress}.get(name.lower(), bytes)(data)
    parts, rest = [], sent
    for size in sizes:
        parts.append(rest[:size])
        rest = rest[size:]
    reader = Reader()
    assert run(reader, [*parts, rest], {"content-encoding": name} if name else {})[0] == 200
    assert reader.length == len(data)
    assert reader.digest.digest() == hashlib.sha256(data).digest()
    assert reader.after == "http.disconnect"


def test_a_body_of_the_limit_passes_and_one_byte_more_does_not() -> None:
    for headers in ({}, {"content-length": str(LIMIT)}):
        assert run(Reader(), [bytes(LIMIT)], headers)[0] == 200
    for headers in ({}, {"content-length": str(LIMIT + 1)}):
        status, sent = run(Reader(), [bytes(LIMIT), b"x"], headers)
        assert status == 413
        assert sent[b"connection"] == b"close"


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_the_limit_holds_after_decompression(encoding: str) -> None:
    compress = {"gzip": gzip.compress, "deflate": zlib.compress}[encoding]
    assert run(Reader(), [compress(bytes(LIMIT))], {"content-encoding": encoding})[0] == 200
    assert run(Reader(), [compress(bytes(LIMIT + 1))], {"content-encoding": encoding})[0] == 413


def test_a_declared_length_over_the_limit_is_refused_unread() -> None:
    reader = Reader()
    assert run(reader, [], {"content-length": "9" * 40})[0] == 413
    assert reader.after is None
    assert run(reader, [], {"content-length": "-1"})[0] == 400


def test_a_bomb_ends_at_the_limit_in_little_memory() -> None:
    data = bomb(1024)
    parts = [data[start : start + 65536] for start in range(0, min(len(data), LIMIT), 65536)]
    reader = Reader()
    tracemalloc.start()
    status, _ = run(reader, parts, {"content-encoding": "gzip"})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert status == 413
    assert reader.length <= LIMIT
    assert peak < 4 << 20


def test_the_application_cannot_answer_over_a_refused_body() -> None:
    assert run(Reader(swallows=True), [bytes(LIMIT + 1)])[0] == 413


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "gzip, br", "compress", "", "nonsense"])
def test_other_encodings_are_not_supported(encoding: str) -> None:
    assert run(Reader(), [b"x"], {"content-encoding": encoding})[0] == 415


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_body_that_is_not_what_its_encoding_says_is_wrong(encoding: str) -> None:
    whole = {"gzip": gzip.compress, "deflate": zlib.compress}[encoding](BODY)
    for wrong in (b"plain text", whole[:-1], whole[:20], whole + b"more", whole + whole, whole[:-3] + b"xyz"):
        assert run(Reader(), [wrong], {"content-encoding": encoding})[0] == 400


def test_headers_of_a_compressed_body_are_those_of_what_the_application_reads() -> None:
    reader = Reader()
    body = gzip.compress(BODY)
    run(reader, [body], {"content-encoding": "gzip", "content-length": str(len(body)), "x-other": "kept"})
    assert reader.headers == [(b"x-other", b"kept")]


def test_only_the_exact_path_of_uploads_has_the_limit_of_files() -> None:
    large = [bytes(LIMIT)] * 4
    assert run(Reader(), large, path="/v1/files")[0] == 200
    for path in ("/v1/files/", "/v1/filesx", "//v1/files", "/v1/files/x", "/V1/files"):
        assert run(Reader(), large, path=path)[0] == 413
    assert run(Reader(), [*large, bytes(LIMIT)], path="/v1/files")[0] == 413


@pytest.fixture(scope="module")
def limited(start: Any) -> Any:
    return start(Limits, max_body_bytes=LIMIT, max_file_bytes=4 * LIMIT, body_timeout=0.2)


@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_a_body_that_stops_coming_ends_with_408_and_the_connection(limited: Any, framing: str) -> None:
    with limited.connect() as connection:
        connection.sendall(limited.head("POST /", framing) + b"3\r\nabc\r\n")
        answer = limited.listen(connection)
        assert answer.status == 408
        assert answer.closes
        assert "body" in answer.error["message"]
        assert limited.ends(connection)


def test_a_client_hears_why_its_large_body_is_refused(limited: Any) -> None:
    for framing, part in (
        ("Content-Length: 1000000", bytes(1000)),
        ("Transfer-Encoding: chunked", b"3e8\r\n%b\r\n" % bytes(1000)),
    ):
        with limited.connect() as connection:
            connection.sendall(limited.head("POST /", framing) + part * 500)
            answer = limited.listen(connection)
            assert answer.status == 413
            assert answer.closes
            assert answer.error["code"] == "request_too_large"


def test_a_refused_length_is_not_asked_to_continue(limited: Any) -> None:
    headers = ("Expect: 100-continue", "Content-Length: 1000000")
    with limited.connect() as connection:
        connection.sendall(limited.head("POST /", *headers))
        assert connection.recv(12) == b"HTTP/1.1 413"


def test_a_compressed_body_reaches_the_application_over_a_socket(limited: Any) -> None:
    body = gzip.compress(BODY)
    answer = limited.ask("POST /", "Content-Encoding: gzip", f"Content-Length: {len(body)}", body=body)
    assert answer.json()["sha256"] == hashlib.sha256(BODY).hexdigest()


def test_slow_bodies_do_not_stop_a_good_request(limited: Any) -> None:
    slow = [limited.connect() for _ in range(20)]
    for connection in slow:
        connection.sendall(limited.head("POST /", "Content-Length: 1000") + b"x")
    assert limited.ask("POST /", "Content-Length: 3", body=b"abc").json()["length"] == 3
    for connection in slow:
        with connection:
            assert limited.listen(connection).status == 408
            assert limited.ends(connection)
