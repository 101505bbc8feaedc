"""OpenAI's client reads responses and their events, and both say the same."""

from __future__ import annotations

import json

import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from optkit.engine.openai import ResponsesBody, ResponsesStream, responses_answer
from optkit.engine.outputs import Collector, Delta
from optkit.engine.request import PromptFacts
from optkit.engine.text import encode

from .conftest import exactly, logprob

HEAD = {"id": "resp_1", "created": 7, "model": "m", "system_fingerprint": "optkit-1"}
SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}
FORMAT = {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}


def given(finished, known):
    logprobs = (logprob(11), logprob(12)) if known else ()
    return [
        Delta(1, 0, "hel", (11, 12), logprobs, prompt=PromptFacts(5, 4, None)),
        Delta(1, 0, "", (13,)),
        Delta(1, 0, "lo", (14,), logprobs[:1], finished, last=True),
    ]


@pytest.mark.parametrize("finished", ["stop", "length"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"text": {"format": FORMAT}, "instructions": "Be brief.", "metadata": {"a": "b"}, "max_output_tokens": 9},
    ],
    ids=["plain", "logprobs", "structured"],
)
def test_events_come_to_the_whole_answer(tiny_tokenizer, finished, more):
    body = ResponsesBody.model_validate({"input": "a", "stream": True, **more})
    deltas = given(finished, body.wants_logprobs)
    collector = Collector(body.params(5, 100, tiny_tokenizer), 5)
    completion = [collector.add(delta) for delta in deltas][-1]
    whole = responses_answer(body, completion, tiny_tokenizer, **HEAD)
    known = exactly(Response, whole, "store")
    assert json.loads(json.dumps(whole)) == whole
    assert known.output_text == "hello"
    assert known.usage.total_tokens == 9
    assert known.usage.input_tokens_details.cached_tokens == 4
    assert whole["store"] is False
    if finished == "length":
        assert (known.status, known.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    else:
        assert (known.status, known.incomplete_details) == ("completed", None)

    stream = ResponsesStream(body, HEAD, tiny_tokenizer, 5)
    events = [*stream.start(), *(event for delta in deltas for event in stream.add(delta)), *stream.end()]
    assert [name for name, _ in events] == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *("response.output_text.delta",) * 2,
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.completed" if finished == "stop" else "response.incomplete",
    ]
    assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
    state = ResponseStreamState(input_tools=[], text_format=omit)
    for name, event in events:
        assert event["type"] == name
        read = exactly(ResponseStreamEvent, event, "store")
        state.handle_event(TypeAdapter(ResponseStreamEvent).validate_python(event))
    assert read.response.output_text == "hello"
    assert events[-1][1]["response"] == whole
    assert [event["delta"] for _, event in events if "delta" in event] == ["hel", "lo"]
    if body.wants_logprobs:
        assert [entry["token"] for entry in whole["output"][0]["content"][0]["logprobs"]] == [
            tiny_tokenizer.decode([token]) for token in (11, 12, 11)
        ]


def test_the_input_is_a_chat(tiny_tokenizer):
    spoken = [
        {"role": "developer", "content": "Be kind."},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "Hel"}, {"type": "input_text", "text": "lo"}],
        },
        {
            "id": "msg_1",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Yes?", "annotations": [], "logprobs": []}],
        },
        {"role": "user", "content": "No."},
    ]
    body = ResponsesBody.model_validate(
        {"input": spoken, "instructions": "Be brief.", "tools": [], "background": False}
    )
    assert tiny_tokenizer.decode(encode(tiny_tokenizer, body.prompts()[0])) == (
        "<|system|>Be brief.<|system|>Be kind.<|user|>Hello<|assistant|>Yes?<|user|>No.<|assistant|>"
    )
    [prompt] = ResponsesBody.model_validate({"input": "Hello"}).prompts()
    assert tiny_tokenizer.decode(encode(tiny_tokenizer, prompt)) == "<|user|>Hello<|assistant|>"


def test_how_it_is_sampled(tiny_tokenizer):
    ask = {"input": "a", "max_output_tokens": 7, "temperature": 0.5, "top_p": 0.9, "text": {"format": FORMAT}}
    params = ResponsesBody.model_validate(ask).params(5, 100, tiny_tokenizer)
    assert (params.max_tokens, params.temperature, params.top_p, params.logprobs) == (7, 0.5, 0.9, None)
    assert params.structure.json_schema == SCHEMA
    params = ResponsesBody.model_validate({"input": "a", "top_logprobs": 3}).params(5, 100, tiny_tokenizer)
    assert (params.max_tokens, params.temperature, params.logprobs, params.structure) == (95, 1.0, 3, None)
