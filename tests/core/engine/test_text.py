"""Text that comes token by token is the text that the tokens are."""

from __future__ import annotations

import copy
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.engine import wire
from optkit.engine.text import Chat, Detokenizer, TextStream, chat, encode, end_tokens, kept_tokens, load_tokenizer
from optkit.errors import MissingError, RequestError


def streamed(tokenizer, tokens):
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@given(text=st.text(max_size=120))
def test_pieces_of_any_text_join_to_it(tiny_tokenizer, text):
    tokens = tiny_tokenizer(text).input_ids
    pieces = streamed(tiny_tokenizer, tokens)
    assert "".join(pieces) == tiny_tokenizer.decode(tokens, skip_special_tokens=True)


@given(data=st.data())
def test_pieces_of_any_tokens_join_to_what_they_decode_to(tiny_tokenizer, data):
    """A sampled model also writes bytes that are no character, and special tokens in the middle."""
    tokens = data.draw(st.lists(st.integers(0, len(tiny_tokenizer) - 1), max_size=120))
    pieces = streamed(tiny_tokenizer, tokens)
    assert "".join(pieces) == tiny_tokenizer.decode(tokens, skip_special_tokens=True)


@given(text=st.text(st.sampled_from("aé漢🙂 \n\ufffd"), min_size=60, max_size=200))
def test_long_texts_join_across_the_restarts(tiny_tokenizer, text):
    tokens = tiny_tokenizer(text).input_ids
    assert "".join(streamed(tiny_tokenizer, tokens)) == tiny_tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_character_comes_when_its_last_byte_does(tiny_tokenizer):
    tokens = tiny_tokenizer("a漢🙂").input_ids
    assert len(tokens) == 1 + 3 + 4
    assert streamed(tiny_tokenizer, tokens) == ["a", "", "", "漢", "", "", "", "🙂", ""]


def test_half_a_character_at_the_end_is_given_out_at_last(tiny_tokenizer):
    tokens = tiny_tokenizer("a漢").input_ids[:-1]
    *pieces, last = streamed(tiny_tokenizer, tokens)
    assert pieces == ["a", "", ""]
    assert last == "\ufffd"


def test_special_tokens_are_no_text(tiny_tokenizer):
    tokens = [*tiny_tokenizer("one").input_ids, tiny_tokenizer.eos_token_id]
    assert "".join(streamed(tiny_tokenizer, tokens)) == "one"


def test_words_keep_the_spaces_between_them(tiny_tokenizer):
    text = "the quick brown fox " * 20
    pieces = streamed(tiny_tokenizer, tiny_tokenizer(text).input_ids)
    assert "".join(pieces) == text
    assert all(len(piece) < 12 for piece in pieces)


def test_a_prompt_goes_through_the_chat_template(tiny_tokenizer):
    tokens = encode(tiny_tokenizer, chat("Hello"))
    assert tiny_tokenizer.decode(tokens) == "<|user|>Hello<|assistant|>"
    assert encode(tiny_tokenizer, "Hello") == tuple(tiny_tokenizer("Hello").input_ids)
    assert encode(tiny_tokenizer, [3, 1, 2]) == (3, 1, 2)


def test_messages_that_no_template_takes_are_refused(tiny_tokenizer):
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    with pytest.raises(RequestError, match=r"^the model has no chat template; give text or token ids"):
        encode(plain, chat("Hello"))
    plain.chat_template = "{{ raise_exception('system comes first') }}"
    with pytest.raises(RequestError, match=r"^the chat template refuses the messages \(system comes first\)$"):
        encode(plain, chat("Hello"))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% for i in range(1000000000) %}a{% endfor %}",
        "{{ 'x' * 16777217 }}",
        "{{ messages[0].nothing.at_all }}",
        "{% if %}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_can_do_nothing_but_write_and_its_faults_show_nothing(tiny_tokenizer, template):
    hostile = copy.deepcopy(tiny_tokenizer)
    hostile.chat_template = template
    with pytest.raises(RequestError) as refused:
        encode(hostile, chat("a secret"))
    assert re.fullmatch(
        r"the chat template (refuses the messages|makes more than 16777216 characters of the messages)",
        str(refused.value),
    )


def test_templates_run_in_an_immutable_sandbox(tiny_tokenizer):
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from transformers.utils.chat_template_utils import _compile_jinja_template

    assert isinstance(_compile_jinja_template(tiny_tokenizer.chat_template).environment, ImmutableSandboxedEnvironment)


