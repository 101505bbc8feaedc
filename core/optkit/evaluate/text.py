"""From a dataset's texts to the tokens that models are judged on: windows, or the sequences that encoders read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from optkit.datasets import Dataset
from optkit.errors import RecipeError

__all__ = ["paragraphs", "sequences", "windows"]


def windows(tokenizer: Any, dataset: Dataset, tokens: int, context_length: int) -> list[tuple[int, ...]]:
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
    prefix = _prefix(tokenizer)
    fresh = length - len(prefix)
    if fresh < 2:
        raise RecipeError("a window of text needs more tokens", found=length, remedy="raise tokens or context_length")
    count = tokens // length
    stream: list[int] = []
    for text in dataset.texts():
        # verbose=False: the tokenizer would warn of a text longer than the model's context, and it is cut right here.
        stream += tokenizer(text.strip() + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(stream) >= count * fresh:
            return [prefix + tuple(stream[start : start + fresh]) for start in range(0, count * fresh, fresh)]
    raise RecipeError(
        f"the dataset has {len(stream)} tokens of text, {count} windows of {length} need {count * fresh}",
        remedy="lower the number of tokens or choose a longer dataset",
    )


def paragraphs(dataset: Dataset) -> Iterator[str]:
    """The paragraphs of a dataset, which empty lines part, in its order."""
    for text in dataset.texts():
        yield from (paragraph for paragraph in (part.strip() for part in text.split("\n\n")) if paragraph)


def sequences(
    tokenizer: Any, dataset: Dataset, tokens: int, longest: int, prepare: Callable[[str], str] = str
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
    for text in paragraphs(dataset):
        cut = tokenizer(prepare(text), truncation=True, max_length=min(longest, tokens), verbose=False)
        ids = tuple(cut["input_ids"])
        total += len(ids)
        if total > tokens:
            return found
        if ids:
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
