"""Models that write calls in three ways, and OpenAI's own types to check every answer against."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
from openai import BaseModel
from pydantic import TypeAdapter

from optkit.engine.request import TokenLogprob

_TURNS = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}CALL{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CALL = "{'name': call.function.name, 'KEY': call.function.arguments} | tojson"
TEMPLATES = {
    "hermes": (
        "{% if tools %}<|system|>{{ tools | tojson }} Answer <tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>{% endif %}'
        + _TURNS.replace("CALL", "<tool_call>{{ " + _CALL.replace("KEY", "arguments") + " }}</tool_call>")
    ),
    "llama": (
        '{% if tools %}<|system|>{{ tools | tojson }} Respond {"name": function name, "parameters": dictionary}.'
        "{% endif %}" + _TURNS.replace("CALL", "{{ " + _CALL.replace("KEY", "parameters") + " }}")
    ),
    "mistral": (
        "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}"
        + _TURNS.replace("CALL", "[TOOL_CALLS][{{ " + _CALL.replace("KEY", "arguments") + " }}]")
    ),
}
MARKERS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "What the weather is like.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}


@pytest.fixture(scope="session")
def tool_tokenizer(tiny_tokenizer: Any) -> Any:
    """`tool_tokenizer(kind, special)`: one whose template shows tools; `special` says what the markers are. Shared."""

    @functools.cache
    def make(kind: str, special: bool | None = None) -> Any:
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = TEMPLATES[kind]
        if special is not None:
            tokenizer.add_tokens(MARKERS, special_tokens=special)
        return tokenizer

    return make


def exactly(kind: Any, found: Any, *more: str) -> Any:
    """`found` as OpenAI's client knows it: every field of the right type, and none that it does not know but `more`."""
    known = TypeAdapter(kind).validate_python(found)
    _known_fields(known, set(more))
    return known


def _known_fields(value: Any, more: set[str]) -> None:
    if isinstance(value, BaseModel):
        assert set(value.model_extra or {}) <= more, value.model_extra
        for _, child in value:
            _known_fields(child, more)
    elif isinstance(value, list | tuple):
        for child in value:
            _known_fields(child, more)


def logprob(token: int) -> TokenLogprob:
    """Of some token, with two that were likely too."""
    return TokenLogprob(token, -token / 7, ((token, -token / 7), (token + 1, -5.0)))
