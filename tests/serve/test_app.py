"""What holds for every endpoint: a key, one shape of errors, bounded input, and a document that says so."""

from __future__ import annotations

import gzip
import json

import httpx
import pytest

from tests.serve.conftest import KEY


@pytest.fixture(scope="module")
def document(server):
    return server.get("/openapi.json").json()


def test_every_path_of_the_document_needs_a_key(server, document):
    asked = 0
    for path, operations in document["paths"].items():
        for method in operations:
            for headers in ({}, {"authorization": "Bearer another-key-of-nobody"}):
                answer = httpx.request(method.upper(), server.url + path, headers=headers)
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
                asked += 1
    assert asked > 50


@pytest.mark.parametrize("path", ["/", "/openapi.json", "/metrics", "/docs", "/nothing", "/v1/../metrics"])
def test_and_so_does_everything_else(server, path):
    assert httpx.get(server.url + path).status_code == 401


def test_the_document_names_errors_and_uploads(document):
    assert document["security"] == [{"key": []}]
    for operations in document["paths"].values():
        for operation in operations.values():
            assert {"4XX", "5XX"} <= operation["responses"].keys()
            assert "422" not in operation["responses"]
    assert "multipart/form-data" in document["paths"]["/v1/files"]["post"]["requestBody"]["content"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/chat/completions", b'{"messages"', 400, None),
        ("/v1/chat/completions", b"[" * 100_000, 400, None),
        ("/v1/chat/completions", b"\xff\xfe", 400, None),
        ("/v1/chat/completions", b"null", 400, None),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "n": 1000}', 400, "n"),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "frob": 1}', 400, "frob"),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, None),
        ("/v1/completions", b'{"prompt": [99999]}', 400, None),
        ("/v1/completions", b'{"prompt": "a", "max_tokens": 100000}', 400, None),
        ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
        ("/v1/nothing", b"{}", 404, None),
        ("/detokenize", b'{"tokens": [99999]}', 400, "tokens"),
        ("/v1/embeddings", b'{"input": [[99999]]}', 400, None),
        ("/v1/embeddings", b'{"input": "a", "dimensions": 1000}', 400, None),
    ],
)
def test_what_is_wrong_is_said_in_one_shape(server, path, body, status, param):
    headers = {**server.headers, "content-type": "application/json"}
    answer = httpx.post(server.url + path, content=body, headers=headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param or param is None
    assert not {"/work", "Traceback", "object at 0x", "<class"} & set(error["message"].split())
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_wrong_method_names_the_shape_too(server):
    answer = server.get("/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["type"]) == (405, "invalid_request_error")


def test_a_compressed_body_is_read_and_bounded(server):
    headers = {**server.headers, "content-type": "application/json", "content-encoding": "gzip"}
    body = json.dumps({"prompt": "fox", "max_tokens": 1}).encode()
    assert httpx.post(f"{server.url}/v1/completions", content=gzip.compress(body), headers=headers).status_code == 200
    bomb = gzip.compress(b" " * (64 << 20))
    assert httpx.post(f"{server.url}/v1/completions", content=bomb, headers=headers).status_code == 413


def test_tokens_and_text_go_both_ways(server):
    text = "The quick brown fox, 0 1 2"
    made = server.post("/tokenize", {"prompt": text}).json()
    assert made["count"] == len(made["tokens"])
    assert made["max_model_len"] == 256
    assert server.post("/detokenize", {"tokens": made["tokens"]}).json()["prompt"] == text
    messages = [{"role": "user", "content": "fox"}]
    whole = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    begun = server.post("/tokenize", {"messages": messages, "add_generation_prompt": False}).json()["tokens"]
    assert whole[: len(begun)] == begun
    assert len(whole) > len(begun)
    assert server.post("/tokenize", {"prompt": text, "messages": messages}).status_code == 400


def test_the_log_says_who_asked_and_nothing_of_what(server):
    asked = server.post("/v1/completions", {"prompt": "a secret fox", "max_tokens": 2, "user": "somebody"})
    text = server.log.read_text()
    [line] = [json.loads(one) for one in text.splitlines() if asked.headers["x-request-id"] in one]
    assert line["tenant"].startswith("key-")
    assert (line["model"], line["output_tokens"], line["status"]) == ("tiny", 2, 200)
    assert not [word for word in ("secret", "somebody", server.key) if word in text]


def test_keys_share_no_cached_prefix(server):
    prompt = {"prompt": [7 + place % 200 for place in range(128)], "max_tokens": 1}

    def cached(key):
        headers = {"authorization": f"Bearer {key}"}
        answer = httpx.post(f"{server.url}/v1/completions", json=prompt, headers=headers).json()
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(server.key) == 0
    assert cached(server.key) > 0
    assert cached(KEY) == 0
    assert cached(KEY) > 0


def test_a_page_of_another_site_gets_nothing(server):
    headers = {**server.headers, "origin": "http://evil.example"}
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 403
