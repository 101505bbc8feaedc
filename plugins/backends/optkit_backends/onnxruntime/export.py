"""Any torch module as an ONNX graph, by torch's own exporter, its quantized layers as integer operators."""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from torch import Tensor, nn

from optkit.errors import RecipeError
from optkit.model import Model
from optkit.quantized import QuantizedLayer, replace_module
from optkit.weights import FEATURE_EXTRACTION
from optkit_backends.onnxruntime.attention import FUSED
from optkit_backends.onnxruntime.convolutions import settle
from optkit_backends.onnxruntime.files import GRAPH, WEIGHTS, TensorFacts
from optkit_backends.onnxruntime.layers import exportable
from optkit_backends.onnxruntime.padding import take_in
from optkit_backends.onnxruntime.trace import PRODUCTS
from optkit_backends.positional import Positional, call_of, outputs_of, shallow_copy

__all__ = ["compile_model", "compile_tensors"]

# ONNX Runtime ran MiniLM faster as opset 20 than as 23, whose attention it has no fusions for.
OPSET = 20
SCOPES = "pkg.torch.onnx.name_scopes"
EXPORTER = "torch.onnx._internal.exporter"


def compile_model(model: Model, directory: Path, *, accuracy_level: int, block_size: int) -> None:
    """Write the graph of a transformers model that answers in one call, its weights and facts.

    Args:
        model: see `optkit_backends.positional.call_of`. It stays as it is.
        directory: exists and is empty.
        accuracy_level: of MatMulNBits, for layers of which the weights alone are quantized.
        block_size: likewise, where the weights allow it.

    Raises:
        RecipeError: the exporter or a kernel cannot express something of the model.
    """
    call, name = call_of(model), type(model.module).__name__
    lowered: Any = _lowered(model.module, accuracy_level, block_size)
    # The operator reads the mask of padded text.
    if FEATURE_EXTRACTION in model.tags and getattr(lowered, "_supports_attention_backend", False):
        lowered.config._attn_implementation = FUSED
    _write(call.around(lowered), name, call.example, call.outputs, call.dynamic, directory)


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
        outputs = list(outputs_of(module(**example)))
    lowered, name = _lowered(module, accuracy_level, block_size), type(module).__name__
    _write(lowered, name, example, outputs, dynamic or dict.fromkeys(example, (0,)), directory)


def _lowered(module: nn.Module, accuracy_level: int, block_size: int) -> nn.Module:
    """A copy with the very tensors of `module`, its quantized layers ready to be exported."""
    copied: nn.Module = shallow_copy(module)
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
                Positional(module, tuple(example)).eval(),
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
    take_in(model.graph)
    RemoveUnusedNodesPass()(model)
    _name_products(model.graph)
    # The exporter notes where on this machine each operator's code lies.
    ClearMetadataAndDocStringPass()(model)
    model.producer_name = "optkit"
    ir.save(model, directory / GRAPH, external_data=WEIGHTS)
    TensorFacts(list(example), list(outputs)).write(directory)


def _name_products(graph: ir.Graph) -> None:
    """Call each product with weights by the path of its layer, which `optkit explain` shows."""
    used = {node.name for node in graph}
    for node in graph:
        constants = [value for value in node.inputs if value is not None and value.const_value is not None]
        if node.op_type in PRODUCTS and constants:
            # Paths from the outermost module to the layer, and then what the exporter calls the node.
            scopes: list[str] = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
            path, weight = "".join(scopes[-2:-1]), str(constants[0].name)
            if node.op_type == "Conv" and weight.endswith(".weight"):
                # The scopes may be those of a batch norm, which the exporter has folded into it.
                path = weight.removesuffix(".weight")
            path = path.removeprefix("module.module.").removeprefix("module.")
            if path and path not in used:  # the runtime wants one name a node
                node.name = path
                used.add(path)


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
