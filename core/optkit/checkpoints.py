"""Where long work keeps what it has finished, so that it goes on there after it was killed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Checkpoint"]


class Checkpoint:
    """Named sets of tensors in a directory. Each is whole or absent, whenever the process dies.

    Args:
        directory: of this work alone, made when it is first needed; None keeps nothing.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory

    def within(self, name: str) -> Checkpoint:
        """A part with names of its own, for work in several stages."""
        return Checkpoint(None if self._directory is None else self._directory / name)

    def save(self, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
        """Keep tensors, and JSON-able facts beside them, under `name`, in the place of what was there."""
        if self._directory is None:
            return
        from safetensors.torch import save_file

        self._directory.mkdir(parents=True, exist_ok=True)
        part = self._directory / f"{name}.part"
        # Copies: safetensors refuses tensors that share memory, and here they may.
        save_file(
            {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()},
            part,
            {"facts": json.dumps(dict(facts or {}))},
        )
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(self._directory / f"{name}.safetensors")

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and facts under `name`, or None if there are none."""
        if self._directory is None:
            return None
        from safetensors import safe_open

        file = self._directory / f"{name}.safetensors"
        if not file.is_file():
            return None
        with safe_open(file, "pt") as stored:
            facts = json.loads(stored.metadata()["facts"])
            return {key: stored.get_tensor(key) for key in stored.keys()}, facts  # noqa: SIM118 - no mapping
