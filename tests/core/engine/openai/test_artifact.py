"""An artifact whose template takes tools answers in every one of OpenAI's words, in a batch file too."""

from __future__ import annotations

import copy
import json

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from optkit.engine.batch_file import run_batch

from .conftest import TIME, exactly

ASK = {"messages": [{"role": "user", "content": "When?"}], "tools": [TIME], "seed": 3, "max_tokens": 90}


@pytest.fixture
def calling(scripted, tiny_tokenizer):
    """A scripted artifact whose template takes tools."""
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% if tools %}<tool_call>{% endif %}" + tokenizer.chat_template
    return scripted(tokenizer=tokenizer)


def test_every_kind_of_line_is_answered(calling, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    unknown = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "if": {}}}}
    bodies = [
        ("/v1/chat/completions", {**ASK, "tool_choice": "required", "parallel_tool_calls": False}),
        ("/v1/chat/completions", {**ASK, "tools": [unknown], "tool_choice": "required"}),
        ("/v1/completions", {"prompt": "a", "max_tokens": 3}),
        ("/v1/completions", {"prompt": ["fox", "The"], "max_tokens": 0, "echo": True, "logprobs": 0}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 5}),
    ]
    lines = [
        {"custom_id": str(place), "method": "POST", "url": url, "body": body}
        for place, (url, body) in enumerate(bodies)
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    outcome = run_batch(calling, source, output)
    called, wrong, text, scored, response = [json.loads(one)["response"] for one in output.read_text().splitlines()]

    [choice] = exactly(ChatCompletion, called["body"]).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("time", {})
    assert wrong["status_code"] == 400
    assert "this grammar cannot be followed" in wrong["body"]["error"]["message"]
    assert exactly(Completion, text["body"]).usage.completion_tokens == 3
    known = exactly(Response, response["body"], "store")
    assert (known.status, known.usage.output_tokens) == ("incomplete", 5)

    prompt = scored["body"]["usage"]["prompt_tokens"]
    assert scored["body"]["usage"]["completion_tokens"] == 0
    assert [one["text"] for one in scored["body"]["choices"]] == ["fox", "The"]
    assert [one["finish_reason"] for one in scored["body"]["choices"]] == ["length", "length"]
    assert sum(len(one["logprobs"]["tokens"]) for one in scored["body"]["choices"]) == prompt
    ids = [one["body"]["id"] for one in (called, text, response)]
    assert [one.rpartition("batch_req_")[0] for one in ids] == ["chatcmpl-", "cmpl-", "resp_"]
    assert (outcome.counts.succeeded, outcome.counts.failed) == (4, 1)
    spent = [one["body"]["usage"] for one in (called, text, scored)]
    assert outcome.counts.output_tokens == sum(one["completion_tokens"] for one in spent) + 5
