"""A transformers module as a session: slots of KV cache, ragged rows in one padded batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from optkit.backends import TokenSession
from optkit.errors import RecipeError
from optkit.quantized import quantized_layers, replace_module
from optkit.steps import Caps, KernelTime, Limits, StepPlan, StepResult
from optkit.weights import load_folder

__all__ = ["TorchSession"]


class TorchSession(TokenSession):
    """Runs the model of a weights folder; see `optkit.backends.TokenSession`."""

    def __init__(self, weights: Path, limits: Limits) -> None:
        module: Any = load_folder(weights).module
        self._module = module
        config = module.config
        window = getattr(config, "sliding_window", None)
        if window and window < limits.max_length and getattr(config, "use_sliding_window", True):
            raise RecipeError(
                f"the model attends to a window of {window} tokens, the torch backend only to whole sequences",
                found=limits.max_length,
                remedy=f"set max_length to {window} or less",
            )
        for name, layer in list(quantized_layers(self._module)):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            dense.weight = nn.Parameter(layer.dequantized(), requires_grad=False)
            if layer.bias is not None:
                dense.bias = nn.Parameter(layer.bias, requires_grad=False)
            replace_module(self._module, name, dense)
        self._layers = [_SlotLayer(limits) for _ in range(config.num_hidden_layers)]
        self.caps = Caps(
            kv="slot",
            block_size=limits.max_length,
            blocks=limits.max_batch_size,
            max_batch_size=limits.max_batch_size,
            mixed=True,
            vocab_size=config.vocab_size,
        )

    def execute(self, plan: StepPlan) -> StepResult:
        with torch.inference_mode():
            return self._execute(plan)

    def _execute(self, plan: StepPlan) -> StepResult:
        rows = plan.rows
        width, total = max(len(row.tokens) for row in rows), max(row.computed + len(row.tokens) for row in rows)
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            tokens[index, : len(row.tokens)] = torch.tensor(row.tokens)
        slots = torch.tensor([row.blocks[0] for row in rows])
        counts = torch.tensor([len(row.tokens) for row in rows])
        positions = torch.tensor([row.computed for row in rows])[:, None] + torch.arange(width)
        real = torch.arange(width) < counts[:, None]
        for layer in self._layers:
            layer.start(slots, positions, real, total)
        # Padding queries get positions past their row's end: they see only what is there, and nobody reads them.
        mask = (torch.arange(total) <= positions[:, :, None])[:, None]
        if all(row.logits == "all" for row in rows):
            kept = torch.arange(width)
        else:
            kept = torch.tensor(
                sorted({p for row in rows for p in _wanted(row.logits, len(row.tokens))}), dtype=torch.long
            )
        logits = self._module(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions.clamp(max=self.caps.block_size - 1),
            past_key_values=Cache(layers=list(self._layers)),
            use_cache=True,
            logits_to_keep=kept if len(kept) else 1,
        ).logits.float()
        column = {int(position): index for index, position in enumerate(kept)}
        return StepResult(
            tuple(
                logits[index, [column[p] for p in _wanted(row.logits, len(row.tokens))]].numpy()
                for index, row in enumerate(rows)
            )
        )

    def profile(self, plan: StepPlan) -> list[KernelTime]:
        self.execute(plan)  # warm up; to run a row again writes the same keys and values
        times: list[KernelTime] = []
        hooks = []
        started: dict[nn.Module, float] = {}
        for name, layer in self._module.named_modules():
            if next(layer.children(), None) is None:
                hooks.append(layer.register_forward_pre_hook(lambda m, _: started.update({m: time.perf_counter()})))
                hooks.append(layer.register_forward_hook(_recorder(name, started, times)))
        try:
            begin = time.perf_counter()
            self.execute(plan)
            whole = time.perf_counter() - begin
        finally:
            for hook in hooks:
                hook.remove()
        rest = whole - sum(entry.seconds for entry in times)
        return [*times, KernelTime("attention, residuals and dispatch", "eager", max(rest, 0.0))]

    def close(self) -> None:
        self._module = None
        self._layers = []


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers ships no types
    """One layer's keys and values, `[slots, heads, max_length, head_dim]`, written at each row's own positions."""

    is_sliding = False

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._limits = limits

    def start(self, slots: Tensor, positions: Tensor, real: Tensor, total: int) -> None:
        """Set where the next `update` writes: `[rows]` slots, `[rows, width]` positions and which of them are real."""
        self._slots, self._total, self._real = slots, total, real
        self._slot_of, self._position_of = slots[:, None].expand_as(positions)[real], positions[real]
        first = int(slots[0])
        ascending = torch.equal(slots, torch.arange(first, first + len(slots)))
        # Neighbouring slots are read as a view; others are gathered, which copies.
        self._window = slice(first, first + len(slots)) if ascending else slots

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        _, heads, _, head_dim = key_states.shape
        shape = (self._limits.max_batch_size, heads, self._limits.max_length, head_dim)
        # Zeros and not empty memory: a masked NaN would still poison the weighted sum.
        self.keys = torch.zeros(shape, dtype=key_states.dtype)
        self.values = torch.zeros(shape[:3] + value_states.shape[3:], dtype=value_states.dtype)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        self.keys[self._slot_of, :, self._position_of] = key_states.transpose(1, 2)[self._real]
        self.values[self._slot_of, :, self._position_of] = value_states.transpose(1, 2)[self._real]
        return self.keys[self._window][:, :, : self._total], self.values[self._window][:, :, : self._total]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._total, 0

    def get_seq_length(self) -> int:
        return self._total

    def get_max_length(self) -> int:
        return self._limits.max_length


def _wanted(logits: str, count: int) -> list[int]:
    return {"none": [], "last": [count - 1], "all": list(range(count))}[logits]


def _recorder(name: str, started: dict[nn.Module, float], times: list[KernelTime]) -> Any:
    def record(module: nn.Module, _inputs: Any, _output: Any) -> None:
        size = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
        # An embedding reads only the rows that it looks up.
        size = 0 if isinstance(module, nn.Embedding) else size
        times.append(KernelTime(name, type(module).__name__, time.perf_counter() - started.pop(module), size))

    return record
