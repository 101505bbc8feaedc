"""Windows: equal, disjoint, in order, and as many as were asked for or a clear refusal."""

from __future__ import annotations

from typing import ClassVar

import pytest

from optkit.builtin.texts import PythonReference
from optkit.datasets import TextDataset
from optkit.errors import RecipeError
from optkit.evaluate import every_window, held_out, paragraphs, sequences, windows


class Words(TextDataset):
    """Documents of some words each."""

    documents: ClassVar[int] = 12

    def texts(self):
        for index in range(self.documents):
            yield f"  Document {index} says hello to the world.\n"


def test_windows_are_the_text_cut_from_its_start(tiny_tokenizer):
    found = windows(tiny_tokenizer, Words(), 200, 64)
    assert [len(window) for window in found] == [64, 64, 64]
    joined = tiny_tokenizer.decode([token for window in found for token in window])
    assert joined.startswith("Document 0 says hello to the world.\n\nDocument 1 says hello")
    assert windows(tiny_tokenizer, Words(), 200, 64) == found


def test_fewer_tokens_are_the_start_of_more(tiny_tokenizer):
    assert windows(tiny_tokenizer, Words(), 256, 64)[:2] == windows(tiny_tokenizer, Words(), 128, 64)


def test_a_window_is_never_longer_than_all_the_tokens(tiny_tokenizer):
    [window] = windows(tiny_tokenizer, Words(), 40, 512)
    assert len(window) == 40


def test_a_tokenizer_that_begins_with_bos_begins_every_window_so(tiny_tokenizer):
    import copy

    from tokenizers.processors import TemplateProcessing

    greeting = copy.deepcopy(tiny_tokenizer)
    bos = greeting.bos_token_id
    greeting.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    plain, found = windows(tiny_tokenizer, Words(), 128, 32), windows(greeting, Words(), 128, 32)
    assert all(len(window) == 32 and window[0] == bos for window in found)
    # Nothing of the text is lost to it: 31 tokens in each window, in order.
    texts = [token for window in found for token in window[1:]]
    assert texts == [token for window in plain for token in window][: 4 * 31]


def test_too_little_text_is_refused_with_how_much_there_is(tiny_tokenizer):
    total = sum(len(tiny_tokenizer(text.strip() + "\n\n")["input_ids"]) for text in Words().texts())
    with pytest.raises(RecipeError) as raised:
        windows(tiny_tokenizer, Words(), 64_000, 64)
    assert str(raised.value) == (
        f"the dataset has {total // 64} windows of 64 tokens, 64000 tokens need 1000; "
        "lower the number of tokens or choose a longer dataset"
    )


def test_a_window_that_predicts_nothing_is_refused(tiny_tokenizer):
    with pytest.raises(RecipeError, match="needs more tokens, found 1"):
        windows(tiny_tokenizer, Words(), 100, 1)


def test_the_reference_text_of_python_is_long_enough_to_evaluate_on(tiny_tokenizer):
    assert len(windows(tiny_tokenizer, PythonReference(), 16_384, 512)) == 32


class Pages(TextDataset):
    """Documents of paragraphs."""

    def texts(self):
        yield "One two.\n\n  Three.  \n\n\n\n"
        yield "Four five six seven.\nEight."


def test_sequences_are_paragraphs_of_their_own_length(tiny_tokenizer):
    ids = [tuple(tiny_tokenizer(text)["input_ids"]) for text in ("One two.", "Three.", "Four five six seven.\nEight.")]
    assert list(paragraphs(Pages())) == ["One two.", "Three.", "Four five six seven.\nEight."]
    total = sum(map(len, ids))
    assert sequences(tiny_tokenizer, Pages(), total, 512) == ids
    assert sequences(tiny_tokenizer, Pages(), total - 1, 512) == ids[:2], "not more than there may be, and none cut"
    cut = [one[:5] for one in ids]
    assert sequences(tiny_tokenizer, Pages(), sum(map(len, cut)), 5) == cut


def test_sequences_are_prepared_before_they_are_tokens(tiny_tokenizer):
    wanted = tuple(tiny_tokenizer("THREE.")["input_ids"])
    assert sequences(tiny_tokenizer, Pages(), 30, 512, str.upper)[1] == wanted


def test_too_few_paragraphs_are_refused_with_how_much_there_is(tiny_tokenizer):
    total = sum(len(tiny_tokenizer(text)["input_ids"]) for text in paragraphs(Pages()))
    with pytest.raises(RecipeError, match=rf"the dataset has {total} tokens of text, found {total + 1}; lower"):
        sequences(tiny_tokenizer, Pages(), total + 1, 512)


def test_texts_to_learn_from_share_no_run_with_those_to_judge_by():
    judged = [tuple(range(100, 164)), tuple(range(300, 310))]
    touching = (*range(5), *range(120, 152), 7)  # 32 of the first in a row
    apart = (*range(5), *range(120, 151), 7)  # 31
    fresh = [tuple(range(start, start + 40)) for start in range(1000, 2000, 100)]
    assert held_out([touching, judged[1], apart], judged, 1) == [apart]
    assert held_out(fresh, judged, 5) == fresh[::2]
    assert held_out(fresh, [], 10) == fresh
    with pytest.raises(RecipeError) as raised:
        held_out([touching, judged[1], apart], judged, 2)
    assert str(raised.value) == (
        "the calibration dataset has 1 samples of this length, besides 2 that share text with the evaluation's, found 2"
        "; lower calibration.samples or calibration.sequence_length, or choose a longer dataset"
    )


def test_every_window_is_what_windows_cuts(tiny_tokenizer):
    every = list(every_window(tiny_tokenizer, Words(), 64))
    assert every[:3] == windows(tiny_tokenizer, Words(), 192, 64)
    assert {len(window) for window in every} == {64}
