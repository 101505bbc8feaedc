"""Any torch module as an ONNX graph, by torch's own exporter, its quantized layers as integer operators."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from torch import Tensor, nn

from optkit.errors import RecipeError
from optkit.quantized import QuantizedLayer, replace_module
from optkit_backends.onnxruntime.convolutions import settle
from optkit_backends.onnxruntime.files import GRAPH, WEIGHTS, TensorFacts
from optkit_backends.onnxruntime.layers import FUSED, exportable

__all__ = ["compile_encoder", "compile_tensors"]

# ONNX Runtime ran MiniLM faster as opset 20 than as 23, whose attention it has no fusions for.
OPSET = 20
EXPORTER = "torch.onnx._internal.exporter"


def compile_encoder(module: nn.Module, directory: Path, *, accuracy_level: int, block_size: int) -> None:
    """Write the graph of a transformers encoder, its weights and facts.

    Inputs are `input_ids` and `attention_mask` `[batch, tokens]` int64, the output is `last_hidden_state`
    `[batch, tokens, hidden]` float32.

    Args:
        module: an encoder without a head. It stays as it is.
        directory: exists and is empty.
        accuracy_level: of MatMulNBits, for layers of which the weights alone are quantized.
        block_size: likewise, where the weights allow it.

    Raises:
        RecipeError: the exporter or a kernel cannot express something of the model.
    """
    # Of unequal lengths: the exporter drops a mask that only holds ones, and takes an axis of one for a constant.
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    example = {"input_ids": mask.clone(), "attention_mask": mask}
    lowered: Any = _lowered(module, accuracy_level, block_size)
    if getattr(lowered, "_supports_attention_backend", False):
        lowered.config._attn_implementation = FUSED
    dynamic = dict.fromkeys(example, (0, 1))
    _write(_Encoder(lowered), type(module).__name__, example, ["last_hidden_state"], dynamic, directory)


def compile_tensors(
    module: nn.Module,
    example: Mapping[str, Tensor],
    directory: Path,
    *,
    dynamic: Mapping[str, Sequence[int]] | None = None,
    accuracy_level: int = 4,
    block_size: int = 64,
) -> None:
    """Write the graph of a module that maps tensors to tensors, its weights and facts.

    Args:
        module: in evaluation mode. It returns a tensor, which becomes the output `output`, or a mapping or tuple of
            tensors. It stays as it is.
        example: what it can be called with, by name: these become the inputs, in this order.
        directory: exists and is empty.
        dynamic: the axes of each input whose size may change; by default the first, which is the batch.
        accuracy_level: of MatMulNBits, for layers of which the weights alone are quantized.
        block_size: likewise, where the weights allow it.

    Raises:
        RecipeError: the exporter or a kernel cannot express something of the module.
    """
    with torch.inference_mode():
        outputs = list(_outputs(module(**example)))
    lowered, name = _lowered(module, accuracy_level, block_size), type(module).__name__
    _write(lowered, name, example, outputs, dynamic or dict.fromkeys(example, (0,)), directory)


def _lowered(module: nn.Module, accuracy_level: int, block_size: int) -> nn.Module:
    """A copy with the very tensors of `module`, its quantized layers ready to be exported."""
    tensors = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    copied: nn.Module = copy.deepcopy(module, tensors)
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, QuantizedLayer):
            replaced = exportable(layer, name, accuracy_level=accuracy_level, block_size=block_size)
            replace_module(copied, name, replaced)
    return copied


def _write(
    module: nn.Module,
    name: str,
    example: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Sequence[int]],
    directory: Path,
) -> None:
    # The exporter takes an axis of one for a constant.
    batches = [torch.cat([tensor, tensor]) if len(tensor) == 1 else tensor for tensor in example.values()]
    shapes = tuple(dict.fromkeys(dynamic[key], torch.export.Dim.DYNAMIC) for key in example)
    with _quiet():
        try:
            program: Any = torch.onnx.export(
                _Positional(module, tuple(example)).eval(),
                tuple(batches),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(example),
                output_names=list(outputs),
                dynamic_shapes={"tensors": shapes},
                verbose=False,
            )
        except Exception as error:  # the exporter's stages share no other base
            reason = str(error.__cause__ or error).strip().partition("\n")[0]
            raise RecipeError(f"torch.onnx cannot export it ({reason})", where=name) from error
    model: ir.Model = program.model
    settle(model.graph)
    # The exporter notes where on this machine each operator's code lies.
    ClearMetadataAndDocStringPass()(RemoveUnusedNodesPass()(model).model)
    model.producer_name = "optkit"
    ir.save(model, directory / GRAPH, external_data=WEIGHTS)
    TensorFacts(list(example), list(outputs)).write(directory)


class _Encoder(nn.Module):
    """An encoder from token ids to its last layer's output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._typed = "token_type_ids" in inspect.signature(module.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        types = {"token_type_ids": torch.zeros_like(input_ids)} if self._typed else {}
        output = self.module(input_ids=input_ids, attention_mask=attention_mask, **types)
        return {"last_hidden_state": output.last_hidden_state}


class _Positional(nn.Module):
    """A module that gets its inputs in order and gives a tuple, as graphs do."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self._names = module, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_outputs(self.module(**dict(zip(self._names, tensors, strict=True)))).values())


def _outputs(output: Any) -> dict[str, Tensor]:
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items() if isinstance(value, Tensor)}
    return {f"output_{index}": value for index, value in enumerate(output)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter and torch tell those who work on them."""
    logger = logging.getLogger(EXPORTER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
