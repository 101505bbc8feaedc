"""Queues whose lines are answered by a coroutine that tests look into."""

from __future__ import annotations

import asyncio
import json

import pytest

from optkit.serve.batches import Batches
from optkit.serve.guard.keys import Tenant

CHAT, TEXT, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
ALICE, BOB = Tenant("alice", "a-salt", False), Tenant("bob", "b-salt", False)
BOUNDARY = "----0123456789"


def line(custom_id, body=None, url=TEXT):
    return json.dumps({"custom_id": str(custom_id), "method": "POST", "url": url, "body": body or {"prompt": "x"}})


def form(content: bytes, filename="in.jsonl", **fields) -> bytes:
    """A multipart body with one file."""
    parts = [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}' for name, value in fields.items()]
    parts.append(f'Content-Disposition: form-data; name="file"; filename="{filename}"\r\n\r\n')
    head = "".join(f"--{BOUNDARY}\r\n{part}\r\n" for part in parts)[:-2]
    return head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()


async def upload(batches, tenant, lines, *, purpose="batch", filename="in.jsonl"):
    """The id of a file with these lines."""
    body = form("\n".join(lines).encode(), filename, purpose=purpose)

    async def chunks():
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    return (await batches.upload(tenant, f"multipart/form-data; boundary={BOUNDARY}", chunks()))["id"]


async def create(batches, tenant, lines, endpoint=TEXT):
    """The id of a batch with these lines."""
    file = await upload(batches, tenant, lines)
    return (await batches.create(tenant, input_file=file, endpoint=endpoint, metadata=None))["id"]


async def ended(batches, tenant, id):
    """A batch once it has ended."""
    while (batch := await batches.batch(tenant, id))["status"] not in ("completed", "failed", "expired", "cancelled"):
        await asyncio.sleep(0.002)
    return batch


async def contents(batches, tenant, file):
    """The lines of a file."""
    if file is None:
        return []
    _, pieces = await batches.content(tenant, file)
    return [json.loads(one) for one in b"".join([piece async for piece in pieces]).splitlines()]


class Answerer:
    """Answers every line at once unless a test says what else; keeps what it was asked."""

    def __init__(self):
        self.asked, self.tenants, self.now, self.most = [], [], 0, 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.seats = 4

    def window(self, model):
        return 0 if model == "absent" else self.seats

    async def __call__(self, url, body, *, tenant, priority=0, record=None):
        assert priority == 50
        self.asked.append(body["prompt"])
        self.tenants.append(tenant)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.gate.wait()
            await asyncio.sleep(0)
            return await self.answer(body["prompt"])
        finally:
            self.now -= 1

    async def answer(self, prompt):
        return {"echo": prompt, "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


@pytest.fixture
def queue(tmp_path):
    """`queue(test, ...)` runs `await test(batches, answerer)` over a queue that `Batches.open(..., ...)` opens.

    A second call finds what the first one left.
    """

    def run(test, answerer=None, **options):
        async def main():
            asked = answerer or Answerer()
            batches = await Batches.open(tmp_path / "state", asked, asked.window, **options)
            try:
                return await asyncio.wait_for(test(batches, asked), 60)
            finally:
                await batches.close()

        return asyncio.run(main())

    return run
