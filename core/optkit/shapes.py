"""Models whose layers differ in shape, as pruning leaves them, and which one configuration for all cannot describe.

transformers builds a model from its `config.json`, which has one width for all layers. Where a model has others, the
configuration gets the entry `optkit_shapes`: by the path of a module, its attributes that are not what the rest of the
configuration gives.

    "optkit_shapes": {
        "model.layers.0.self_attn": {"num_key_value_groups": 2},
        "model.layers.0.self_attn.q_proj": {"out_features": 384},
        "model.layers.0.mlp.down_proj": {"rank": 96}
    }
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from optkit.errors import OptkitError
from optkit.quantized import QuantizedLayer, QuantizedLinear, replace_module
from optkit.schemes import SHAPES_ENTRY

__all__ = ["LowRankLinear", "describe", "reshape"]

Shapes = dict[str, dict[str, int]]


class LowRankLinear(nn.Sequential):
    """A linear layer as the product of two thin ones: the first has no bias, the second that of the layer.

    Args:
        first: `[rank, in]`, float or quantized.
        second: `[out, rank]`, likewise.
    """

    def __init__(self, first: nn.Linear | QuantizedLinear, second: nn.Linear | QuantizedLinear) -> None:
        super().__init__(first, second)

    @property
    def factors(self) -> tuple[nn.Linear | QuantizedLinear, nn.Linear | QuantizedLinear]:
        """First and second, as they are now."""
        first: Any = self[0]
        second: Any = self[1]
        return first, second

    @property
    def in_features(self) -> int:
        return self.factors[0].in_features

    @property
    def out_features(self) -> int:
        return self.factors[1].out_features

    @property
    def rank(self) -> int:
        return self.factors[0].out_features


def describe(module: nn.Module) -> None:
    """Make the configuration of a transformers model say what its layers are, in place.

    Entries that one value fits are the architecture's own (`intermediate_size`, heads, `hidden_size`, layers), so that
    a model whose layers are alike loads in transformers as it is. What is left goes into `optkit_shapes`.

    Raises:
        OptkitError: the model differs from what its configuration can say, a tensor that no layer has for example.
    """
    model: Any = module
    _settle(model)
    if hasattr(model.config, SHAPES_ENTRY):
        delattr(model.config, SHAPES_ENTRY)
    built = _built(model)
    found = _differences(model, built)
    if found:
        reshape(built, found)
        setattr(model.config, SHAPES_ENTRY, found)
    # Libraries' own layers pack integers in shapes of their own.
    shapes = {name: tensor.shape for name, tensor in _floats(model).items() if tensor.is_floating_point()}
    for name, tensor in _floats(built).items():
        if shapes.get(name, tensor.shape) != tensor.shape:
            raise OptkitError(
                f"its configuration gives {tuple(tensor.shape)}, and no layer says otherwise",
                where=name,
                found=tuple(shapes[name]),
            )


def reshape(module: nn.Module, shapes: Mapping[str, Mapping[str, int]]) -> None:
    """Give layers the shapes that `optkit_shapes` says; their weights are new, and empty.

    Raises:
        ValueError: an entry names what is not in the model, or is no size.
    """
    if not isinstance(shapes, Mapping) or not all(isinstance(sizes, Mapping) for sizes in shapes.values()):
        raise ValueError(f"optkit_shapes holds no sizes by module, but {shapes!r}")
    for path, attributes in shapes.items():
        try:
            part: Any = module.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f"optkit_shapes names {path}, which is not in the model") from error
        for name, value in attributes.items():
            known = (name == "rank" and isinstance(part, nn.Linear)) or type(getattr(part, name, None)) is int
            if not known or name.startswith("_") or type(value) is not int or value < 1:
                raise ValueError(f"optkit_shapes gives {path} {name} = {value!r}, which is no size that it has")
        sizes = {name: value for name, value in attributes.items() if name != "rank"}
        for name, value in sizes.items():
            setattr(part, name, value)
        match part:
            case nn.Linear():
                bias = part.bias is not None
                made: nn.Module = _linear(part.in_features, part.out_features, bias=bias)
                if "rank" in attributes:
                    rank = attributes["rank"]
                    made = LowRankLinear(
                        _linear(part.in_features, rank, bias=False), _linear(rank, part.out_features, bias=bias)
                    )
                replace_module(module, path, made)
            case nn.Conv2d():
                replace_module(module, path, _convolution(part))
            case nn.BatchNorm2d():
                norm = nn.BatchNorm2d(
                    part.num_features, part.eps, part.momentum, part.affine, part.track_running_stats, device="meta"
                )
                replace_module(module, path, norm)
            case _ if sizes and list(part.parameters(recurse=False)):
                raise ValueError(
                    f"optkit_shapes gives {path} sizes, and it is no linear layer, convolution or batch norm"
                )


def _linear(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, device="meta")


def _convolution(like: nn.Conv2d) -> nn.Conv2d:
    """One of its attributes, without weights."""
    sizes: list[Any] = [like.kernel_size, like.stride, like.padding, like.dilation, like.groups]
    convolution: Any = nn.Conv2d
    made: nn.Conv2d = convolution(
        like.in_channels, like.out_channels, *sizes, like.bias is not None, like.padding_mode, device="meta"
    )
    return made


def _settle(model: Any) -> None:
    """Set those entries of the configuration that one value of all layers fits."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return  # where a model of images has stages or patches, such entries mean something else
    config = model.config
    named = dict(model.named_modules())
    for entry, values in (
        ("intermediate_size", _outputs(named, ("up_proj", "intermediate.dense"))),
        ("hidden_size", {getattr(model.get_input_embeddings(), "embedding_dim", 0)}),
        ("num_hidden_layers", {len(_layers(model))}),
        *_heads(config, named),
    ):
        if len(values) == 1 and isinstance(getattr(config, entry, None), int):
            value = next(iter(values))
            if "heads" not in entry or _accepts(config, entry, value):
                setattr(config, entry, value)


