"""Texts given to a session with a paged KV cache in steps of any shape."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from optkit.steps import Row, StepPlan


def in_any_steps(data, session, texts, blocks):
    """Logits `[tokens, vocabulary]` of every text, of chunks, rows and blocks of 16 tokens in an order that is drawn.

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
    while any(count < len(text) for count, text in zip(done, texts, strict=True)):
        rows = []
        for i in data.draw(st.permutations(range(len(texts)))):
            take = min(len(texts[i]) - done[i], data.draw(st.sampled_from([90, 1, 5, 16, 0])))
            if take:
                missing = -(-(done[i] + take) // 16) - len(held[i])
                held[i] += tuple(free.pop() for _ in range(missing))
                rows.append(Row(i, texts[i][done[i] : done[i] + take], done[i], held[i], "all"))
        if rows:
            for row, logits in zip(rows, session.execute(StepPlan(tuple(rows))).logits, strict=True):
                found[row.sequence].append(logits)
                done[row.sequence] += len(row.tokens)
    return [np.concatenate(logits) for logits in found]
