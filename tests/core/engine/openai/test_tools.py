"""Whatever the model prefers, a demanded call is one, and its arguments fit the schema."""

from __future__ import annotations

import json

import numpy as np
import pytest
from openai.types.chat import ChatCompletion

from optkit.engine.openai import ChatBody, chat_answer
from optkit.engine.outputs import Completion, Sample
from optkit.engine.sampler import Sampler
from optkit.engine.structure import Structures
from optkit.engine.text import Chat, TextStream, encode, kept_tokens
from optkit.errors import RequestError

from .conftest import TEMPLATES, TIME, WEATHER, exactly

HEAD = {"id": "chatcmpl-1", "created": 1, "model": "m", "system_fingerprint": "optkit-1"}
ASK = {"messages": [{"role": "user", "content": "How warm is it?"}], "tools": [WEATHER, TIME]}


def generate(tokenizer, body, seed):
    """The text of a model with random preferences, as the engine gives it."""
    params, vocab = body.params(3, 2000, tokenizer), len(tokenizer)
    structures, ends = Structures(tokenizer, vocab), frozenset({tokenizer.eos_token_id})
    sampler, matcher = Sampler(vocab, ends), structures.matcher(params.structure)
    handle = sampler.open(params, [1], seed=seed, matcher=matcher)
    stream, text, count = TextStream(tokenizer, (), kept_tokens(tokenizer)), "", 0
    while not matcher.finished:
        logits = (np.random.default_rng(1000 * seed + count).normal(size=(1, vocab)) * 3).astype(np.float32)
        (token,) = sampler.sample(logits, [handle], [1 + count]).tokens
        sampler.accept([handle], [token])
        count += 1
        assert count < 2000
        if token != tokenizer.eos_token_id:
            text += stream.push(token)
    assert matcher.error == ""
    return text + stream.flush()


def answered(tokenizer, body, text, finish="stop"):
    completion = Completion((Sample(0, text, (7, 8), finish, None, None),), 3, 0, None, "")
    answer = chat_answer(body, completion, tokenizer, **HEAD)
    [choice] = exactly(ChatCompletion, answer).choices
    assert choice.finish_reason == answer["choices"][0]["finish_reason"]
    return answer["choices"][0]


@pytest.mark.parametrize("special", [None, False, True])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_demanded_call_is_one(tool_tokenizer, kind, special):
    tokenizer = tool_tokenizer(kind, special)
    named = {"type": "function", "function": {"name": "get_weather"}}
    for seed, (choice, parallel) in enumerate((("required", None), ("required", False), (named, None))):
        body = ChatBody.model_validate({**ASK, "tool_choice": choice, "parallel_tool_calls": parallel})
        answer = answered(tokenizer, body, generate(tokenizer, body, seed))
        assert answer["finish_reason"] == "tool_calls"
        assert answer["message"]["content"] is None
        calls = answer["message"]["tool_calls"]
        assert len(calls) == 1 or (choice == "required" and parallel is None)
        for call in calls:
            arguments = json.loads(call["function"]["arguments"])
            if call["function"]["name"] == "get_weather":
                assert set(arguments) <= {"city", "days"}
                assert len(arguments["city"]) <= 5
            else:
                assert choice == "required"
                assert arguments == {}


@pytest.mark.parametrize("special", [None, True])
@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("hermes", "<tool_call>\n{}\n</tool_call>\n<tool_call>\n{}\n</tool_call>"),
        ("mistral", "[TOOL_CALLS][{}, {}]"),
    ],
)
def test_demanded_calls_may_be_several(tool_tokenizer, kind, special, text):
    tokenizer = tool_tokenizer(kind, special)
    body = ChatBody.model_validate({**ASK, "tool_choice": "required"})
    call = '{"name": "time", "arguments": {}}'
    text = text.replace("{}", call)
    matcher = Structures(tokenizer, len(tokenizer)).matcher(body.params(3, 2000, tokenizer).structure)
    for token in tokenizer(text).input_ids:
        matcher.accept(token)
        assert matcher.error == ""
    assert len(answered(tokenizer, body, text)["message"]["tool_calls"]) == 2


def test_calls_in_answers(tool_tokenizer):
    tokenizer, body = tool_tokenizer("hermes"), ChatBody.model_validate(ASK)
    call = '<tool_call>\n{"name": "time", "arguments": {"a": "ü"}}\n</tool_call>'
    choice = answered(tokenizer, body, f"So: {call}\n{call}")
    assert choice["message"]["content"] == "So:"
    first, second = choice["message"]["tool_calls"]
    assert first["id"] != second["id"]
    assert len(first["id"]) == len("call_") + 24
    assert first["function"] == second["function"] == {"name": "time", "arguments": '{"a": "ü"}'}
    assert answered(tokenizer, body, call, "length")["finish_reason"] == "length"
    one = ChatBody.model_validate({**ASK, "parallel_tool_calls": False})
    assert len(answered(tokenizer, one, call + call)["message"]["tool_calls"]) == 1
    plain = answered(tokenizer, body, " text ")
    assert plain["message"] == {"role": "assistant", "content": " text ", "refusal": None}
    none = ChatBody.model_validate({**ASK, "tool_choice": "none"})
    assert answered(tokenizer, none, call)["message"]["content"] == call


def test_the_history_goes_through_the_template(tool_tokenizer):
    tokenizer = tool_tokenizer("hermes")
    history = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Wea"}, {"type": "text", "text": "ther?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": '{"b":  [1, null]}'}}
            ],
        },
        {"role": "tool", "content": "noon", "tool_call_id": "call_1"},
    ]
    body = ChatBody.model_validate({"messages": history, "tools": [TIME]})
    [prompt] = body.prompts()
    shown = tokenizer.decode(encode(tokenizer, prompt))
    assert shown.startswith('<|system|>[{"type": "function", "function": {"name": "time"}}]')
    assert shown.endswith(
        '<|system|>Be brief.<|user|>Weather?<|assistant|><tool_call>{"name": "time", "arguments": '
        '{"b": [1, null]}}</tool_call><|tool|>noon<|assistant|>'
    )
    none = ChatBody.model_validate({"messages": history, "tools": [TIME], "tool_choice": "none"})
    assert tokenizer.decode(encode(tokenizer, none.prompts()[0])).startswith("<|system|>Be brief.")
    with pytest.raises(RequestError, match="the arguments of a tool call in the messages are no JSON object"):
        encode(
            tokenizer, Chat([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}])
        )
