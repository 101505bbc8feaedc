"""A causal language model as a stateful graph of OpenVINO, in the form that its paged attention takes over.

The graph has the inputs `input_ids`, `attention_mask`, `position_ids` `[batch, tokens]` int64 and `beam_idx` `[batch]`
int32, the output `logits` `[batch, tokens, vocabulary]` float32, and a state for the keys and one for the values of
each layer. openvino_genai puts PagedAttention where a state, a concatenation and ScaledDotProductAttention follow each
other, with nothing but a repetition of heads between them.

Document: https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-request/stateful-models.html
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from openvino import opset13 as opset
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from optkit.errors import RecipeError
from optkit_backends.openvino.frontend import quiet, reader
from optkit_backends.openvino.layers import make_exportable
from optkit_backends.openvino_genai.files import GRAPH, DecoderFacts
from optkit_backends.positional import shallow_copy
from optkit_backends.torch.pool import LayerShape
from optkit_backends.torch.probe import page

__all__ = ["compile_decoder"]

STATEFUL = "optkit_stateful"
"""The name of the attention function. There is no mask function of this name, so transformers makes no mask."""
INPUTS = ("input_ids", "attention_mask", "position_ids")
KINDS = ("key", "value")


def compile_decoder(module: Any, directory: Path) -> None:
    """Write the graph of a causal language model, its weights and facts.

    Args:
        module: of transformers. It stays as it is.
        directory: exists and is empty.

    Raises:
        RecipeError: its attention is not causal over all tokens, or something of it cannot be exported or converted.
    """
    name = type(module).__name__
    paged = page(shallow_copy(module), name)
    if any(window is not None for window in paged.windows):
        raise RecipeError(
            "has layers with a sliding window, which this backend cannot page", where=name, remedy="use another backend"
        )
    exported = shallow_copy(module)
    make_exportable(exported)
    exported.set_attn_implementation(STATEFUL)
    with quiet():
        program = _exported(_Decoder(exported).eval(), paged.layers, name)
        model = _stateful(_converted(program, name), paged.layers)
    openvino.save_model(model, directory / GRAPH, compress_to_fp16=False)
    layers = [(layer.heads, layer.key_dim, layer.value_dim) for layer in paged.layers]
    DecoderFacts(openvino.__version__, layers, module.config.vocab_size, paged.longest).write(directory)


class _Decoder(nn.Module):
    """A decoder as a function of tensors alone: what it has computed comes in and goes out."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        seen = torch.arange(attention_mask.shape[1])[None, None, None] <= position_ids[:, None, :, None]
        states = _States(past, seen & attention_mask[:, None, None].to(torch.bool))
        logits = self.module(input_ids=input_ids, position_ids=position_ids, use_cache=False, states=states).logits
        return (logits, *(tensor for layer in states.present for tensor in layer))


