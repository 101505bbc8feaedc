"""Text that comes token by token is the text that the tokens are."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.engine.text import Detokenizer, encode, end_tokens, load_tokenizer
from optkit.errors import MissingError


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
    chat = encode(tiny_tokenizer, "Hello", chat=True)
    assert tiny_tokenizer.decode(chat) == "<|user|>Hello<|assistant|>"
    assert encode(tiny_tokenizer, "Hello", chat=False) == tuple(tiny_tokenizer("Hello").input_ids)


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
