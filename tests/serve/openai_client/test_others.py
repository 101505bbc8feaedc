"""Everything but chats: OpenAI's client cannot tell the server from the real thing."""

from __future__ import annotations

import asyncio
import io
import json
import math
import time
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.serve.openai_client.asking import HELLO, LONG, Place, asynchronous, chat, completion
from tests.serving import Server


def test_models_are_listed_and_found_by_name(client: OpenAI) -> None:
    listed = client.models.list()
    assert [one.id for one in listed] == ["tiny", "encoder"]
    found = client.models.retrieve("tiny")
    assert (found.object, found.owned_by) == ("model", "optkit")
    assert abs(found.created - time.time()) < 3600


# --- completions


def test_prompts_come_as_text_tokens_and_lists_of_both(client: OpenAI, tiny_tokenizer: Any) -> None:
    texts = ["The quick brown", "What is the"]
    ids = [tiny_tokenizer(text).input_ids for text in texts]
    single = [completion(client, prompt=text).choices[0].text for text in texts]
    assert [completion(client, prompt=one).choices[0].text for one in ids] == single
    for several in (texts, ids):
        answer = completion(client, prompt=several)
        assert [one.index for one in answer.choices] == [0, 1]
        assert [one.text for one in answer.choices] == single
    streamed = ["", ""]
    for chunk in completion(client, prompt=texts, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == single


def test_echo_with_log_probabilities_covers_the_prompt(client: OpenAI, tiny_tokenizer: Any) -> None:
    prompt = "The quick brown"
    ids = tiny_tokenizer(prompt).input_ids
    answer = completion(client, prompt=prompt, echo=True, logprobs=2, max_tokens=1)
    found = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith(prompt)
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(ids) + 1
    assert found.token_logprobs[0] is None
    assert all(one <= 0 for one in found.token_logprobs[1:])
    assert found.text_offset[: len(ids)] == [len(tiny_tokenizer.decode(ids[:place])) for place in range(len(ids))]
    without = completion(client, prompt=prompt, echo=True, max_tokens=1)
    assert without.choices[0].text == answer.choices[0].text


# --- responses


def test_a_response_streams_the_text_that_it_gives_in_one_piece(client: OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "input": HELLO, "max_output_tokens": 16, "temperature": 0}
    whole = client.responses.create(**fields)
    assert whole.object == "response"
    assert whole.usage.output_tokens == whole.usage.total_tokens - whole.usage.input_tokens
    events = list(client.responses.create(**fields, stream=True))
    assert events[0].type == "response.created"
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert [one.sequence_number for one in events] == list(range(len(events)))
    pieces = [one.delta for one in events if one.type == "response.output_text.delta"]
    assert "".join(pieces) == whole.output_text == events[-1].response.output_text
    with client.responses.stream(**fields) as stream:
        for _ in stream:
            pass
    text = client.responses.create(model="tiny", input="What is the capital of France?", instructions="Be short.")
    assert text.status in ("completed", "incomplete")


def test_a_response_is_parsed_into_a_pydantic_model(client: OpenAI) -> None:
    answer = client.responses.parse(model="tiny", input=HELLO, text_format=Place, max_output_tokens=400, temperature=0)
    assert isinstance(answer.output_parsed, Place)


# --- embeddings


def test_embeddings_come_as_numbers_and_as_base64(client: OpenAI) -> None:
    texts = ["The quick brown fox", "What is the capital of France?"]
    plain = client.embeddings.create(model="encoder", input=texts, encoding_format="float")
    packed = client.embeddings.create(model="encoder", input=texts)  # the client asks for base64 and unpacks it
    assert [one.index for one in plain.data] == [0, 1]
    for one, other in zip(plain.data, packed.data, strict=True):
        assert len(one.embedding) == 32
        assert other.embedding == pytest.approx(one.embedding, abs=1e-6)
        assert math.fsum(number * number for number in one.embedding) == pytest.approx(1, abs=1e-5)
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 0
    short = client.embeddings.create(model="encoder", input=texts[0], dimensions=8, encoding_format="float")
    norm = math.sqrt(math.fsum(number * number for number in plain.data[0].embedding[:8]))
    assert short.data[0].embedding == pytest.approx([one / norm for one in plain.data[0].embedding[:8]], abs=1e-5)


# --- files and batches


def test_a_batch_answers_a_file_of_requests(client: OpenAI) -> None:
    lines = [
        {
            "custom_id": f"line-{number}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "tiny", "messages": HELLO, "max_tokens": 4, "temperature": 0, "seed": 1},
        }
        for number in range(5)
    ]
    lines[3]["body"] = {"model": "tiny", "messages": []}
    text = "\n".join(map(json.dumps, lines)).encode()
    uploaded = client.files.create(file=("lines.jsonl", io.BytesIO(text)), purpose="batch")
    assert client.files.retrieve(uploaded.id).bytes == len(text)
    assert client.files.content(uploaded.id).read() == text
    batch = client.batches.create(
        input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"a": "b"}
    )
    end = time.monotonic() + 60
    while batch.status not in ("completed", "failed"):
        assert time.monotonic() < end, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    counts = batch.request_counts
    assert (batch.status, counts.total, counts.completed, counts.failed) == ("completed", 5, 4, 1)
    assert batch.metadata == {"a": "b"}
    answers = {one["custom_id"]: one["response"] for one in _lines(client, batch.output_file_id)}
    expected = chat(client, max_tokens=4).choices[0].message.content
    assert {name: one["status_code"] for name, one in answers.items()} == dict.fromkeys(
        ("line-0", "line-1", "line-2", "line-4"), 200
    )
    assert {one["body"]["choices"][0]["message"]["content"] for one in answers.values()} == {expected}
    [failed] = _lines(client, batch.error_file_id)
    assert failed["custom_id"] == "line-3"
    assert batch.id in [one.id for one in client.batches.list()]
    assert uploaded.id in [one.id for one in client.files.list(purpose="batch")]
    assert client.files.delete(uploaded.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(uploaded.id)


def _lines(client: OpenAI, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in client.files.content(file).text.splitlines()]


# --- everything at once, and what goes wrong


def test_the_async_client_has_all_of_it_at_the_same_time(server: Server, client: OpenAI) -> None:
    fields: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0}

    async def streamed(client: AsyncOpenAI) -> str:
        chunks = await client.chat.completions.create(**fields, messages=HELLO, stream=True)
        return "".join([one.choices[0].delta.content or "" async for one in chunks if one.choices])

    async def everything() -> tuple[Any, ...]:
        async with asynchronous(server) as client:
            return await asyncio.gather(
                client.chat.completions.create(**fields, messages=HELLO),
                streamed(client),
                client.completions.create(**fields, prompt="The quick brown"),
                client.responses.create(model="tiny", input=HELLO, max_output_tokens=16),
                client.embeddings.create(model="encoder", input="The quick brown fox"),
                client.models.list(),
                client.files.list(),
                client.batches.list(),
            )

    said, text, continued, response, embedding, models, _, _ = asyncio.run(everything())
    assert said.choices[0].message.content == text == chat(client).choices[0].message.content
    assert continued.choices[0].text == completion(client).choices[0].text
    assert response.status in ("completed", "incomplete")
    assert len(embedding.data[0].embedding) == 32
    assert len(models.data) == 2


