"""Quantized layers as tensors in compressed-tensors' formats, and the `quantization_config` that goes with them.

Integer weights alone are `pack-quantized`; with activations they are `int-quantized`, a byte a weight whatever its
bits; E4M3 is `float-quantized`. Formats: `compressors/` of compressed-tensors 0.20, and vLLM's schemes for them.
Convolutions, which it has no compressors for, are stored in the same tensors as `int-quantized` linear layers, their
weights `[out, in / groups, height, width]`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from optkit.schemes import ActivationScheme, WeightScheme
from optkit.weights.cache import cache_args, cache_scheme_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optkit.quantized import QuantizedLayer

__all__ = ["quantization_config", "quantizes_convolutions", "schemes_of", "stored_tags", "tensors_of", "unpacked"]

Format = Literal["pack-quantized", "int-quantized", "float-quantized"]
Schemes = tuple[WeightScheme, ActivationScheme | None]
_CONVOLUTION, _CONVOLUTIONS_ENTRY = "Conv2d", "optkit_convolutions"
_KINDS = {"QuantizedLinear": "Linear", "QuantizedConv2d": _CONVOLUTION}
_READ = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")


def tensors_of(quantized: Mapping[str, QuantizedLayer]) -> dict[str, Tensor]:
    """What the folder holds of these layers, by name."""
    formats = _formats(quantized)
    return {
        f"{name}.{key}": tensor
        for name, layer in quantized.items()
        for key, tensor in _stored(layer, formats[_schemes(layer)]).items()
    }


def unpacked(name: str, layer: nn.Linear | nn.Conv2d, state: dict[str, Tensor], schemes: Schemes) -> QuantizedLayer:
    """What takes the place of the float layer `name`; its tensors in `state` are replaced by its own."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    from optkit.quantized import QuantizedConv2d, QuantizedLinear

    def taken(key: str) -> Tensor | None:
        return state.pop(f"{name}.{key}", None)

    scheme, activations = schemes
    scale, zero_point = state.pop(f"{name}.weight_scale"), taken("weight_zero_point")
    packed = taken("weight_packed")
    if packed is None:
        weight = state.pop(f"{name}.weight")
    else:
        shape = torch.Size(state.pop(f"{name}.weight_shape").tolist())
        weight = unpack_from_int32(packed, scheme.bits, shape)
        if zero_point is not None:
            zero_point = unpack_from_int32(zero_point, scheme.bits, scale.shape, packed_dim=0)
    tensors = weight, scale, zero_point, taken("bias")
    rounding = activations, taken("input_scale"), taken("input_zero_point")
    made: QuantizedLayer
    if isinstance(layer, torch.nn.Conv2d):
        made = QuantizedConv2d(layer, *tensors, scheme, *rounding)
    else:
        made = QuantizedLinear(*tensors, scheme, *rounding)
    # The layer's own tensors are in place; the rest of the state is loaded by name, and expects them there too.
    state |= {f"{name}.{key}": tensor for key, tensor in made.state_dict().items()}
    return made


def quantization_config(module: nn.Module, quantized: Mapping[str, QuantizedLayer], *, at_load: bool) -> dict[str, Any]:
    """What `config.json` says of these layers.

    Args:
        module: the model.
        quantized: its quantized layers.
        at_load: whether the library that reads the folder needs float weights from the beginning.
    """
    import torch
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    formats = _formats(quantized)
    names: dict[Schemes, list[str]] = defaultdict(list)
    for name, layer in quantized.items():
        names[_schemes(layer)].append(name)
    kinds = {_KINDS[type(layer).__name__]: None for layer in quantized.values()}
    groups = {}
    for index, ((scheme, activations), layers) in enumerate(names.items()):
        inputs = None
        if activations is not None:
            inputs = QuantizationArgs(
                num_bits=8,
                type=activations.type,
                symmetric=activations.symmetric,
                strategy="token" if activations.dynamic else "tensor",
                dynamic=activations.dynamic,
            )
        groups[f"group_{index}"] = QuantizationScheme(
            # One scheme reads best as "every Linear but these"; several need their layers by name.
            targets=list(kinds) if len(names) == 1 else layers,
            weights=QuantizationArgs(
                num_bits=scheme.bits,
                type=scheme.type,
                symmetric=scheme.symmetric,
                strategy=scheme.granularity,
                group_size=scheme.group_size,
            ),
            input_activations=inputs,
            format=formats[scheme, activations],
        )
    used = set(formats.values())
    config = QuantizationConfig(
        config_groups=groups,
        kv_cache_scheme=cache_args(module),
        format=used.pop() if len(used) == 1 else "mixed-precision" if formats else "dense",
        quantization_status=QuantizationStatus.COMPRESSED if formats else QuantizationStatus.FROZEN,
        ignore=[
            name
            for name, layer in module.named_modules()
            if isinstance(layer, torch.nn.Linear) or (_CONVOLUTION in kinds and isinstance(layer, torch.nn.Conv2d))
        ],
    )
    stored = dict(config.model_dump(mode="json"))
    if _CONVOLUTION in kinds:
        stored[_CONVOLUTIONS_ENTRY] = True
    if not formats:
        return stored
    [(scheme, activations), *others] = formats
    if (at_load or not scheme.symmetric) and activations is None and not others:
        # transformers 5.23 finds packed zero points only on the way that dequantizes at load (its quantizer otherwise
        # prepares parameters of their unpacked shape), and sentence-transformers 6.2 calls `forward` past the hook that
        # would dequantize later. Others ignore the key. That way drops the rounding of activations, and reads every
        # layer with the first scheme: models that have either do without, and sentence-transformers cannot run them.
        stored["dequantize"] = True
    return stored


