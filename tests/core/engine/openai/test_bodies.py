"""Requests are taken as OpenAI's clients send them, everything in them has a bound, and what is wrong is said."""

from __future__ import annotations

import pytest
from openai.types.chat import completion_create_params as chat_params
from pydantic import ValidationError

from optkit.engine.openai import BODIES, ChatBody, CompletionBody, EmbeddingBody, ResponsesBody, invalid
from optkit.engine.text import encode
from optkit.errors import RequestError

from .conftest import TIME, WEATHER

USER = [{"role": "user", "content": "a"}]


def error(body, **fields):
    with pytest.raises(ValidationError) as refused:
        body.model_validate(fields)
    found = invalid(refused.value)["error"]
    assert found["type"] == "invalid_request_error"
    assert len(found["message"]) < 400
    assert "\n" not in found["message"]
    return found["message"], found["param"]


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"properties": value}
    return value


CHAT_FAULTS = [
    ({"reasoning_effort": "low"}, "reasoning_effort: not supported"),
    ({"functions": []}, "functions: not supported; use tools"),
    ({"chat_template": "{{ 1 }}"}, "chat_template: the template comes with the model and cannot be replaced"),
    ({"service_tier": "flex"}, "service_tier: Input should be 'auto' or 'default'"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"messages": []}, "messages: List should have at least 1 item"),
    ({"messages": USER * 4097}, "messages: List should have at most 4096 items"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role: Input should be 'system'"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content: Input should be a valid string"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content: holds half of a surrogate pair"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0.type: this model takes text only",
    ),
    ({"messages": [{"role": "user", **{str(place): 1 for place in range(17)}}]}, "messages.0: has more than 16 fields"),
    ({"messages": [{"role": "user", "more": nested(8)}]}, "messages.0.more: is nested more than 8 levels deep"),
    ({"messages": [{"role": "user", "more": [0] * 1000}]}, "messages.0.more: holds more than 1000 values"),
    ({"messages": [{"role": "user", "more": "\ud800"}]}, "messages.0.more: holds half of a surrogate pair"),
    ({"stop": ["x"] * 17}, "stop: List should have at most 16 items"),
    ({"stop": "x" * 1025}, "stop: String should have at most 1024 characters"),
    ({"metadata": {str(place): "" for place in range(17)}}, "metadata: Dictionary should have at most 16 items"),
    ({"metadata": {"a": "x" * 513}}, "metadata.a: String should have at most 512 characters"),
    ({"user": "x" * 513}, "user: String should have at most 512 characters"),
    ({"logit_bias": {str(place): 1 for place in range(1025)}}, "logit_bias: Dictionary should have at most 1024"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1: Input should be less than or equal to 100"),
    ({"stop_token_ids": [0] * 1025}, "stop_token_ids: List should have at most 1024 items"),
    ({"max_tokens": 1 << 40}, "max_tokens: Input should be less than 2147483648"),
    ({"top_logprobs": 3}, "top_logprobs needs logprobs to be true"),
    ({"stream_options": {"include_usage": True}}, "stream_options needs stream to be true"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt begins a message"),
    ({"tools": [TIME] * 129}, "tools: List should have at most 128 items"),
    ({"tools": [TIME, TIME]}, "two tools have the same name"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type: Input should be 'function'"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name: String should match"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
        'tools.0.function.parameters: must be a schema of type "object"',
    ),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(33)}}]},
        "tools.0.function.parameters: is nested more than 32 levels deep",
    ),
    ({"tool_choice": "required"}, "tool_choice needs tools"),
    (
        {"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice names a function that is not among the tools",
    ),
    (
        {"tools": [TIME], "response_format": {"type": "json_object"}},
        "response_format excludes tools, unless tool_choice is none",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": nested(40)}}},
        "response_format.json_schema.schema: is nested more than 32 levels deep",
    ),
]