def test_a_chat_says_how_it_goes_on(tiny_tokenizer):
    turns = [*chat("Hello"), {"role": "assistant", "content": "Well "}]
    shown = [
        tiny_tokenizer.decode(encode(tiny_tokenizer, wish))
        for wish in (
            turns,
            Chat(turns),
            Chat(turns, continue_final=True),
            Chat(turns, add_generation_prompt=False),
        )
    ]
    half = "<|user|>Hello<|assistant|>Well "
    assert shown == [f"{half}<|assistant|>", f"{half}<|assistant|>", half, half]


def test_tools_need_a_template_that_shows_them(tiny_tokenizer):
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(RequestError, match=r"^this model's chat template takes no tools; remove them"):
        encode(tiny_tokenizer, Chat(chat("a"), tools))
    able = copy.deepcopy(tiny_tokenizer)
    able.chat_template = {"default": tiny_tokenizer.chat_template, "tool_use": "{{ tools | tojson }}"}
    assert able.decode(encode(able, Chat(chat("a"), tools))) == json.dumps(tools)
    assert able.decode(encode(able, chat("a"))) == "<|user|>a<|assistant|>"


def test_a_chat_survives_the_wire():
    wish = Chat([{"role": "user", "content": "\ud800", "n": [1, None]}], [{"type": "function"}], True, False)
    assert wire.unpack(wire.pack("submit", 1, wish)[wire.HEADER :]) == ["submit", 1, wish]


def test_tokens_around_calls_are_text_and_other_special_ones_are_not(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["<tool_call>", "<|other|>"], special_tokens=True)
    tokenizer.add_tokens(["</tool_call>"])
    text = "漢<|other|> a<tool_call>b </tool_call><|other|>c"
    tokens = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    kept = kept_tokens(tokenizer)
    assert list(kept.values()) == ["<tool_call>"]
    stream = TextStream(tokenizer, (), kept)
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.flush() == text.replace("<|other|>", "")
    stopped = TextStream(tokenizer, ("l>b",), kept)
    assert "".join(stopped.push(token) for token in tokens) == "漢 a<tool_cal"
    assert kept_tokens(tiny_tokenizer) == {}


@given(
    text=st.text(st.sampled_from("ab漢🙂 "), max_size=60),
    stop=st.lists(st.text(st.sampled_from("ab漢🙂 "), min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_text_ends_before_the_first_stop_string_wherever_tokens_are_cut(tiny_tokenizer, text, stop):
    stream, pieces = TextStream(tiny_tokenizer, stop), []
    for token in tiny_tokenizer(text).input_ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.flush())
    ends = [place for place in (text.find(one) for one in stop) if place >= 0]
    # Of stop strings that overlap, the one that is complete first counts.
    complete = min((text.find(one) + len(one) for one in stop if one in text), default=None)
    joined = "".join(pieces)
    assert stream.stopped == bool(ends)
    if complete is None:
        assert joined == text
    else:
        assert text.startswith(joined)
        assert not any(one in joined for one in stop)
        assert len(joined) < complete


def test_what_may_become_a_stop_string_is_held_back(tiny_tokenizer):
    stream = TextStream(tiny_tokenizer, ("STOP",))
    assert [stream.push(tiny_tokenizer(letter).input_ids[0]) for letter in "aSTxSTOPb"] == [
        "a", "", "", "STx", "", "", "", "", ""
    ]  # fmt: skip
    assert (stream.stopped, stream.flush()) == (True, "")
    unfinished = TextStream(tiny_tokenizer, ("STOP",))
    assert [unfinished.push(tiny_tokenizer(letter).input_ids[0]) for letter in "aST"] == ["a", "", ""]
    assert (unfinished.flush(), unfinished.stopped) == ("ST", False)


def test_what_ends_an_answer(tiny_folder, tmp_path):
    tokenizer = load_tokenizer(tiny_folder)
    own = tokenizer.eos_token_id
    assert end_tokens(tmp_path, tokenizer) == (own,)
    for listed, ends in [([7, own], {7, own}), (9, {9, own}), (None, {own})]:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
        assert end_tokens(tmp_path, tokenizer) == tuple(sorted(ends))


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(
        MissingError, match=rf"^{tmp_path}: the model has no tokenizer; apply a model that carries one$"
    ):
        load_tokenizer(tmp_path)
