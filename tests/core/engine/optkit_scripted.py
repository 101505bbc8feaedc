"""A plugin with backends that need no runtime, and that can go wrong.

`scripted` is a language model whose next token is a checksum of the sequence, `scripted_tensors` doubles and sums rows
of three numbers, and `scripted_encoder` gives each token its id, its place and the sum of its sequence.
"""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path

import numpy as np

from optkit.backends import Backend, TensorSession, TokenSession
from optkit.hookspecs import hookimpl
from optkit.steps import Caps, Limits, StepPlan, StepResult, TensorSpec

VOCABULARY = 320
ABORT, HANG, RAISE, LARGE = 310, 311, 312, 313
"""Tokens, or numbers of a row, and what they do to the step that computes the prompt, or the rows, they stand in."""


def go_wrong(numbers):
    if ABORT in numbers:
        os.abort()
    if HANG in numbers:
        time.sleep(3600)
    if RAISE in numbers:
        raise RuntimeError("this token cannot be computed")


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


class ScriptedTensors(Scripted):
    def open(self, runtime: Path, weights: Path, limits: Limits):
        return ScriptedRows()


class ScriptedEncoder(Scripted):
    def open(self, runtime: Path, weights: Path, limits: Limits):
        return ScriptedTexts()


class ScriptedRows(TensorSession):
    def __init__(self) -> None:
        self.inputs = {"x": TensorSpec("float32", (None, 3))}
        self.outputs = {"y": TensorSpec("float32", (None, 3)), "sum": TensorSpec("float32", (None,))}

    def run(self, inputs):
        x = inputs["x"]
        go_wrong(x)
        y = np.zeros((len(x), 1 << 25), np.float32) if LARGE in x else 2 * x  # 128 MiB, more than a message can be
        return {"y": y, "sum": x.sum(axis=1)}

    def close(self):
        pass


class ScriptedTexts(TensorSession):
    def __init__(self) -> None:
        self.inputs = dict.fromkeys(("input_ids", "attention_mask"), TensorSpec("int64", (None, None)))
        self.outputs = {"last_hidden_state": TensorSpec("float32", (None, None, 3))}

    def run(self, inputs):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        go_wrong(ids)
        places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        sums = np.broadcast_to((ids * mask).sum(axis=1, keepdims=True), ids.shape)
        return {"last_hidden_state": np.stack([ids, places, sums], axis=2).astype(np.float32)}

    def close(self):
        pass


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
            go_wrong(prompt)
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
    return {"scripted": Scripted, "scripted_tensors": ScriptedTensors, "scripted_encoder": ScriptedEncoder}