def test_errors_have_the_types_that_programs_catch(server: Server, client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        chat(client, model="nobody")
    assert missing.value.code == "model_not_found"
    assert missing.value.request_id.startswith("req_")
    with pytest.raises(openai.BadRequestError) as wrong:
        chat(client, temperature=3)
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError):
        chat(client, extra_body={"no_such_field": 1})
    with pytest.raises(openai.BadRequestError):
        completion(client, prompt=[5] * 1100)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="text")
    with pytest.raises(openai.AuthenticationError) as stranger:
        chat(OpenAI(base_url=f"{server.url}/v1", api_key="not-a-key-of-this-server", max_retries=0))
    assert stranger.value.code == "invalid_api_key"


def test_a_full_model_refuses_with_a_time_to_come_back(client: OpenAI) -> None:
    with completion(client, prompt=[[5]] * 8, max_tokens=400, stream=True, extra_body=LONG) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as refused:
            completion(client)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.code == "queue_full"


def test_a_stream_that_is_closed_frees_its_blocks(server: Server, client: OpenAI) -> None:
    before = server.metric("request_success_total", finished_reason="cancelled")
    with completion(client, prompt=[5, 6, 7], max_tokens=400, stream=True, extra_body=LONG) as stream:
        next(iter(stream))
        assert server.metric("num_requests_running", model_name="tiny") == 1
    server.settled()
    assert server.metric("request_success_total", finished_reason="cancelled") == before + 1


def test_headers_name_the_request_that_the_log_knows(server: Server, client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=HELLO, max_tokens=2)
    assert raw.headers["content-type"] == "application/json"
    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.parse().usage.completion_tokens <= 2
    with client.chat.completions.with_streaming_response.create(
        model="tiny", messages=HELLO, max_tokens=2, stream=True
    ) as streamed:
        assert streamed.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in streamed.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    logged = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert raw.headers["x-request-id"] in {line.get("request_id") for line in logged}
