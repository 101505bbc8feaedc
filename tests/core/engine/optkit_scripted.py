"""A plugin with a backend that needs no runtime: the next token is a checksum of the sequence. It can also go wrong."""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path

import numpy as np

from optkit.backends import Backend, TokenSession
from optkit.hookspecs import hookimpl
from optkit.steps import Caps, Limits, StepPlan, StepResult

VOCABULARY = 320
ABORT, HANG, RAISE = 310, 311, 312
"""Tokens, and what they do to the step that computes the prompt they stand in."""


class Scripted(Backend):
    seconds: float = 0.0
    """Of each step."""

    def unavailable(self):
        return None

    def lowering(self, tags):
        return {}

    def compile(self, model, directory):
        raise NotImplementedError

    def open(self, runtime: Path, weights: Path, limits: Limits):
        return ScriptedSession(limits, self.seconds)


class ScriptedSession(TokenSession):
    def __init__(self, limits: Limits, seconds: float) -> None:
        length, slots = limits.max_length, limits.max_batch_size
        self.caps = Caps("slot", length, slots, slots, mixed=True, vocab_size=VOCABULARY, max_length=length)
        self.seconds, self.kept = seconds, {}

    def execute(self, plan: StepPlan) -> StepResult:
        time.sleep(self.seconds)
        logits = []
        for row in plan.rows:
            tokens = row.tokens[: len(row.tokens) - row.padding]
            prompt = tokens if row.computed == 0 else ()
            if ABORT in prompt:
                os.abort()
            if HANG in prompt:
                time.sleep(3600)
            if RAISE in prompt:
                raise RuntimeError("this token cannot be computed")
            (slot,) = row.blocks
            kept = self.kept.get(slot, ())[: row.computed] if row.computed else ()
            assert len(kept) == row.computed, "the engine lost count of the KV cache"
            self.kept[slot] = whole = (*kept, *tokens)
            first = {"none": len(whole), "last": len(whole) - 1, "all": row.computed}[row.logits]
            rows = np.zeros((len(whole) - first, VOCABULARY), dtype=np.float32)
            for place, end in enumerate(range(first + 1, len(whole) + 1)):
                rows[place, self.following(whole[:end])] = 9.0
            logits.append(rows)
        return StepResult(tuple(logits))

    def following(self, tokens):
        # Bytes of the tokenizer only: neither special tokens nor those that go wrong.
        return 6 + zlib.crc32(repr(tokens).encode()) % 200

    def read_blocks(self, blocks):
        return np.array([0] * len(blocks))

    def write_blocks(self, blocks, contents):
        raise NotImplementedError

    def copy_blocks(self, pairs):
        for source, target in pairs:
            self.kept[target] = self.kept[source]

    def profile(self, plan):
        return []

    def close(self):
        self.kept.clear()


@hookimpl
def register_backends():
    return {"scripted": Scripted}