def _heads(config: Any, named: Mapping[str, nn.Module]) -> list[tuple[str, set[int]]]:
    """Heads, for attentions that say how large a head is; where the configuration has no `head_dim`, not changed, as it
    would follow from the number of heads."""
    if getattr(config, "head_dim", None) is None:
        return []
    queries, keys = _outputs(named, ("q_proj",)), _outputs(named, ("k_proj",))
    return [
        ("num_attention_heads", {width // config.head_dim for width in queries}),
        ("num_key_value_heads", {width // config.head_dim for width in keys}),
    ]


def _accepts(config: Any, entry: str, value: int) -> bool:
    """Whether the configuration could be read again: Llama's wants heads that divide the width, of whatever size."""
    changed = copy.copy(config)
    setattr(changed, entry, value)
    try:
        getattr(changed, "validate_architecture", lambda: None)()
    except ValueError:
        return False
    return True


def _outputs(named: Mapping[str, nn.Module], endings: tuple[str, ...]) -> set[int]:
    return {
        layer.out_features
        for name, layer in named.items()
        if isinstance(layer, nn.Linear | QuantizedLinear | LowRankLinear) and name.endswith(endings)
    }


def _layers(model: nn.Module) -> nn.ModuleList:
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    # Buffers too: those of quantized layers are their weights.
    sizes = [sum(tensor.numel() for tensor in part.state_dict().values()) for part in lists]
    return lists[sizes.index(max(sizes))] if lists else nn.ModuleList()


def _built(model: Any) -> nn.Module:
    """What transformers makes of the configuration, without memory."""
    with torch.device("meta"):
        made: nn.Module = type(model)(copy.deepcopy(model.config))
    return made


def _differences(model: nn.Module, built: nn.Module) -> Shapes:
    found: Shapes = {}
    real = dict(model.named_modules())
    for path, expected in built.named_modules():
        part = real.get(path)
        if part is None:
            raise OptkitError("its configuration gives a module that it does not have", where=path)
        sizes = {name: value for name, value in vars(expected).items() if type(value) is int and name[0] != "_"}
        other = {name: getattr(part, name, value) for name, value in sizes.items()}
        changed = {name: value for name, value in other.items() if type(value) is int and value != sizes[name]}
        if isinstance(part, LowRankLinear):
            changed["rank"] = part.rank
        if changed:
            found[path] = changed
    return found


def _floats(module: nn.Module) -> dict[str, Tensor]:
    inside = {name for name, part in module.named_modules() if isinstance(part, QuantizedLayer | LowRankLinear)}
    return {
        name: tensor
        for name, tensor in module.state_dict().items()
        if not any(name.startswith(f"{path}.") for path in inside)
    }
