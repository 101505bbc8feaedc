"""Calls are found in text in the same way however the text is cut."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.engine.openai.calls import CallParser
from optkit.engine.openai.tools import call_format
from optkit.errors import RequestError

NAMES = {"f", "get_weather"}


def found(form, pieces, most=None):
    """Content, and calls as name and arguments."""
    parser = CallParser(form, NAMES, most)
    content, calls = "", []
    for piece in [one for text in pieces for one in parser.push(text)] + parser.end():
        if piece.call is None:
            content += piece.text
        elif piece.name:
            assert piece.call == len(calls)
            calls.append([piece.name, piece.text])
        else:
            assert piece.call == len(calls) - 1
            calls[-1][1] += piece.text
    assert parser.calls == len(calls)
    return content, [tuple(call) for call in calls]


@pytest.fixture(scope="module")
def forms(tool_tokenizer):
    return {kind: call_format(tool_tokenizer(kind)) for kind in ("hermes", "llama", "mistral")}


ONE = '{"name": "f", "arguments": {"a": [1, "}\\""]}}'
TWO = '{ "name":"get_weather" ,"arguments":\n{} }'
UNKNOWN = '{"name": "g", "arguments": {}}'


@pytest.mark.parametrize(
    ("kind", "text", "content", "calls"),
    [
        ("hermes", "no call\n", "no call\n", []),
        ("hermes", f"<tool_call>\n{ONE}\n</tool_call>", "", [("f", '{"a": [1, "}\\""]}')]),
        ("hermes", f"Let me see.\n<tool_call>{TWO}</tool_call>\n", "Let me see.", [("get_weather", "{}")]),
        (
            "hermes",
            f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{TWO}\n</tool_call>",
            "",
            [("f", '{"a": [1, "}\\""]}'), ("get_weather", "{}")],
        ),
        ("hermes", f"<tool_call>{UNKNOWN}</tool_call>", f"<tool_call>{UNKNOWN}</tool_call>", []),
        ("hermes", "<tool_call> nonsense", "<tool_call> nonsense", []),
        ("hermes", '<tool_call>{"name": "f", "arg', '<tool_call>{"name": "f", "arg', []),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": tru', "", [("f", '{"a": tru')]),
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', "", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "x"}</tool_call>', None, []),
        ("hermes", '<tool_call>{"name": "f"}</tool_call> and so on', " and so on", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>', None, []),
        ("hermes", "a <tool_cal", "a <tool_cal", []),
        ("llama", '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        ("llama", '<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
        (
            "llama",
            '\n{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"b": 2}}',
            "",
            [("f", "{}"), ("f", '{"b": 2}')],
        ),
        ("llama", '{"answer": 42}', '{"answer": 42}', []),
        ("llama", 'Say {"name": "f", "parameters": {}}', None, []),
        ("mistral", f"[TOOL_CALLS][{ONE}, {TWO}]", "", [("f", '{"a": [1, "}\\""]}'), ("get_weather", "{}")]),
        ("mistral", f"Well. [TOOL_CALLS] [{ONE}]", "Well.", [("f", '{"a": [1, "}\\""]}')]),
        ("mistral", f"[TOOL_CALLS]{TWO}", "", [("get_weather", "{}")]),
        ("mistral", "[TOOL_CALLS] none", None, []),
    ],
)
def test_what_a_text_calls(forms, kind, text, content, calls):
    assert found(forms[kind], [text]) == (text if content is None else content, calls)
    assert found(forms[kind], list(text)) == (text if content is None else content, calls)


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[", "]", ",", ";", "{", "}", '"', "\\"),
        *(ONE, TWO, UNKNOWN, ONE.replace("arguments", "parameters"), TWO.replace("arguments", "parameters")),
        *(ONE[:20], ONE[:35], '{"name": "f"}', " ", "\n", "text", "<tool", "[TOOL", '{"arguments": {}, "name": "f"}'),
        '{"name":' + " " * 510 + '"f", "arguments": {}}',
    ]
)


@given(
    kind=st.sampled_from(["hermes", "llama", "mistral"]),
    text=st.lists(FRAGMENTS, max_size=10).map("".join),
    cuts=st.lists(st.integers(0, 400), max_size=20).map(sorted),
    most=st.sampled_from([None, 1]),
)
def test_calls_do_not_depend_on_how_the_text_is_cut(forms, kind, text, cuts, most):
    pieces = [text[first:second] for first, second in pairwise([0, *cuts, len(text)])] if cuts else [text]
    pieces = pieces if "".join(pieces) == text else [text]
    whole = found(forms[kind], [text], most)
    assert found(forms[kind], pieces, most) == whole
    assert found(forms[kind], list(text), most) == whole
    content, calls = whole
    if not calls:
        assert content == text
    if most is not None:
        assert calls == found(forms[kind], [text])[1][:most]


def test_arguments_come_as_they_are_written_and_nothing_of_a_call_is_text(forms):
    parser = CallParser(forms["hermes"], NAMES)
    said = [
        parser.push(text) for text in ("Hm. <tool", '_call>{"name": "f", "argu', 'ments": {"ci', 'ty": ', "1}", "}")
    ]
    assert [[tuple(piece) for piece in one] for one in said] == [
        [("Hm.", None, "")],
        [],
        [("", 0, "f"), ('{"ci', 0, "")],
        [('ty": ', 0, "")],
        [("1}", 0, "")],
        [],
    ]
    assert parser.end() == []


def test_long_texts_are_read_in_linear_time(forms):
    text = '<tool_call>{"a": [' * 1000
    assert found(forms["hermes"], [text[place : place + 5] for place in range(0, len(text), 5)]) == (text, [])
    deep = '<tool_call>{"a": ' + "[" * 30_000 + "]" * 30_000 + "}"
    assert found(forms["hermes"], [deep]) == (deep, [])
    call = {"name": "f", "arguments": {"a": "x" * 30_000}}
    assert found(forms["hermes"], list(f"<tool_call>{json.dumps(call)}</tool_call>"))[1][0][0] == "f"


def test_templates_that_are_not_known_are_refused(tool_tokenizer, tiny_tokenizer):
    with pytest.raises(RequestError, match=r"^this model's chat template takes no tools; remove them, or choose"):
        call_format(tiny_tokenizer)
    other = copy.deepcopy(tool_tokenizer("hermes"))
    other.chat_template = "{{ tools }}<tool_call><function=f></function></tool_call>"
    with pytest.raises(RequestError, match="writes calls of tools in a way that is not known here"):
        call_format(other)
