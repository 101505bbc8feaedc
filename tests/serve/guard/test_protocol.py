"""Connections end when a client takes too much room or time, and say so where there is a request to answer."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest

PIECES = [1, 7, 1000, 65536]


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def server(start: Any, request: pytest.FixtureRequest) -> Any:
    return start(loop=request.param, max_header_bytes=4096, keep_alive_timeout=60.0, write_timeout=0.2)


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def hasty(start: Any, request: pytest.FixtureRequest) -> Any:
    return start(loop=request.param, header_timeout=0.2, keep_alive_timeout=0.2, max_connections=60)


def padded(server: Any, size: int, line: str = "GET /") -> bytes:
    """A head of exactly `size` bytes."""
    empty = len(server.head(line, "X: "))
    return server.head(line, "X: " + "x" * (size - empty))


def test_a_head_of_the_limit_passes_and_one_byte_more_does_not(server: Any) -> None:
    assert server.say(padded(server, 4096)).status == 200
    answer = server.say(padded(server, 4097))
    assert answer.status == 431
    assert answer.closes
    assert answer.headers["content-type"] == "application/json"
    assert answer.error["type"] == "invalid_request_error"


def test_a_body_right_behind_its_head_does_not_count_as_head(server: Any) -> None:
    body = bytes(200_000)
    for size in (1000, 4096 - len("POST /") - 40):
        head = server.head("POST /", f"Content-Length: {len(body)}", "X: " + "x" * (size - 200))
        assert server.say(head + body).json()["length"] == len(body)


@pytest.mark.parametrize("endless", [b"GET /" + b"a" * 9000, b"GET / HTTP/1.1\r\nX: " + b"a" * 9000, b"\r\n" * 5000])
def test_an_endless_head_is_refused_before_it_ends(server: Any, endless: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(endless)
        answer = server.listen(connection)
        assert answer.status in (414, 431)
        assert server.ends(connection)


def test_too_many_headers_and_too_long_urls_are_refused(start: Any) -> None:
    roomy = start()
    assert roomy.ask("GET /", *["X: y"] * 99).status == 200
    assert roomy.ask("GET /", *["X: y"] * 100).status == 431
    assert roomy.ask("GET /?" + "q" * 8000).status == 200
    assert roomy.ask("GET /?" + "q" * 8192).status == 414


MALFORMED = [
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET / HTTP/1.1\nHost: a\n\n",
    b"FOO / HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    b"GET / HTTP/0.9\r\nHost: a\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /\xc3\xa9 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /?\xff HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /%00 HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /a%0d%0ab HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /%7F HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET http://a HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: [1::2::3]\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3, 3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\nabc\n0\n\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1ffffffffffffffff\r\nabc\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc",
]


@pytest.mark.parametrize("data", MALFORMED)
@pytest.mark.parametrize("size", [1, 10_000])
def test_what_is_not_plain_http_is_refused_as_json_and_ends_the_connection(server: Any, data: bytes, size: int) -> None:
    with server.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(data), size):
            connection.sendall(data[start : start + size])
        answer = server.listen(connection)
        assert answer.status == 400
        assert answer.closes
        assert answer.error["type"] == "invalid_request_error"
        assert server.ends(connection)


def test_a_request_comes_through_in_pieces_of_any_size(server: Any) -> None:
    body = bytes(range(256)) * 8
    data = server.head("POST /caf%C3%A9", f"Content-Length: {len(body)}") + body
    for size in PIECES:
        with server.connect() as connection:
            for start in range(0, len(data), size):
                connection.sendall(data[start : start + size])
            answer = server.listen(connection).json()
            assert (answer["path"], answer["length"]) == ("/café", len(body))


def test_trailers_are_not_headers(server: Any) -> None:
    chunks = b"3\r\nabc\r\n0\r\nAuthorization: Bearer x\r\nHost: evil\r\n\r\n"
    answer = server.ask("POST /", "Transfer-Encoding: chunked", body=chunks).json()
    assert answer["length"] == 3
    assert [name for name, _ in answer["headers"]] == ["host", "transfer-encoding"]


@pytest.mark.parametrize("endless", [b"0\r\nX: ", b"3;x=", b"00000000"])
def test_what_stands_around_chunks_does_not_go_on_for_ever(server: Any, endless: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(server.head("POST /", "Transfer-Encoding: chunked") + endless)
        try:
            for _ in range(16):
                connection.sendall(b"0" * 65536)
        except OSError:
            return
        assert server.listen(connection).status in (400, 431)


def test_connections_are_kept_for_the_next_request(server: Any) -> None:
    with server.connect() as connection:
        for number in range(5):
            connection.sendall(server.head(f"POST /{number}", "Content-Length: 3") + b"abc")
            answer = server.listen(connection)
            assert answer.json()["path"] == f"/{number}"
            assert not answer.closes


def test_the_head_of_a_later_request_has_the_same_limit(server: Any) -> None:
    with server.connect() as connection:
        connection.sendall(padded(server, 4096))
        assert server.listen(connection).status == 200
        connection.sendall(padded(server, 4096))
        assert server.listen(connection).status == 200
        connection.sendall(padded(server, 4097))
        assert server.listen(connection).status == 431


def test_requests_that_do_not_wait_for_the_answer_are_not_queued(server: Any) -> None:
    server.app.seen.clear()
    with server.connect() as connection:
        connection.sendall(server.head("GET /first") + server.head("GET /second") * 1000)
        assert server.listen(connection).json()["path"] == "/first"
        assert server.ends(connection)
    assert server.app.seen == ["GET /first"]


@pytest.mark.parametrize("body", [b"", bytes(100_000)])
def test_a_request_that_comes_while_an_answer_ends_is_answered(server: Any, body: bytes) -> None:
    server.app.release.clear()
    with server.connect() as connection:
        connection.sendall(server.head("GET /late"))
        assert server.listen(connection).body == b"late"
        connection.sendall(server.head("POST /next", f"Content-Length: {len(body)}") + body)
        assert server.ask("GET /").status == 200  # By now the server has seen the other request too.
        server.app.release.set()
        answer = server.listen(connection).json()
        assert (answer["path"], answer["length"]) == ("/next", len(body))


def test_what_waits_for_an_answer_to_end_has_a_bound(server: Any) -> None:
    server.app.release.clear()
    server.app.seen.clear()
    with server.connect() as connection:
        connection.sendall(server.head("GET /late"))
        assert server.listen(connection).body == b"late"
        connection.sendall(server.head("POST /next", "Content-Length: 100000000"))
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                connection.sendall(bytes(65536))
    server.app.release.set()
    assert server.app.seen == ["GET /late"]


def test_an_early_answer_ends_the_connection_so_that_the_body_is_no_request(server: Any) -> None:
    server.app.seen.clear()
    with server.connect() as connection:
        connection.sendall(server.head("POST /early", "Content-Length: 1000"))
        answer = server.listen(connection)
        assert answer.status == 200
        assert answer.closes
        connection.sendall(server.head("GET /smuggled"))
        assert server.ends(connection)
    assert server.app.seen == ["POST /early"]


def test_an_early_answer_is_heard_by_a_client_that_is_still_sending(server: Any) -> None:
    with server.connect() as connection:
        connection.sendall(server.head("POST /early", "Content-Length: 1000000") + bytes(500_000))
        assert server.listen(connection).status == 200


def test_an_upgrade_is_answered_as_http_and_ends(server: Any) -> None:
    for line in ("GET /", "CONNECT /"):
        with server.connect() as connection:
            connection.sendall(server.head(line, "Connection: Upgrade", "Upgrade: h2c") + b"what comes next")
            answer = server.listen(connection)
            assert answer.status == 200
            assert answer.closes
            assert server.ends(connection)


@pytest.mark.parametrize("path", ["/wait", "/flood"])
def test_the_application_hears_that_its_client_left(server: Any, path: str) -> None:
    server.app.gone.clear()
    with server.connect() as connection:
        connection.sendall(server.head(f"GET {path}"))
        assert connection.recv(100)
        # With a reset, not a farewell: what a killed client leaves behind.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert server.app.gone.wait(20)


def test_the_application_hears_of_it_after_a_second_request_too(server: Any) -> None:
    server.app.gone.clear()
    server.app.waiting.clear()
    with server.connect() as connection:
        connection.sendall(server.head("GET /wait"))
        assert server.app.waiting.wait(20)
        connection.sendall(server.head("GET /second"))
    assert server.app.gone.wait(20)


def test_a_reader_that_left_the_answer_unread_is_gone(server: Any) -> None:
    server.app.gone.clear()
    with server.connect() as connection:
        connection.sendall(server.head("GET /flood"))
        assert server.app.gone.wait(20)
        assert server.ask("GET /").status == 200


def test_half_open_heads_do_not_stop_a_good_request_and_end(hasty: Any) -> None:
    connections = [hasty.connect() for _ in range(50)]
    for connection in connections:
        connection.sendall(hasty.head("GET /")[:-2] + b"X: ")
    assert hasty.ask("GET /").status == 200
    for connection in connections:
        with connection:
            answer = hasty.listen(connection)
            assert answer.status == 408
            assert answer.closes
            assert hasty.ends(connection)


def test_a_connection_without_a_request_ends_without_an_answer(hasty: Any) -> None:
    with hasty.connect() as connection:
        assert connection.recv(100) == b""


def test_a_second_head_has_its_time_too(hasty: Any) -> None:
    with hasty.connect() as connection:
        connection.sendall(hasty.head("GET /"))
        assert hasty.listen(connection).status == 200
        connection.sendall(b"GET ")
        assert hasty.listen(connection).status == 408
        assert hasty.ends(connection)


def test_an_idle_connection_ends(hasty: Any) -> None:
    with hasty.connect() as connection:
        connection.sendall(hasty.head("GET /"))
        assert not hasty.listen(connection).closes
        assert connection.recv(100) == b""


def test_one_connection_too_many_is_turned_away(start: Any) -> None:
    small = start(max_connections=3)
    held = [small.connect() for _ in range(3)]
    for connection in held:
        connection.sendall(small.head("GET /"))
        assert small.listen(connection).status == 200
    with small.connect() as one_more:
        answer = small.listen(one_more)
        assert answer.status == 503
        assert answer.headers["retry-after"] == "1"
        assert small.ends(one_more)
    for connection in held:
        connection.sendall(small.head("GET /"))
        assert small.listen(connection).status == 200
        connection.close()
