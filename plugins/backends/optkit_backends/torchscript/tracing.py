"""Traces models into archives, and checks that what was traced does not depend on the example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from optkit.errors import RecipeError
from optkit.kv import stop_rounding
from optkit.steps import Row
from optkit_backends.positional import Positional, TextEncoder, outputs_of, shallow_copy, text_example
from optkit_backends.torch.attention import kept, read
from optkit_backends.torch.dense import make_dense
from optkit_backends.torch.pool import BLOCK_SIZE, Pool
from optkit_backends.torch.probe import Paged, page
from optkit_backends.torchscript.files import ARCHIVE, DecoderFacts, TensorFacts, quiet
from optkit_backends.torchscript.steps import Launch

__all__ = ["compile_decoder", "compile_encoder", "compile_tensors"]

# Of the outputs for other sizes than the example's, relative to their norm.
_TOLERANCE = 1e-4


def compile_decoder(module: Any, directory: Path) -> None:
    """Write the archive of one step of a causal language model, and its facts.

    Args:
        module: of transformers. It stays as it is.
        directory: exists and is empty.

    Raises:
        RecipeError: its attention is none that can be paged, or something of it cannot be traced.
    """
    name, traced = type(module).__name__, shallow_copy(module)
    make_dense(traced)
    stop_rounding(traced)
    paged = page(traced, name)
    windows = list(dict.fromkeys(paged.windows))
    step = _Step(traced, paged, windows).eval()
    pool = Pool(paged.layers, blocks=8)
    linears = _linears_of(step, lambda: step(*_launch((2, 3), windows).tensors, *_cache(pool)))
    archive = _traced(step, (*_launch((2, 3), windows).tensors, *_cache(pool)), name)
    for sizes in ((1, 0), (0, 7), (3, 5)):
        given = _launch(sizes, windows).tensors
        _compare(step, archive, (*given, *_cache(pool)), name)
    archive.save(str(directory / ARCHIVE))
    layers = [
        (layer.heads, layer.key_dim, layer.value_dim, str(layer.dtype).removeprefix("torch.")) for layer in paged.layers
    ]
    DecoderFacts(torch.__version__, layers, windows, linears, module.config.vocab_size, paged.longest).write(directory)


def compile_encoder(module: Any, directory: Path) -> None:
    """Write the archive of a transformers encoder, and its facts.

    Inputs are `input_ids` and `attention_mask` `[batch, tokens]` int64, the output is `last_hidden_state`
    `[batch, tokens, hidden]` float32.

    Args:
        module: an encoder without a head. It stays as it is.
        directory: exists and is empty.

    Raises:
        RecipeError: something of it cannot be traced.
    """
    example, encoder = text_example(), TextEncoder(shallow_copy(module))
    dynamic = dict.fromkeys(example, (0, 1))
    _compile(encoder, type(module).__name__, example, ["last_hidden_state"], dynamic, directory)


def compile_tensors(
    module: nn.Module,
    example: Mapping[str, Tensor],
    directory: Path,
    *,
    dynamic: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Write the archive of a module that maps tensors to tensors, and its facts.

    Args:
        module: in evaluation mode. It returns a tensor, which becomes the output `output`, or a mapping or tuple of
            tensors. It stays as it is.
        example: what it can be called with, by name: these become the inputs, in this order.
        directory: exists and is empty.
        dynamic: the axes of each input whose size may change; by default the first, which is the batch.

    Raises:
        RecipeError: something of it cannot be traced.
    """
    with torch.inference_mode():
        outputs = list(outputs_of(module(**example)))
    if not outputs:
        raise RecipeError("gives no tensors", where=type(module).__name__, remedy="let it return a tensor, or several")
    sizes = dynamic or dict.fromkeys(example, (0,))
    _compile(shallow_copy(module), type(module).__name__, example, outputs, sizes, directory)


def _compile(
    module: nn.Module,
    name: str,
    example: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Sequence[int]],
    directory: Path,
) -> None:
    make_dense(module)
    module = Positional(module, tuple(example)).eval()
    archive = _traced(module, tuple(example.values()), name)
    larger = tuple(_repeated(tensor, dynamic[key]) for key, tensor in example.items())
    found = _compare(module, archive, larger, name)
    with torch.inference_mode():
        small = module(*example.values())
    archive.save(str(directory / ARCHIVE))
    TensorFacts(
        torch.__version__,
        {key: _described(tensor, [*dynamic[key]]) for key, tensor in example.items()},
        {
            key: _described(tensor, [axis for axis in range(tensor.dim()) if tensor.shape[axis] != other.shape[axis]])
            for key, tensor, other in zip(outputs, found, small, strict=True)
        },
    ).write(directory)


def _traced(module: nn.Module, example: tuple[Tensor, ...], name: str) -> Any:
    try:
        with torch.inference_mode(), quiet():
            traced = torch.jit.trace(module, example, check_trace=False)  # type: ignore[no-untyped-call]  # torch's own
            return torch.jit.freeze(traced)
    except Exception as error:  # whatever the module's own code raises where it meets what is traced
        reason = str(error).strip().partition("\n")[0]
        raise RecipeError(
            f"torch.jit cannot trace it ({reason})", where=name, remedy="choose another backend"
        ) from error


