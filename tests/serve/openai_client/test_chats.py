"""Chats: OpenAI's client cannot tell the server from the real thing."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import OpenAI

from tests.serve.openai_client.asking import HELLO, Place, chat

_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "celsius": {"type": "boolean"}},
            "required": ["city", "celsius"],
            "additionalProperties": False,
        },
    },
}


def test_a_chat_streams_the_text_that_it_gives_in_one_piece(client: OpenAI) -> None:
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert whole.object == "chat.completion"
    assert whole.id.startswith("chatcmpl-")
    assert whole.choices[0].message.role == "assistant"
    assert "".join(one.choices[0].delta.content or "" for one in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.model_dump(exclude={"prompt_tokens_details"}) == whole.usage.model_dump(
        exclude={"prompt_tokens_details"}
    )
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert {one.id for one in chunks} == {chunks[0].id}


def test_the_clients_own_stream_helper_puts_a_chat_together(client: OpenAI) -> None:
    # The helper takes an answer that was cut off for an error.
    end = {"logit_bias": {"2": 100}, "extra_body": {"min_tokens": 5}}
    with client.chat.completions.stream(model="tiny", messages=HELLO, temperature=0, **end) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in events
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.content == chat(client, **end).choices[0].message.content


def test_content_comes_as_text_or_as_parts(client: OpenAI) -> None:
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]
    in_parts = chat(client, messages=[{"role": "user", "content": parts}])
    assert in_parts.choices[0].message.content == chat(client).choices[0].message.content


def test_several_choices_are_given_and_a_seed_repeats_them(client: OpenAI) -> None:
    first, again = ([one.message.content for one in chat(client, n=3, temperature=1, seed=7).choices] for _ in range(2))
    assert first == again
    assert len(set(first)) > 1
    texts = ["", "", ""]
    for chunk in chat(client, n=3, temperature=1, seed=7, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == first


def test_max_completion_tokens_bounds_a_chat(client: OpenAI) -> None:
    answer = chat(client, max_tokens=None, max_completion_tokens=3, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


def test_ignore_eos_and_min_tokens_go_past_the_end(client: OpenAI) -> None:
    end = 2
    biased = {"logit_bias": {str(end): 100}, "max_tokens": 9}
    assert chat(client, **biased).usage.completion_tokens == 1
    assert chat(client, **biased).choices[0].finish_reason == "stop"
    assert chat(client, **biased, extra_body={"min_tokens": 5}).usage.completion_tokens == 6
    assert chat(client, **biased, extra_body={"ignore_eos": True}).usage.completion_tokens == 9


def test_a_bias_forces_a_token_and_a_stop_string_ends_before_it(client: OpenAI, tiny_tokenizer: Any) -> None:
    [token] = tiny_tokenizer("Q").input_ids
    biased = {"logit_bias": {str(token): 100}, "max_tokens": 4}
    assert chat(client, **biased).choices[0].message.content == "QQQQ"
    stopped = chat(client, **biased, stop=["QQQ"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("", "stop")


def test_log_probabilities_of_a_chat_are_those_of_its_tokens(client: OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3, extra_body={"ignore_eos": True})
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 8
    for one in tokens:
        assert len(one.top_logprobs) == 3
        assert one.logprob == max(top.logprob for top in one.top_logprobs) <= 0
    streamed = [
        token
        for chunk in chat(client, logprobs=True, top_logprobs=3, stream=True, extra_body={"ignore_eos": True})
        for choice in chunk.choices
        for token in (choice.logprobs.content if choice.logprobs else ())
    ]
    assert [one.token for one in streamed] == [one.token for one in tokens]
    assert [one.logprob for one in streamed] == pytest.approx([one.logprob for one in tokens], abs=1e-4)


def test_parse_gives_a_pydantic_model(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=HELLO, response_format=Place, max_tokens=400, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, Place)


def test_a_schema_and_json_mode_hold_the_output(client: OpenAI) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "place", "schema": Place.model_json_schema()}}
    answer = chat(client, response_format=schema, max_tokens=400)
    Place.model_validate_json(answer.choices[0].message.content)
    # Any object may be long: it is enough that it begins as one.
    text = chat(client, response_format={"type": "json_object"}, max_tokens=50).choices[0].message.content
    assert text.lstrip().startswith("{")


# --- tools


def test_a_required_tool_is_called_with_valid_arguments(client: OpenAI) -> None:
    fields = {"tools": [_WEATHER], "tool_choice": "required", "max_tokens": 400}
    answer = chat(client, **fields, parallel_tool_calls=False)
    [call] = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert arguments.keys() == {"city", "celsius"}
    assert arguments["city"] in ("Oslo", "Rome")

    written, name, ident, reasons = "", "", "", []
    for chunk in chat(client, **fields, parallel_tool_calls=False, stream=True):
        for choice in chunk.choices:
            reasons.append(choice.finish_reason)
            for part in choice.delta.tool_calls or ():
                assert part.index == 0
                written += part.function.arguments or ""
                name += part.function.name or ""
                ident += part.id or ""
    assert (name, json.loads(written)) == ("weather", arguments)
    assert ident.startswith("call_")
    assert reasons[-1] == "tool_calls"

    back = [
        *HELLO,
        answer.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "It rains."},
    ]
    assert chat(client, tools=[_WEATHER], messages=back).choices[0].message.content is not None


def test_a_named_tool_is_the_one_that_is_called(client: OpenAI) -> None:
    clock = {"type": "function", "function": {"name": "clock"}}
    choice = {"type": "function", "function": {"name": "clock"}}
    answer = chat(client, tools=[_WEATHER, clock], tool_choice=choice, max_tokens=400)
    assert {call.function.name for call in answer.choices[0].message.tool_calls} == {"clock"}
