"""Files and batches over HTTP, as OpenAI's own client uses them, and what strangers get."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import httpx2
import openai
import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from optkit.serve.batches import Batches, Quota
from optkit.serve.batches.routes import router
from optkit.serve.errors import ApiError

from .conftest import ALICE, BOB, BOUNDARY, Answerer, form, line

TENANTS = {"alice": ALICE, "bob": BOB}


def application(batches):
    """The routes, in an application that believes what the key says."""
    app = FastAPI()
    app.include_router(router)
    app.state.serving = SimpleNamespace(batches=batches)

    @app.exception_handler(ApiError)
    async def failed(request, error):
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        return JSONResponse({}, 422)

    async def known(scope, receive, send):
        headers = dict(scope.get("headers", []))
        tenant = TENANTS[headers.get(b"authorization", b"Bearer alice").decode().removeprefix("Bearer ")]
        await app({**scope, "state": {"tenant": tenant}}, receive, send)

    return known


@pytest.fixture
def served(tmp_path):
    """`served(test, answerer, **options)` runs `await test(alice, bob, http, answerer)` over a server."""

    def run(test, answerer=None, *, on=True, **options):
        async def main():
            asked = answerer or Answerer()
            batches = await Batches.open(tmp_path / "state", asked, asked.window, **options) if on else None
            transport = httpx2.ASGITransport(application(batches))
            try:
                async with httpx2.AsyncClient(transport=transport, base_url="http://server") as http:
                    clients = [
                        openai.AsyncOpenAI(base_url="http://server/v1", api_key=name, http_client=http, max_retries=0)
                        for name in TENANTS
                    ]
                    await asyncio.wait_for(test(*clients, http, asked), 60)
            finally:
                if batches is not None:
                    await batches.close()

        asyncio.run(main())

    return run


def lines(count):
    return "\n".join(line(place, {"prompt": place, "model": "tiny"}) for place in range(count)).encode()


async def ended(client, id):
    while (batch := await client.batches.retrieve(id)).status not in ("completed", "failed", "cancelled"):
        await asyncio.sleep(0.002)
    return batch


def test_openais_client_goes_the_whole_way(served):
    async def test(alice, bob, http, asked):
        content = lines(10)
        file = await alice.files.create(file=("my requests.jsonl", content), purpose="batch")
        assert (file.filename, file.bytes, file.purpose, file.status) == (
            "my requests.jsonl",
            len(content),
            "batch",
            "processed",
        )
        batch = await alice.batches.create(
            input_file_id=file.id,
            endpoint="/v1/completions",
            completion_window="24h",
            metadata={"night": "1"},
        )
        assert batch.status == "validating"
        batch = await ended(alice, batch.id)
        assert (batch.status, batch.model, batch.metadata) == ("completed", "tiny", {"night": "1"})
        assert (batch.request_counts.total, batch.request_counts.completed, batch.usage.total_tokens) == (10, 10, 50)
        output = await alice.files.content(batch.output_file_id)
        answers = [json.loads(one) for one in output.text.splitlines()]
        assert [one["response"]["body"]["echo"] for one in answers] == list(range(10))
        assert output.response.headers["content-type"] == "application/octet-stream"
        assert output.response.headers["content-disposition"] == "attachment"
        assert int(output.response.headers["content-length"]) == len(output.content)
        assert (await alice.files.content(file.id)).content == content
        assert (await alice.files.retrieve(batch.output_file_id)).purpose == "batch_output"
        assert [one.id async for one in alice.batches.list()] == [batch.id]
        assert {one.id async for one in alice.files.list()} == {file.id, batch.output_file_id}
        assert [one.id async for one in alice.files.list(purpose="batch")] == [file.id]
        for id in (file.id, batch.output_file_id):
            assert (await alice.files.delete(id)).deleted
            with pytest.raises(openai.NotFoundError):
                await alice.files.content(id)
        assert [one async for one in alice.files.list()] == []

    served(test)


def test_lists_come_in_pages_and_in_both_orders(served):
    async def test(alice, bob, http, asked):
        files = [(await alice.files.create(file=("f", lines(1)), purpose="batch")).id for _ in range(5)]
        assert [one.id async for one in alice.files.list(limit=2)] == files[::-1]
        assert [one.id async for one in alice.files.list(limit=2, order="asc")] == files
        page = await alice.files.list(limit=2, order="asc", after=files[2])
        assert ([one.id for one in page.data], page.has_more) == (files[3:], False)
        made = [
            (await alice.batches.create(input_file_id=id, endpoint="/v1/completions", completion_window="24h")).id
            for id in files
        ]
        assert [one.id async for one in alice.batches.list(limit=2)] == made[::-1]
        with pytest.raises(openai.NotFoundError):
            await alice.batches.list(after="batch_0")
        for query in ("files?limit=0", "files?limit=10001", "files?order=up", "batches?limit=101", "files?limit=x"):
            assert (await http.get(f"/v1/{query}")).status_code == 422

    served(test)


def test_a_cancelled_batch_says_so(served):
    async def test(alice, bob, http, asked):
        asked.gate.clear()
        file = await alice.files.create(file=("f", lines(20)), purpose="batch")
        batch = await alice.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        assert (await alice.batches.cancel(batch.id)).status == "cancelling"
        assert (await ended(alice, batch.id)).status == "cancelled"
        asked.gate.set()
        other = await alice.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        await ended(alice, other.id)
        with pytest.raises(openai.BadRequestError, match="completed cannot be cancelled"):
            await alice.batches.cancel(other.id)

    served(test)


def test_one_tenant_knows_nothing_of_another_one(served):
    async def test(alice, bob, http, asked):
        file = await alice.files.create(file=("f", lines(1)), purpose="batch")
        batch = await alice.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        await ended(alice, batch.id)
        for call in (
            bob.files.retrieve(file.id),
            bob.files.content(file.id),
            bob.files.delete(file.id),
            bob.batches.retrieve(batch.id),
            bob.batches.cancel(batch.id),
            bob.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"),
            bob.files.retrieve("file-" + "0" * 24),
            bob.files.content("..%2Fqueue.sqlite"),
        ):
            with pytest.raises(openai.NotFoundError):
                await call
        assert [one async for one in bob.files.list()] == [one async for one in bob.batches.list()] == []
        with pytest.raises(openai.NotFoundError):
            await bob.files.list(after=file.id)

    served(test)


def test_a_file_never_gets_the_name_that_a_client_gives_it(served, tmp_path):
    async def test(alice, bob, http, asked):
        names = ["../../evil", "/etc/passwd", "a\\b", "ä\u202etxt", "x" * 255]
        for name in names:
            file = await alice.files.create(file=(name, lines(1)), purpose="batch")
            assert file.filename == name
        with pytest.raises(openai.BadRequestError):
            await alice.files.create(file=("x" * 256, lines(1)), purpose="batch")
        found = list((tmp_path / "state" / "files").iterdir())
        assert len(found) == len(names)
        assert all(file.name.startswith("file-") and file.stat().st_mode & 0o777 == 0o600 for file in found)
        assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "state" / "queue.sqlite").stat().st_mode & 0o777 == 0o600
        assert not list(tmp_path.glob("**/*evil*"))

    served(test)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (form(b"x", purpose="fine-tune"), 400, "purpose must be batch"),
        (form(b"x"), 400, "purpose must be batch"),
        (form(b"x", purpose="batch", **{"expires_after[seconds]": 3600}), 400, "does not know"),
        (form(b"x", purpose="b" * 1000), 400, "more than 256 bytes"),
        (form(b"x", **{f"f{place}": 1 for place in range(9)}), 400, "more than 8 parts"),
        (form(b"x" * 2000, purpose="batch"), 413, "more than 1024 bytes"),
        (form(b"x", purpose="batch")[:-9], 400, "no whole form"),
        (form(b"x", purpose="batch").replace(b'name="file"', b'name="other"'), 400, "file is missing"),
        (form(b"x", purpose="batch")[:-4] + form(b"y")[16:], 400, "more than one file"),
        (b"nonsense", 400, "no whole form"),
        (b"", 400, "no whole form"),
    ],
)
def test_a_wrong_upload_is_refused_and_leaves_nothing(served, tmp_path, body, status, message):
    async def test(alice, bob, http, asked):
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        answer = await http.post("/v1/files", content=body, headers={"content-type": kind})
        assert (answer.status_code, message in answer.json()["error"]["message"]) == (status, True), answer.text
        for kind in ("application/json", "multipart/form-data", f"multipart/form-data; boundary={'b' * 300}"):
            answer = await http.post("/v1/files", content=body, headers={"content-type": kind})
            assert answer.status_code == 400
        assert [one async for one in alice.files.list()] == []
        assert list((tmp_path / "state" / "files").iterdir()) == []

    served(test, quota=Quota(file_bytes=1024))


@pytest.mark.parametrize(
    "change",
    [
        {"endpoint": "/v1/images/generations"},
        {"completion_window": "1h"},
        {"metadata": {"k" * 65: "v"}},
        {"metadata": {"k": "v" * 513}},
        {"metadata": {str(place): "v" for place in range(17)}},
        {"metadata": {"k": 1}},
        {"output_expires_after": {"anchor": "created_at", "seconds": 3600}},
        {"input_file_id": "x" * 65},
        {"input_file_id": "\ud800"},
    ],
)
def test_a_batch_that_cannot_be_honoured_is_refused(served, change):
    async def test(alice, bob, http, asked):
        file = await alice.files.create(file=("f", lines(1)), purpose="batch")
        body = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
        content = json.dumps({**body, **change})
        answer = await http.post("/v1/batches", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 422
        assert [one async for one in alice.batches.list()] == []

    served(test)


def test_quotas_bound_files_bytes_and_open_batches(served):
    async def test(alice, bob, http, asked):
        asked.gate.clear()
        files = [(await alice.files.create(file=("f", lines(1)), purpose="batch")).id for _ in range(3)]
        options = {"endpoint": "/v1/completions", "completion_window": "24h"}
        for _ in range(2):
            await alice.batches.create(input_file_id=files[0], **options)
        with pytest.raises(openai.RateLimitError, match="2 batches have not ended"):
            await alice.batches.create(input_file_id=files[0], **options)
        await alice.files.create(file=("f", lines(1)), purpose="batch")
        with pytest.raises(openai.RateLimitError, match="delete some"):
            await alice.files.create(file=("f", lines(1)), purpose="batch")
        await alice.files.delete(files[1])
        with pytest.raises(openai.RateLimitError, match="delete some"):
            await alice.files.create(file=("f", b"x" * 4000), purpose="batch")
        await bob.files.create(file=("f", lines(1)), purpose="batch")

    served(test, quota=Quota(files=4, total_bytes=3000, open_batches=2))


def test_a_server_without_a_state_directory_says_how_to_get_one(served):
    async def test(alice, bob, http, asked):
        for call in (
            alice.files.list(),
            alice.batches.retrieve("batch_1"),
            alice.files.create(file=b"", purpose="batch"),
        ):
            with pytest.raises(openai.NotFoundError, match="--state DIRECTORY") as off:
                await call
            assert off.value.code == "batches_off"

    served(test, on=False)