@torch.inference_mode()
def _compare(module: nn.Module, archive: Any, given: tuple[Tensor, ...], name: str) -> tuple[Tensor, ...]:
    """What the module gives for other sizes than those that were traced.

    Raises:
        RecipeError: the archive gives something else.
    """
    wanted: tuple[Tensor, ...] = module(*given)
    try:
        found = archive(*given)
    except RuntimeError as error:
        reason = str(error).strip().rpartition("\n")[2]
        raise _frozen(name, f"fails for other sizes: {reason}") from error
    for ours, theirs in zip(found, wanted, strict=True):
        if ours.shape != theirs.shape or (ours - theirs).norm() > _TOLERANCE * theirs.norm():
            raise _frozen(name, "gives something else for other sizes")
    return wanted


def _frozen(name: str, what: str) -> RecipeError:
    return RecipeError(
        f"what torch.jit traced {what}; some of its Python depends on sizes",
        where=name,
        remedy="choose another backend",
    )


def _repeated(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """Twice as long on some axes."""
    for axis in axes:
        tensor = torch.cat([tensor, tensor], axis)
    return tensor


def _described(tensor: Tensor, dynamic: Sequence[int]) -> tuple[str, list[int | None]]:
    shape = [None if axis in dynamic else size for axis, size in enumerate(tensor.shape)]
    return str(tensor.dtype).removeprefix("torch."), shape


def _launch(sizes: tuple[int, int], windows: Sequence[int | None]) -> Launch:
    """One with so many rows of one token, and one row of so many tokens, if any."""
    single, several = sizes
    rows = [Row(i, (3 + i,), 2 * i + 1, (i,)) for i in range(single)]
    if several:
        rows.append(Row(single, tuple(range(2, 2 + several)), BLOCK_SIZE - 3, (single, single + 1), "all"))
    return Launch.of(rows, windows)


def _cache(pool: Pool) -> list[Tensor]:
    """Keys and values of each layer, with something in them."""
    generator = np.random.default_rng(0)
    filled = []
    for tensor in (tensor for pair in zip(pool.keys, pool.values, strict=True) for tensor in pair):
        values = generator.normal(size=tuple(tensor.shape))
        filled.append(torch.from_numpy(values).to(tensor.dtype))
    return filled


def _linears_of(module: nn.Module, run: Any) -> list[tuple[str, int]]:
    """Paths and sizes of the linear layers, in the order in which they run."""
    found: list[tuple[str, int]] = []
    hooks = [
        layer.register_forward_hook(
            lambda layer, *_, name=name: found.append((name.removeprefix("module."), layer.weight.nbytes))
        )
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        with torch.inference_mode():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _Step(nn.Module):
    """One step of a causal language model over a paged KV cache, as a function of tensors alone."""

    def __init__(self, module: nn.Module, paged: Paged, windows: Sequence[int | None]) -> None:
        super().__init__()
        self.module = module
        self._paged, self._windows = paged, list(windows)

    def forward(self, *given: Tensor) -> tuple[Tensor]:
        tokens, positions, written, wanted, decoding, chunk = given[:6]
        masks, cache = given[6 : 6 + 2 * len(self._windows)], given[6 + 2 * len(self._windows) :]
        logits = self.module(
            input_ids=tokens,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=wanted,
            paged=_Attention(self._paged, self._windows, written, decoding, chunk, masks, cache),
        ).logits
        return (logits[0].float(),)


class _Attention:
    """Attention over a `Launch`: see `optkit_backends.torch.attention.Attention`."""

    def __init__(
        self,
        paged: Paged,
        windows: Sequence[int | None],
        written: Tensor,
        decoding: Tensor,
        chunk: Tensor,
        masks: Sequence[Tensor],
        cache: Sequence[Tensor],
    ) -> None:
        self._paged, self._windows = paged, windows
        self._written, self._decoding, self._chunk = written, decoding, chunk
        self._masks, self._cache = masks, cache

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        layer: Any = module.layer_idx
        shape, scale = self._paged.layers[layer], options.get("scaling")
        place = self._windows.index(self._paged.windows[layer])
        keys, values = self._cache[2 * layer], self._cache[2 * layer + 1]
        keys.index_copy_(1, self._written, kept(module, "k_scale", key))
        values.index_copy_(1, self._written, kept(module, "v_scale", value))
        shared, group = shape.heads, int(query.shape[0]) // shape.heads
        query = query.reshape(shared, group, query.shape[1], shape.key_dim)
        rows, length = self._decoding.shape[0], self._decoding.shape[1]
        seen = read(module, "k_scale", keys.index_select(1, self._decoding.reshape(-1)))
        content = read(module, "v_scale", values.index_select(1, self._decoding.reshape(-1)))
        single = scaled_dot_product_attention(
            query[:, :, :rows].permute(2, 0, 1, 3),
            seen.view(shared, rows, length, shape.key_dim).transpose(0, 1),
            content.view(shared, rows, length, shape.value_dim).transpose(0, 1),
            attn_mask=self._masks[2 * place],
            scale=scale,
        )
        seen = read(module, "k_scale", keys.index_select(1, self._chunk))
        content = read(module, "v_scale", values.index_select(1, self._chunk))
        several = scaled_dot_product_attention(
            query[:, :, rows:],
            seen[:, None].expand(-1, group, -1, -1),
            content[:, None].expand(-1, group, -1, -1),
            attn_mask=self._masks[2 * place + 1],
            scale=scale,
        )
        return torch.cat([single.flatten(1, 2), several.flatten(0, 1).transpose(0, 1)])