class _States:
    """Keys and values of each layer: those before, and with the new ones after them.

    Args:
        past: keys and values of each layer by turns, `[batch, heads, tokens, dim]`.
        mask: bool `[batch, 1, new tokens, all tokens]`.
    """

    def __init__(self, past: Sequence[Tensor], mask: Tensor) -> None:
        self._past, self._mask = past, mask
        self.present: list[tuple[Tensor, Tensor]] = [(past[0], past[0])] * (len(past) // 2)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """`[batch, new tokens, heads, value_dim]`."""
        keys = torch.cat([self._past[2 * layer], key], 2)
        values = torch.cat([self._past[2 * layer + 1], value], 2)
        self.present[layer] = keys, values
        usual = query.shape[-1] ** -0.5
        if scale is not None and scale != usual:
            query = query * (scale / usual)  # the frontend drops the argument
        heads = query.shape[1]
        found = scaled_dot_product_attention(query, _repeated(keys, heads), _repeated(values, heads), self._mask)
        return found.transpose(1, 2)


def _repeated(states: Tensor, heads: int) -> Tensor:
    """Keys or values with as many heads as queries have."""
    batch, shared, tokens, dim = states.shape
    if shared == heads:
        return states
    expanded = states.unsqueeze(2).expand(-1, -1, heads // shared, -1, -1)
    return expanded.reshape(batch, heads, tokens, dim)


def _stateful_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    states: _States,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls, with no mask."""
    return states.attend(module.layer_idx, query, key, value, options.get("scaling")), None


AttentionInterface.register(STATEFUL, _stateful_attention)


def _exported(module: nn.Module, layers: Sequence[LayerShape], name: str) -> torch.export.ExportedProgram:
    dynamic = torch.export.Dim.DYNAMIC
    # Two of everything: the exporter takes an axis of one for a constant.
    example = [torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 5, dtype=torch.long), torch.tensor([[2, 3, 4]] * 2)]
    past = [torch.zeros(2, one.heads, 2, dim) for one in layers for dim in (one.key_dim, one.value_dim)]
    sizes: dict[str, Any] = {name: {0: dynamic, 1: dynamic} for name in INPUTS}
    sizes["past"] = tuple({0: dynamic, 2: dynamic} for _ in past)
    try:
        with torch.no_grad():
            return torch.export.export(module, (*example, *past), dynamic_shapes=sizes)
    except Exception as error:  # whatever the module's own code raises where it meets what is exported
        raise _refused("torch.export cannot export it", name, error) from error


def _converted(program: torch.export.ExportedProgram, name: str) -> Any:
    try:
        decoder = TorchFXPythonDecoder.from_exported_program(program)  # must outlive the conversion
        frontend = reader(lambda operator: f"{operator.replace('::', '.')}.default")  # as torch.export has it
        return frontend.convert(frontend.load(decoder))
    except Exception as error:  # of several kinds, by what is missing
        raise _refused("openvino cannot convert it", name, error) from error


def _stateful(model: Any, layers: Sequence[LayerShape]) -> Any:
    """The model with states in the place of the inputs and outputs for what was computed."""
    inputs, outputs = model.inputs, model.outputs
    for port, name in zip(inputs, INPUTS, strict=False):
        port.get_node().set_partial_shape(openvino.PartialShape([-1, -1]))
        _name(port, name)
    _name(outputs[0], "logits")
    order = opset.parameter([-1], np.int32, name="beam_idx")
    _name(order.output(0), "beam_idx")
    first = opset.constant(np.int64(0))
    batch = opset.gather(opset.shape_of(inputs[0].get_node()), opset.constant(np.array([0])), first)
    places = [
        (f"past_key_values.{index}.{kind}", layer.heads, dim)
        for index, layer in enumerate(layers)
        for kind, dim in zip(KINDS, (layer.key_dim, layer.value_dim), strict=True)
    ]
    writes = []
    for given, made, (name, heads, dim) in zip(inputs[len(INPUTS) :], outputs[1:], places, strict=True):
        shape = opset.concat([batch, opset.constant(np.array([heads, 0, dim]))], 0)
        empty = opset.broadcast(opset.constant(np.float32(0)), shape)
        state = opset.read_value(empty, name, openvino.Type.f32, openvino.PartialShape([-1, heads, -1, dim]))
        chosen = opset.gather(state, order, first)
        for target in given.get_target_inputs():
            target.replace_source_output(chosen.output(0))
        writes.append(opset.assign(made.get_node().input_value(0).get_node(), name))
    parameters = [*(port.get_node() for port in inputs[: len(INPUTS)]), order]
    return openvino.Model([outputs[0].get_node()], writes, parameters, "decoder")


def _name(port: Any, name: str) -> None:
    port.get_tensor().set_names({name})
    port.get_node().set_friendly_name(name)


def _refused(what: str, name: str, error: Exception) -> RecipeError:
    reason = str(error).strip().partition("\n")[0]
    return RecipeError(f"{what} ({reason})", where=name, remedy="choose another backend")
