"""What the contenders share: they run when they are told to, in a process each. Needs numpy alone.

Usage of every contender: python CONTENDER.py SEQUENCES ARGUMENTS...

SEQUENCES is a JSON list of lists of token ids. A contender loads its model, warms up, and prints a line of JSON about
itself. Then it reads lines: `run` makes it embed everything and print the seconds that took, `save FILE` writes the
last embeddings, `[sequences, hidden]` float32. It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["BATCH_SIZE", "Floats", "Integers", "padded_batches", "pooled", "sequences", "sorted_batches", "take_turns"]

BATCH_SIZE = 32
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


def sequences() -> list[tuple[int, ...]]:
    """What to embed."""
    return [tuple(ids) for ids in json.loads(Path(sys.argv[1]).read_text())]


def take_turns(encode: Callable[[], Floats], about: dict[str, Any]) -> None:
    """Answer the lines on stdin, until they end.

    Args:
        encode: embeds all sequences, in their order; every row has length 1.
        about: the contender's versions and settings.
    """
    # Libraries greet on stdout; the answers keep it for themselves.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    found = encode()
    print(json.dumps(about), file=answers)
    for line in sys.stdin:
        command, _, file = line.strip().partition(" ")
        if command == "save":
            np.save(file, found)
            print(json.dumps({"saved": file}), file=answers)
        else:
            begin = time.perf_counter()
            found = encode()
            print(json.dumps({"seconds": time.perf_counter() - begin}), file=answers)


def sorted_batches(
    rows: Sequence[tuple[int, ...]], run: Callable[[Integers, Integers], Floats], most_tokens: int | None = None
) -> Floats:
    """Embeddings by the mean over tokens, from batches of 32 sorted by length, as sentence-transformers makes them.

    Args:
        rows: token ids.
        run: the model, from token ids and mask `[batch, tokens]` to `[batch, tokens, hidden]`.
        most_tokens: of a batch, padding included, in the place of 32 sequences.
    """
    embedded: dict[int, Floats] = {}
    for batch, ids, mask in padded_batches(rows, most_tokens):
        embedded |= zip(batch, pooled(run(ids, mask), mask), strict=True)
    return np.stack([embedded[index] for index in range(len(rows))])


def padded_batches(
    rows: Sequence[tuple[int, ...]], most_tokens: int | None = None
) -> Iterator[tuple[list[int], Integers, Integers]]:
    """Batches of 32, the longest rows first: which rows, and their token ids and mask, `[batch, tokens]`.

    Args:
        rows: token ids.
        most_tokens: of a batch, padding included, in the place of 32 sequences.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
    while order:
        longest = len(rows[order[0]])
        size = BATCH_SIZE if most_tokens is None else max(1, most_tokens // longest)
        batch, order = order[:size], order[size:]
        ids = np.zeros((len(batch), longest), np.int64)
        mask = np.zeros_like(ids)
        for place, index in enumerate(batch):
            ids[place, : len(rows[index])], mask[place, : len(rows[index])] = rows[index], 1
        yield batch, ids, mask


def pooled(hidden: Floats, mask: Integers) -> Floats:
    """The mean over tokens, of length 1: `[batch, hidden]`."""
    means = np.einsum("bth,bt->bh", hidden, mask.astype(np.float32)) / mask.sum(1, keepdims=True)
    found: Floats = (means / np.linalg.norm(means, axis=1, keepdims=True)).astype(np.float32)
    return found
