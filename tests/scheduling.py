"""Texts given to a session with a paged KV cache in steps of any shape."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from optkit.steps import Row, StepPlan


def in_any_steps(data, session, texts, blocks):
    """Of every text, places and their logits `[places, vocabulary]`, of chunks, rows and blocks of 16 tokens as drawn.

    Which of a chunk's logits are wanted is drawn too.

    Args:
        data: of hypothesis, which draws.
        session: runs the steps.
        texts: token ids, one sequence each.
        blocks: how many there are.
    """
    free = list(data.draw(st.permutations(range(blocks))))
    held: list[tuple[int, ...]] = [() for _ in texts]
    done = [0] * len(texts)
    found: list[list[np.ndarray]] = [[] for _ in texts]
    places: list[list[int]] = [[] for _ in texts]
    while any(count < len(text) for count, text in zip(done, texts, strict=True)):
        rows = []
        for i in data.draw(st.permutations(range(len(texts)))):
            take = min(len(texts[i]) - done[i], data.draw(st.sampled_from([90, 1, 5, 16, 0])))
            if take:
                missing = -(-(done[i] + take) // 16) - len(held[i])
                held[i] += tuple(free.pop() for _ in range(missing))
                wanted = data.draw(st.sampled_from(["all", "last", "none"]))
                rows.append(Row(i, texts[i][done[i] : done[i] + take], done[i], held[i], wanted))
        if rows:
            for row, logits in zip(rows, session.execute(StepPlan(tuple(rows))).logits, strict=True):
                found[row.sequence].append(logits)
                places[row.sequence] += [row.computed + place for place in row.wanted]
                done[row.sequence] += len(row.tokens)
    return [(where, np.concatenate(logits)) for where, logits in zip(places, found, strict=True)]