def quantizes_convolutions(config: Mapping[str, Any]) -> bool:
    """Whether the contents of a `config.json` say that convolutions are quantized too."""
    stored = config.get("quantization_config") or {}
    return bool(stored.get(_CONVOLUTIONS_ENTRY))


def schemes_of(group: Mapping[str, Any]) -> Schemes:
    """How a config group stores weights and rounds activations.

    Raises:
        ValueError: optkit has no such scheme.
    """
    weights, inputs = group["weights"], group.get("input_activations")
    kind, bits, strategy = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("strategy")
    if strategy not in ("channel", "group") or not (bits == 8 if kind == "float" else 2 <= bits <= 8):
        raise ValueError(f"no layer of optkit has {bits}-bit {kind} weights with a scale for each {strategy}")
    if group.get("output_activations"):
        raise ValueError("no layer of optkit rounds its output")
    group_size = weights["group_size"] if strategy == "group" else None
    scheme = WeightScheme(bits, group_size, weights.get("symmetric", True), kind)
    if inputs is None:
        return scheme, None
    dynamic = inputs.get("dynamic", False)
    if inputs.get("num_bits", 8) != 8 or inputs.get("strategy") != ("token" if dynamic else "tensor"):
        raise ValueError("optkit rounds activations to 8 bits, token by token or with one calibrated scale")
    return scheme, ActivationScheme(dynamic, inputs.get("symmetric", True), inputs.get("type", "int"))


def stored_tags(stored: Mapping[str, Any]) -> frozenset[str]:
    """The `weights:*`, `activations:*` and `kv:*` tags of a `quantization_config`.

    Raises:
        ValueError: optkit cannot read the format.
    """
    if stored.get("format") not in _READ:
        raise ValueError(f"weights are stored as {stored.get('format')}, optkit reads {', '.join(_READ)}")
    found = [scheme for group in stored["config_groups"].values() for scheme in schemes_of(group)]
    cache = stored.get("kv_cache_scheme")
    return frozenset(
        [scheme.tag for scheme in found if scheme is not None] + ([cache_scheme_of(cache).tag] if cache else [])
    )


def _schemes(layer: QuantizedLayer) -> Schemes:
    return layer.scheme, layer.activations


def _formats(quantized: Mapping[str, QuantizedLayer]) -> dict[Schemes, Format]:
    """The format of each scheme, in the order of its first layer."""
    found = dict.fromkeys(_schemes(layer) for layer in quantized.values())
    # transformers 5.23 reads packed zero points in models of one scheme only (see `quantization_config`); whole ones it
    # reads everywhere, so there a byte a weight is the price.
    whole = len(found) > 1
    return {
        (scheme, activations): "float-quantized"
        if scheme.type == "float"
        else "int-quantized"
        if activations is not None or (whole and not scheme.symmetric)
        else "pack-quantized"
        for scheme, activations in found
    }


def _stored(layer: QuantizedLayer, format: Format) -> dict[str, Tensor]:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    tensors: dict[str, Tensor | None] = {
        "weight_scale": layer.scale,
        "bias": layer.bias,
        "input_scale": layer.input_scale,
        "input_zero_point": layer.input_zero_point,
    }
    zero_point, bits = layer.zero_point, layer.scheme.bits
    if format == "pack-quantized":
        tensors["weight_packed"] = pack_to_int32(layer.weight, bits)
        tensors["weight_shape"] = torch.tensor(layer.weight.shape)
        if zero_point is not None:
            zero_point = pack_to_int32(zero_point, bits, packed_dim=0).contiguous()
    else:
        tensors["weight"] = layer.weight
    tensors["weight_zero_point"] = zero_point
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}