@pytest.mark.parametrize(("fields", "message"), CHAT_FAULTS)
def test_what_is_wrong_with_a_chat_is_said(fields, message):
    found, param = error(ChatBody, **{"messages": USER, **fields})
    assert found.startswith(message)
    assert param is None or message.startswith(param)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ["a"] * 2049}, "prompt: List should have at most 2048 items"),
        ({"prompt": [[1, -1]]}, "prompt.0.1: Input should be greater than or equal to 0"),
        ({"prompt": [""], "suffix": "b"}, "suffix: not supported; this engine only continues text"),
        ({"prompt": [[1], []]}, "the prompt is empty"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens 0 needs echo to be true"),
        ({"prompt": "a", "stream": True, "best_of": 2}, "the best of several can be told at the end only"),
        ({"prompt": "a", "logprobs": 21}, "logprobs: Input should be less than or equal to 20"),
    ],
)
def test_what_is_wrong_with_a_completion_is_said(fields, message):
    assert error(CompletionBody, **fields)[0].startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id: this server stores no responses; send the whole"),
        ({"background": True}, "background: this server stores no responses"),
        ({"conversation": {"id": "a"}}, "conversation: this server stores no responses"),
        ({"tools": [{"type": "web_search"}]}, "tools: not supported here; use /v1/chat/completions"),
        ({"reasoning": {"effort": "low"}}, "reasoning: unknown field"),
        ({"truncation": "auto"}, "truncation: Input should be 'disabled'"),
        ({"input": []}, "input: List should have at least 1 item"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0.type: this model takes text only",
        ),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input.0.type: this model takes messages only"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format: type json_schema and the fields"),
    ],
)
def test_what_is_wrong_with_a_response_s_request_is_said(fields, message):
    assert error(ResponsesBody, **{"input": "a", **fields})[0].startswith(message)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "an input is empty"),
        (["a", ""], "an input is empty"),
        (["a"] * 2049, "input: List should have at most 2048 items"),
        ([1.5], "input.0"),
    ],
)
def test_what_is_wrong_with_an_embedding_s_request_is_said(given, message):
    assert error(EmbeddingBody, input=given)[0].startswith(message)


def test_what_real_clients_send_is_taken(tool_tokenizer):
    tokenizer = tool_tokenizer("hermes")
    kept = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s"}
    for body in BODIES.values():
        ask = {ChatBody: {"messages": USER}, CompletionBody: {"prompt": "a"}}.get(body, {"input": "a"})
        known = body.model_validate({"model": "m", "prompt_cache_key": "k", **kept, **ask})
        assert known.params(5, 100, tokenizer) == body.model_validate(ask).params(5, 100, tokenizer)
    # guidellm
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    stream = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    body = ChatBody.model_validate(
        {"model": "m", "messages": parts, **stream, "max_completion_tokens": 9, "stop": None, "ignore_eos": True}
    )
    params = body.params(5, 100, tokenizer)
    assert (params.max_tokens, params.ignore_eos, params.stop) == (9, True, ())
    # lm-eval
    score = {"prompt": [[1, 2], [3]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    assert CompletionBody.model_validate(score).params(2, 100, tokenizer).prompt_logprobs == 1
    typed = [{"role": "user", "content": "a", "type": "text"}]
    assert ChatBody.model_validate({"messages": typed, "stop": ["\n"]}).params(5, 100, tokenizer).stop == ("\n",)
    # a chat that goes on, as openai-python gives messages back
    back = {"role": "assistant", "content": "b", "refusal": None, "annotations": [], "audio": None, "tool_calls": None}
    body = ChatBody.model_validate({"messages": [*USER, back], "tools": [WEATHER], "parallel_tool_calls": True})
    assert body.params(5, 100, tokenizer).structure is None
    text = tokenizer.decode(encode(tokenizer, body.prompts()[0]))
    assert text.endswith("<|user|>a<|assistant|>b<|assistant|>")


def test_every_field_of_openai_s_is_known_or_refused():
    """A client's new field must not be dropped in silence; this list is looked at when the client grows."""
    fields = set(chat_params.CompletionCreateParamsBase.__annotations__) - set(ChatBody.model_fields)
    assert fields == {
        *("audio", "function_call", "functions", "moderation", "prediction", "prompt_cache_options"),
        *("reasoning_effort", "verbosity", "web_search_options"),
    }
    for name in fields:
        message, param = error(ChatBody, messages=USER, **{name: None})
        assert param == name
        assert message.startswith(name)


def test_a_message_may_go_on(tiny_tokenizer):
    half = [*USER, {"role": "assistant", "content": "half"}]
    body = ChatBody.model_validate({"messages": half, "continue_final_message": True})
    assert tiny_tokenizer.decode(encode(tiny_tokenizer, body.prompts()[0])) == "<|user|>a<|assistant|>half"
    body = ChatBody.model_validate({"messages": half, "add_generation_prompt": False})
    assert tiny_tokenizer.decode(encode(tiny_tokenizer, body.prompts()[0])) == "<|user|>a<|assistant|>half"


def test_bounds_of_what_is_generated(tiny_tokenizer):
    chat = ChatBody.model_validate({"messages": USER})
    assert chat.params(90, 100, tiny_tokenizer).max_tokens == 10
    assert CompletionBody.model_validate({"prompt": "a"}).params(90, 100, tiny_tokenizer).max_tokens == 10
    assert CompletionBody.model_validate({"prompt": "a"}).params(9, 100, tiny_tokenizer).max_tokens == 16
    scored = CompletionBody.model_validate({"prompt": "a", "max_tokens": 0, "echo": True})
    assert scored.params(9, 100, tiny_tokenizer).max_tokens == 1
    for key in ("x", "1_0", " 1", "-1", "\u0661"):
        body = ChatBody.model_validate({"messages": USER, "logit_bias": {key: 1}})
        with pytest.raises(RequestError, match="logit_bias: keys are token ids"):
            body.params(9, 100, tiny_tokenizer)
