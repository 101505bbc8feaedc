"""From a dataset's texts to the tokens that models are judged on: windows, or the sequences that encoders read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from optkit.datasets import TextDataset
from optkit.errors import RecipeError

__all__ = ["every_sequence", "every_window", "held_out", "paragraphs", "sequences", "windows"]

_SHARED_RUN = 32


def windows(tokenizer: Any, dataset: TextDataset, tokens: int, context_length: int) -> list[tuple[int, ...]]:
    """Cut a dataset into windows of equal length that do not overlap, from its start, always the same ones.

    The texts are joined by an empty line, as perplexity on WikiText is usually measured
    (https://huggingface.co/docs/transformers/perplexity). Where the tokenizer begins its prompts with a token of its
    own (BOS), each window begins with it too: models trained that way predict badly without it.

    Args:
        tokenizer: of transformers.
        dataset: the text.
        tokens: most tokens in all; the rest of a division by `context_length` is left out.
        context_length: tokens of one window. If it is more than `tokens`, there is one window of `tokens`.

    Raises:
        RecipeError: the dataset has less text, or a window would be too short to predict anything.
    """
    length = min(context_length, tokens)
    count = tokens // length
    found = list(islice(every_window(tokenizer, dataset, length), count))
    if len(found) == count:
        return found
    raise RecipeError(
        f"the dataset has {len(found)} windows of {length} tokens, {tokens} tokens need {count}",
        remedy="lower the number of tokens or choose a longer dataset",
    )


def every_window(tokenizer: Any, dataset: TextDataset, length: int) -> Iterator[tuple[int, ...]]:
    """All windows of `length` tokens of a dataset, as `windows` cuts them; a shorter rest at the end is left out.

    Raises:
        RecipeError: a window would be too short to predict anything.
    """
    prefix = _prefix(tokenizer)
    fresh = length - len(prefix)
    if fresh < 2:
        raise RecipeError("a window of text needs more tokens", found=length, remedy="raise tokens or context_length")
    rest: list[int] = []
    for text in dataset.texts():
        # verbose=False: the tokenizer would warn of a text longer than the model's context, and it is cut right here.
        rest += tokenizer(text.strip() + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        for start in range(0, len(rest) - fresh + 1, fresh):
            yield prefix + tuple(rest[start : start + fresh])
        rest = rest[len(rest) // fresh * fresh :]


def every_sequence(
    tokenizer: Any, dataset: TextDataset, longest: int, prepare: Callable[[str], str] = str
) -> Iterator[tuple[int, ...]]:
    """All paragraphs of a dataset as `sequences` reads them; those without tokens are left out."""
    for text in paragraphs(dataset):
        cut = tokenizer(prepare(text), truncation=True, max_length=longest, verbose=False)
        if cut["input_ids"]:
            yield tuple(cut["input_ids"])


def held_out(
    candidates: Iterable[tuple[int, ...]], judged: Iterable[tuple[int, ...]], samples: int
) -> list[tuple[int, ...]]:
    """Texts to learn from that share nothing with those that a model is judged on, at even distances.

    Args:
        candidates: token ids, in the dataset's order.
        judged: token ids of the evaluation. A candidate that equals one, or has 32 tokens in a row from one, is left
            out.
        samples: how many.

    Raises:
        RecipeError: fewer are left.
    """
    known = set(judged)
    runs = {run for text in known for run in _runs(text)}
    left, used = [], 0
    for text in candidates:
        if text in known or any(run in runs for run in _runs(text)):
            used += 1
        else:
            left.append(text)
    if len(left) < samples:
        shared = f", besides {used} that share text with the evaluation's" if used else ""
        raise RecipeError(
            f"the calibration dataset has {len(left)} samples of this length{shared}",
            found=samples,
            remedy="lower calibration.samples or calibration.sequence_length, or choose a longer dataset",
        )
    return [left[index * len(left) // samples] for index in range(samples)]


def _runs(text: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return (text[start : start + _SHARED_RUN] for start in range(len(text) - _SHARED_RUN + 1))


def paragraphs(dataset: TextDataset) -> Iterator[str]:
    """The paragraphs of a dataset, which empty lines part, in its order."""
    for text in dataset.texts():
        yield from (paragraph for paragraph in (part.strip() for part in text.split("\n\n")) if paragraph)


def sequences(
    tokenizer: Any, dataset: TextDataset, tokens: int, longest: int, prepare: Callable[[str], str] = str
) -> list[tuple[int, ...]]:
    """The first paragraphs of a dataset, each a sequence of its own length, always the same ones.

    Args:
        tokenizer: of transformers; the tokens that it adds to a text count too.
        dataset: the text.
        tokens: most tokens in all.
        longest: where a paragraph is cut.
        prepare: done to each before its tokens.

    Raises:
        RecipeError: the dataset has less text.
    """
    found: list[tuple[int, ...]] = []
    total = 0
    for ids in every_sequence(tokenizer, dataset, min(longest, tokens), prepare):
        total += len(ids)
        if total > tokens:
            return found
        found.append(ids)
        if total == tokens:
            return found
    raise RecipeError(
        f"the dataset has {total} tokens of text",
        found=tokens,
        remedy="lower evaluation.tokens or choose a longer dataset",
    )


def _prefix(tokenizer: Any) -> tuple[int, ...]:
    bos = tokenizer.bos_token_id
    begins = bos is not None and tokenizer("", verbose=False)["input_ids"][:1] == [bos]
    return (bos,) if begins else ()
