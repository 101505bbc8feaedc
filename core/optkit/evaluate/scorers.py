"""What gives logits for a window of tokens: a transformers module, an open session, or the record of either."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from optkit.backends import EngineSession, TokenSession
from optkit.errors import MachineError
from optkit.steps import Row, StepPlan

__all__ = ["EngineScorer", "ModelScorer", "Recorded", "Scorer", "SessionScorer"]

Floats = npt.NDArray[np.float32]


class Scorer(Protocol):
    """A causal language model that can be asked for all its predictions."""

    def logits(self, window: tuple[int, ...]) -> Floats:
        """`[len(window), vocabulary]` float32; position t predicts token t + 1."""
        ...


class ModelScorer:
    """A causal language model of transformers, the whole window in one forward pass."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def logits(self, window: tuple[int, ...]) -> Floats:
        import torch

        with torch.inference_mode():
            output = self._module(input_ids=torch.tensor([window]), use_cache=False).logits[0]
            logits: Floats = output.float().numpy()
        return logits


class SessionScorer:
    """An open session, each window as a sequence of its own, alone in its steps.

    Args:
        session: stays open; nothing else may run in it meanwhile, because its first blocks are used.
        step_tokens: new tokens in one step at most, which bounds the memory that the runtime needs for logits.
    """

    def __init__(self, session: TokenSession, step_tokens: int = 512) -> None:
        self._session = session
        self._step_tokens = step_tokens
        self._sequence = 0

    def logits(self, window: tuple[int, ...]) -> Floats:
        caps = self._session.caps
        blocks = tuple(range(-(-len(window) // caps.block_size)))
        if len(blocks) > (1 if caps.kv == "slot" else caps.blocks):
            raise MachineError(
                f"a window of {len(window)} tokens does not fit into the session's KV cache",
                remedy="lower evaluation.context_length or raise max_length in the recipe",
            )
        self._sequence += 1
        parts: list[Floats] = []
        for start in range(0, len(window), self._step_tokens):
            row = Row(self._sequence, window[start : start + self._step_tokens], start, blocks, "all")
            parts += self._session.execute(StepPlan((row,))).logits
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


class EngineScorer:
    """An open session of a runtime that batches by itself, asked for whole windows.

    Args:
        session: stays open; nothing else may run in it meanwhile.
    """

    def __init__(self, session: EngineSession) -> None:
        self._session = session

    def logits(self, window: tuple[int, ...]) -> Floats:
        return self._session.scores(window)


class Recorded:
    """A scorer asked once for each window; its answers are kept on disk, so that many candidates are judged by them.

    Args:
        scorer: answers for windows that are not recorded yet.
        directory: of this run and this model alone; 4 bytes per token and vocabulary entry.
    """

    def __init__(self, scorer: Scorer, directory: Path) -> None:
        self._scorer = scorer
        self._directory = directory

    def logits(self, window: tuple[int, ...]) -> Floats:
        name = hashlib.sha256(np.array(window, np.int64).tobytes()).hexdigest()
        file = self._directory / f"{name}.npy"
        if not file.exists():
            self._write(file, self._scorer.logits(window))
        # Mapped and not read: metrics look at a few positions at a time.
        logits: Floats = np.load(file, mmap_mode="r")
        return logits

    def _write(self, file: Path, logits: Floats) -> None:
        part = file.with_suffix(".part")
        try:
            with part.open("wb") as stream:
                np.save(stream, np.asarray(logits, np.float32), allow_pickle=False)
            part.rename(file)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise MachineError(
                f"the baseline's logits cannot be kept ({error.strerror})",
                where=str(self._directory),
                remedy="free some space or lower evaluation.tokens",
            ) from error
