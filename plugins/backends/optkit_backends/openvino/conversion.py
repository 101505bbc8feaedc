"""Any torch module as a graph of OpenVINO, traced and converted by OpenVINO's own frontend."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import openvino
import torch
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

from optkit.errors import RecipeError
from optkit.model import Model
from optkit_backends.openvino.attention import FUSED
from optkit_backends.openvino.files import GRAPH, TensorFacts
from optkit_backends.openvino.frontend import quiet, reader
from optkit_backends.openvino.layers import make_exportable
from optkit_backends.openvino.tensors import OpenVINOTensorSession
from optkit_backends.positional import Positional, call_of, outputs_of, shallow_copy

__all__ = ["compile_model", "compile_tensors"]

# How the frontend calls the only module of a `Positional`.
_ROOT = "__module.module"
# Of the outputs for other sizes than the example's, relative to their norm. Where inputs of layers are rounded, a last
# bit that differs tips some of them to the other neighbour.
_EXACT, _ROUNDED = 1e-3, 0.1
# Lines of the frontend's errors that say nothing.
_BOILERPLATE = re.compile(
    r"\s*$|Check '.*' failed at|FrontEnd API failed|Converting input|Couldn't get|Exception:|Model wasn't|Summary:"
)


def compile_model(model: Model, directory: Path) -> None:
    """Write the graph of a transformers model that answers in one call, its weights and facts.

    Args:
        model: see `optkit_backends.positional.call_of`. It stays as it is.
        directory: exists and is empty.

    Raises:
        RecipeError: something of it cannot be traced or converted.
    """
    call, name = call_of(model), type(model.module).__name__
    module = shallow_copy(model.module)
    if module.config._attn_implementation == "sdpa" and module._supports_attention_backend:
        module.config._attn_implementation = FUSED
    _write(call.around(module), name, call.example, call.outputs, call.dynamic, directory, root=f"{_ROOT}.module")


def compile_tensors(
    module: nn.Module,
    example: Mapping[str, Tensor],
    directory: Path,
    *,
    dynamic: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Write the graph of a module that maps tensors to tensors, its weights and facts.

    Args:
        module: in evaluation mode. It returns a tensor, which becomes the output `output`, or a mapping or tuple of
            tensors. It stays as it is.
        example: what it can be called with, by name: these become the inputs, in this order.
        directory: exists and is empty.
        dynamic: the axes of each input whose size may change; by default the first, which is the batch.

    Raises:
        RecipeError: something of it cannot be traced or converted.
    """
    name = type(module).__name__
    with torch.inference_mode():
        outputs = list(outputs_of(module(**example)))
    if not outputs:
        raise RecipeError("gives no tensors", where=name, remedy="let it return a tensor, or several")
    _write(shallow_copy(module), name, example, outputs, dynamic or dict.fromkeys(example, (0,)), directory)


def _write(
    module: nn.Module,
    name: str,
    example: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Sequence[int]],
    directory: Path,
    root: str = _ROOT,
) -> None:
    rounds = make_exportable(module)
    module = Positional(module, tuple(example)).eval()
    with quiet():
        model = _converted(module, name, tuple(example.values()))
    _name_after_convolutions(model)
    for given, names in ((model.inputs, example), (model.outputs, outputs)):
        for port, port_name in zip(given, names, strict=True):
            port.get_tensor().set_names({port_name})
    shapes = {
        key: [-1 if axis in dynamic[key] else size for axis, size in enumerate(tensor.shape)]
        for key, tensor in example.items()
    }
    model.reshape({key: openvino.PartialShape(shape) for key, shape in shapes.items()})
    openvino.save_model(model, directory / GRAPH, compress_to_fp16=False)
    TensorFacts(openvino.__version__, root, list(example), list(outputs)).write(directory)
    larger = {key: _repeated(tensor, dynamic[key]) for key, tensor in example.items()}
    _compare(module, directory, larger, name, _ROUNDED if rounds else _EXACT)


def _converted(module: nn.Module, name: str, example: tuple[Tensor, ...]) -> Any:
    try:
        with torch.no_grad():
            # The graph reads from the decoder while it is converted.
            decoder = TorchScriptPythonDecoder(
                module, example_input=example, skip_freeze=True, trace_kwargs={"check_trace": False}
            )
            frontend = reader()
            return frontend.convert(frontend.load(decoder))
    except Exception as error:  # of several kinds: whatever the module's own code raises where it meets what is traced
        lines = [line.lstrip("- ") for line in str(error).splitlines() if not _BOILERPLATE.match(line)]
        raise RecipeError(
            f"openvino cannot convert it ({lines[0] if lines else type(error).__name__})",
            where=name,
            remedy="choose another backend",
        ) from error


def _name_after_convolutions(model: Any) -> None:
    """Batch norms are folded into the convolutions before them, and of the two names the profile keeps theirs."""
    for node in model.get_ops():
        if node.get_type_name() == "BatchNormInference":
            layer, _, operator = node.input_value(0).get_node().get_friendly_name().partition("/")
            if operator.startswith("aten::_convolution"):
                node.set_friendly_name(f"{layer}/batch_norm")


@torch.inference_mode()
def _compare(module: nn.Module, directory: Path, given: Mapping[str, Tensor], name: str, tolerance: float) -> None:
    """Compare what was compiled with the module, for other sizes than those that were traced.

    Raises:
        RecipeError: the graph gives something else.
    """
    try:
        wanted: tuple[Tensor, ...] = module(*given.values())
    except RuntimeError as error:
        remedy = "say with dynamic which axes can have other sizes"
        raise RecipeError(f"does not run on other sizes itself: {error}", where=name, remedy=remedy) from error
    with OpenVINOTensorSession(directory, threads=1, integer_products=False) as session:
        try:
            found = session.run({key: tensor.numpy() for key, tensor in given.items()}).values()
        except RuntimeError as error:
            reason = str(error).strip().rpartition("\n")[2]
            raise _frozen(name, f"fails for other sizes: {reason}") from error
    for ours, theirs in zip(found, wanted, strict=True):
        exact = theirs.double()
        distance = (torch.from_numpy(ours).double() - exact).norm() if ours.shape == theirs.shape else torch.inf
        # Not above also where it is NaN.
        if not distance <= tolerance * exact.norm():
            raise _frozen(name, "gives something else for other sizes")


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
