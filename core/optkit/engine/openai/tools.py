"""Tools that a model may call: https://platform.openai.com/docs/guides/function-calling

The chat template shows them to the model, and says how it writes a call. With `tool_choice` `auto` the output is free,
and calls are found in it; `strict` then adds nothing. With `required` or a named function a grammar holds the whole
output to calls whose arguments fit their schemas.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import field_validator

from optkit.engine.openai.calls import CallFormat, CallParser
from optkit.engine.openai.fields import Name, Schema, Strict, Text
from optkit.engine.request import Structure
from optkit.engine.structure import WHITESPACE
from optkit.engine.text import chat_template
from optkit.errors import RequestError

__all__ = ["NamedTool", "Tool", "Tooling", "call_format", "call_id", "called"]

_SEVERAL = 16
"""Calls of one output that a grammar allows."""

_HERMES = CallFormat("<tool_call>", "", "", "</tool_call>", "arguments")
_MISTRAL = CallFormat("[TOOL_CALLS]", "[", ",", "]", "arguments")
_LLAMA = CallFormat("", "", ";", "", "parameters", prelude="<|python_tag|>")


class Function(Strict):
    """What can be called."""

    name: Name
    description: Text | None = None
    parameters: Schema | None = None
    """A JSON Schema of an object; without it there are no parameters."""
    strict: bool | None = None

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
        if parameters and parameters.get("type", "object") != "object":
            raise ValueError('must be a schema of type "object"')
        return parameters


class Tool(Strict):
    """One of `tools`."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The one to call."""

    name: Name


class NamedTool(Strict):
    """A `tool_choice` that is one function."""

    type: Literal["function"]
    function: NamedFunction


class Tooling:
    """How tools are called by one model in answer to one request.

    Args:
        tools: that may be called.
        forced: the output is calls and nothing else.
        parallel: it may be several.
        tokenizer: from `optkit.engine.text.load_tokenizer`.

    Raises:
        RequestError: as `call_format`.
    """

    def __init__(self, tools: Sequence[Tool], *, forced: bool, parallel: bool, tokenizer: Any) -> None:
        self._form = call_format(tokenizer)
        self._tools, self._forced, self._parallel, self._tokenizer = tools, forced, parallel, tokenizer

    def parser(self) -> CallParser:
        """For one output."""
        names = frozenset(tool.function.name for tool in self._tools)
        return CallParser(self._form, names, None if self._parallel else 1)

    def structure(self) -> Structure | None:
        """What the output must be; None if anything may come."""
        return Structure(grammar=self._grammar()) if self._forced else None

    def _grammar(self) -> str:
        form, start = self._form, "call"
        if form is _HERMES:
            one = f'{self._marker(form.begin)} "\\n" call "\\n" {self._marker(form.end)}'
            start = self._several(one, '"\\n"')
        elif form is _MISTRAL:
            several = self._several("call", '", "')
            start = f'{self._marker(form.begin)} "[" {several} "]"'
        # Llama's models call one function at a time.
        lines = [f"start: {start}", "call: " + " | ".join(f"call_{place}" for place in range(len(self._tools)))]
        for place, tool in enumerate(self._tools):
            head = f'{{"name": "{tool.function.name}", "{form.arguments}": '
            schema = {"type": "object", **(tool.function.parameters or {"additionalProperties": False})}
            schema["x-guidance"] = {"whitespace_pattern": WHITESPACE}
            lines += [f'call_{place}: {json.dumps(head)} arguments_{place} "}}"']
            lines += [f"arguments_{place}: %json {json.dumps(schema)}"]
        return "\n".join(lines)

    def _several(self, one: str, gap: str) -> str:
        return f"{one} ({gap} {one}){{0,{_SEVERAL - 1}}}" if self._parallel else one

    def _marker(self, text: str) -> str:
        """In a grammar, a token of its own is another thing than its letters."""
        token = self._tokenizer.added_tokens_encoder.get(text)
        return json.dumps(text) if token is None else f"<[{token}]>"


def call_format(tokenizer: Any) -> CallFormat:
    """How a model writes calls, which its chat template shows.

    Raises:
        RequestError: it takes no tools, or writes them in a way that is not known here.
    """
    template = chat_template(tokenizer, tools=True)
    if "[TOOL_CALLS]" in template and "[ARGS]" not in template:
        return _MISTRAL
    if "<tool_call>" in template and "<function=" not in template:
        return _HERMES
    if '"parameters"' in template and '"name"' in template:
        return _LLAMA
    raise RequestError("this model writes calls of tools in a way that is not known here", remedy="remove the tools")


def call_id(answer: str, sample: int, call: int) -> str:
    """The id of a call, the same whenever the same answer is put into words."""
    return "call_" + hashlib.blake2b(f"{answer} {sample} {call}".encode(), digest_size=12).hexdigest()


def called(parser: CallParser, text: str, answer: str, sample: int) -> tuple[str | None, list[dict[str, Any]]]:
    """A whole output's text, None where it is empty beside calls, and `tool_calls`.

    Args:
        parser: a fresh one.
        text: the output.
        answer: id of the answer.
        sample: which of its choices.
    """
    content: list[str] = []
    calls: list[dict[str, Any]] = []
    for piece in (*parser.push(text), *parser.end()):
        if piece.call is None:
            content.append(piece.text)
        elif piece.name:
            function = {"name": piece.name, "arguments": piece.text}
            calls.append({"id": call_id(answer, sample, piece.call), "type": "function", "function": function})
        else:
            calls[piece.call]["function"]["arguments"] += piece.text
    return ("".join(content) or None) if calls else text, calls
