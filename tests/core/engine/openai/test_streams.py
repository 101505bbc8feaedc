"""Chunks are what OpenAI's client knows, and come to the whole answer."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types import Completion as OpenAICompletion
from openai.types.chat import ChatCompletionChunk

from optkit.engine.openai import ChatBody, ChatStream, CompletionBody, CompletionStream, chat_answer, completion_answer
from optkit.engine.openai.calls import CallParser
from optkit.engine.openai.tools import call_id
from optkit.engine.outputs import Collector, Delta
from optkit.engine.request import PromptFacts

from .conftest import TIME, WEATHER, exactly, logprob

HEAD = {"id": "chatcmpl-1", "created": 1, "model": "m", "system_fingerprint": "optkit-1"}
USER = [{"role": "user", "content": "a"}]


def chat(**more):
    return ChatBody.model_validate({"messages": USER, "stream": True, **more})


def deltas(text, *, sample=0, finished="stop", size=3, known=False, prompt=None, last=True):
    """Two tokens each."""
    pieces = [text[place : place + size] for place in range(0, len(text), size)] or [""]
    for place, piece in enumerate(pieces):
        end = place == len(pieces) - 1
        tokens = (10 + place, 11 + place)
        logprobs = tuple(map(logprob, tokens)) if known else ()
        facts = prompt if place == 0 else None
        yield Delta(1, sample, piece, tokens, logprobs, finished if end else None, end and last, facts)


def streamed(body, tokenizer, given, prompt_tokens=5):
    stream = ChatStream(body, HEAD, tokenizer, prompt_tokens)
    chunks = [*stream.start(), *(chunk for delta in given for chunk in stream.add(delta)), *stream.end()]
    for chunk in chunks:
        exactly(ChatCompletionChunk, chunk)
        assert json.loads(json.dumps(chunk)) == chunk
    return chunks


def test_a_chat_s_chunks(tiny_tokenizer):
    chunks = streamed(chat(), tiny_tokenizer, deltas("hello"))
    assert all({name: chunk[name] for name in HEAD} == HEAD for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert not any("usage" in chunk for chunk in chunks)
    assert [chunk["choices"] for chunk in chunks] == [
        [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
        for delta, finish in [
            ({"role": "assistant", "content": "", "refusal": None}, None),
            ({"content": "hel"}, None),
            ({"content": "lo"}, None),
            ({}, "stop"),
        ]
    ]


def test_what_says_nothing_makes_no_chunk(tiny_tokenizer):
    stream = ChatStream(chat(), HEAD, tiny_tokenizer, 5)
    assert stream.add(Delta(1, 0, "", (7,))) == []
    for reason in ("error", "deadline", "cancelled"):
        assert stream.add(Delta(1, 0, "", (), finished=reason, last=True)) == []


def test_usage_at_the_end_and_all_along(tiny_tokenizer):
    facts = PromptFacts(5, 4, None)
    ask = {"include_usage": True}
    *chunks, last = streamed(chat(stream_options=ask), tiny_tokenizer, deltas("hello", finished="length", prompt=facts))
    assert all(chunk["usage"] is None for chunk in chunks)
    whole = {
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert (last["choices"], last["usage"]) == ([], whole)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    ask["continuous_usage_stats"] = True
    given = [Delta(1, 0, "", (7,), prompt=facts), *deltas("hello")]
    chunks = streamed(chat(stream_options=ask), tiny_tokenizer, given)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [0, 1, 3, 5, 5, 5]


def test_choices_of_a_chat_come_side_by_side(tiny_tokenizer):
    body = chat(n=2, logprobs=True, top_logprobs=2)
    first, second = deltas("hello", known=True, last=False), deltas("world", sample=1, known=True)
    given = [delta for pair in zip(first, second, strict=True) for delta in pair]
    chunks = streamed(body, tiny_tokenizer, given)
    collector = Collector(body.params(5, 100, tiny_tokenizer), 5)
    completion = [collector.add(delta) for delta in given][-1]
    answer = chat_answer(body, completion, tiny_tokenizer, **HEAD)
    for choice in answer["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(one["delta"].get("content", "") for one in mine) == choice["message"]["content"]
        content = [entry for one in mine if one["logprobs"] for entry in one["logprobs"]["content"]]
        assert content == choice["logprobs"]["content"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]


CALL = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'


@given(
    fragments=st.lists(
        st.sampled_from(
            ["Hi", " ", "\n", "<tool_call>", "</tool_call>", CALL, CALL[:30], CALL[:48], '{"name": "time"}']
        ),
        max_size=7,
    ),
    size=st.integers(1, 40),
    finished=st.sampled_from(["stop", "length"]),
    parallel=st.booleans(),
)
def test_streamed_calls_are_those_of_the_whole_answer(tool_tokenizer, fragments, size, finished, parallel):
    tokenizer, text = tool_tokenizer("hermes"), "".join(fragments)
    body = chat(tools=[WEATHER, TIME], parallel_tool_calls=parallel)
    given = list(deltas(text, size=size, finished=finished))
    state = ChatCompletionStreamState()
    for chunk in streamed(body, tokenizer, given):
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    [choice] = state.current_completion_snapshot.choices
    collector = Collector(body.params(5, 1000, tokenizer), 5)
    completion = [collector.add(delta) for delta in given][-1]
    [whole] = chat_answer(body, completion, tokenizer, **HEAD)["choices"]
    assert (choice.message.content or None) == (whole["message"]["content"] or None)
    calls = [
        {
            "id": call.id,
            "type": call.type,
            "function": {"name": call.function.name, "arguments": call.function.arguments},
        }
        for call in choice.message.tool_calls or []
    ]
    assert calls == whole["message"].get("tool_calls", [])
    assert choice.finish_reason == whole["finish_reason"]


def test_a_call_s_first_chunk_names_it_and_arguments_follow(tool_tokenizer):
    body = chat(tools=[WEATHER], logprobs=True)
    given = deltas(f"Hi <tool_call>{CALL}</tool_call>", size=12, known=True)
    chunks = streamed(body, tool_tokenizer("hermes"), given)
    said = [chunk["choices"][0]["delta"] for chunk in chunks[1:]]
    assert said[:3] == [{"content": "Hi"}, {"content": ""}, {"content": ""}]
    calls = [one["tool_calls"][0] for one in said if "tool_calls" in one]
    first = {"index": 0, "id": call_id("chatcmpl-1", 0, 0), "type": "function"}
    assert calls[0] == {**first, "function": {"name": "get_weather", "arguments": ""}}
    assert all(set(one) == {"index", "function"} for one in calls[1:])
    assert "".join(one["function"]["arguments"] for one in calls) == '{"city": "Oslo"}'
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    tokens = [
        entry
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for entry in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert len(tokens) == 2 * len(list(deltas(f"Hi <tool_call>{CALL}</tool_call>", size=12)))


def completions(tokenizer, prompts, given, **fields):
    body = CompletionBody.model_validate({"prompt": [list(one) for one in prompts], "stream": True, **fields})
    stream = CompletionStream(body, HEAD, tokenizer, prompts)
    chunks = [*stream.start(), *(chunk for place, delta in given for chunk in stream.add(place, delta)), *stream.end()]
    for chunk in chunks:
        plain = json.loads(json.dumps(chunk))
        for choice in plain["choices"]:
            # The first token of a prompt has no probability, and OpenAI's types deny what its server says.
            for name in ("token_logprobs", "top_logprobs") if choice["logprobs"] else ():
                choice["logprobs"][name] = [one for one in choice["logprobs"][name] if one is not None]
            # Nor do they know that a choice has no end yet.
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        exactly(OpenAICompletion, plain)
    return body, chunks


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize(("echo", "max_tokens"), [(False, 9), (True, 9), (True, 0)])
def test_the_chunks_of_several_prompts_come_to_the_whole_answer(tiny_tokenizer, logprobs, echo, max_tokens):
    prompts = [tuple(tiny_tokenizer(text).input_ids) for text in ("The quick brown", "漢 fox")]
    given = []
    for place, prompt in enumerate(prompts):
        known = tuple(map(logprob, prompt[1:])) if echo and logprobs is not None else None
        facts = PromptFacts(len(prompt), 1, known)
        one = deltas("hello", known=logprobs is not None, prompt=facts, last=False)
        two = deltas("world!", sample=1, known=logprobs is not None)
        given += [(place, delta) for pair in zip(one, two, strict=True) for delta in pair]
    options = {"n": 2, "logprobs": logprobs, "echo": echo, "max_tokens": max_tokens}
    options["stream_options"] = {"include_usage": True}
    body, [*chunks, last] = completions(tiny_tokenizer, prompts, given, **options)
    collectors = [Collector(body.params(len(prompt), 100, tiny_tokenizer), len(prompt)) for prompt in prompts]
    done = [completion for place, delta in given if (completion := collectors[place].add(delta))]
    answer = completion_answer(body, prompts, done, tiny_tokenizer, **HEAD)
    assert last["usage"] == answer["usage"]
    assert all(chunk["usage"] is None for chunk in chunks)
    for choice in answer["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(one["text"] for one in mine) == choice["text"]
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        for name in choice["logprobs"] or ():
            joined = [entry for one in mine if one["logprobs"] for entry in one["logprobs"][name]]
            assert joined == choice["logprobs"][name]


def test_a_parser_is_not_shared(tool_tokenizer):
    body = chat(tools=[TIME], n=2)
    given = [Delta(1, 0, "<tool_call>", (1,)), Delta(1, 1, "Hi", (1,)), Delta(1, 1, "", (), finished="stop")]
    chunks = streamed(body, tool_tokenizer("hermes"), given)
    assert [chunk["choices"][0]["index"] for chunk in chunks[2:]] == [1, 1]
    assert isinstance(body.tooling(tool_tokenizer("hermes")).parser(), CallParser)
