"""The `weights/` folder: a standard Hugging Face folder, integer weights in compressed-tensors' pack-quantized format.

transformers loads it as it is, and sentence-transformers that of a sentence encoder. Format:
`PackedQuantizationCompressor` of compressed-tensors 0.20.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from optkit.errors import DamagedError, MissingError
from optkit.model import Model

if TYPE_CHECKING:
    from torch import Tensor, nn

    from optkit.quantized import QuantizedLinear, WeightScheme

__all__ = [
    "CAUSAL_LM",
    "FEATURE_EXTRACTION",
    "causal_lm_tags",
    "holds_encoder",
    "is_encoder",
    "load_folder",
    "quiet_transformers",
    "save_folder",
    "sentence_files",
]

CAUSAL_LM, FEATURE_EXTRACTION = "task:causal-lm", "task:feature-extraction"
"""Tasks, by the names of Hugging Face's pipelines; an encoder without a head extracts features."""
_SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


def causal_lm_tags(config: Any) -> frozenset[str]:
    """The tags of an untouched causal language model with this transformers configuration."""
    return frozenset({CAUSAL_LM, f"arch:{config.model_type}", "weights:float"})


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether the contents of a `config.json` are those of an encoder without a head, such as `BertModel`."""
    architectures = config.get("architectures") or [""]
    name = str(architectures[0])
    # GPT2LMHeadModel and its like have a head all the same.
    headed = name.endswith(("HeadModel", "HeadsModel"))
    return name.endswith("Model") and not headed and not config.get("is_encoder_decoder")


def holds_encoder(directory: Path) -> bool:
    """The same for the model in a folder.

    Raises:
        DamagedError: its `config.json` cannot be read.
    """
    try:
        return is_encoder(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, TypeError, LookupError) as error:
        raise DamagedError(f"not readable JSON ({error})", where=str(directory / "config.json")) from error


def sentence_files(folder: Path) -> dict[str, str]:
    """The text files of sentence-transformers in a folder, by path; empty where its model is not from there.

    Raises:
        DamagedError: one cannot be read, or `modules.json` names what lies outside the folder.
    """
    names = [name for name in _SENTENCE_FILES if (folder / name).is_file()]
    try:
        if "modules.json" in names:
            modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
            paths = [PurePosixPath(module["path"]) for module in modules if module.get("path")]
            outside = [path for path in paths if path.is_absolute() or ".." in path.parts]
            if outside:
                raise ValueError(f"{outside[0]} lies outside the folder")
            configs = [str(path / "config.json") for path in paths]
            names += [name for name in configs if (folder / name).is_file()]
        return {name: (folder / name).read_text(encoding="utf-8") for name in names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"the files of sentence-transformers cannot be read ({error})", where=str(folder), remedy="get them again"
        ) from error


def quiet_transformers() -> None:
    """Keep transformers from drawing bars and warning on standard error: optkit shows its own progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def save_folder(model: Model, directory: Path) -> None:
    """Write `model` into `directory`, tokenizer included. The folder holds no code and no pickle."""
    from huggingface_hub import save_torch_state_dict

    from optkit.quantized import quantized_layers

    quiet_transformers()
    directory.mkdir(parents=True, exist_ok=True)
    module: Any = model.module
    quantized = dict(quantized_layers(module))
    state = {name: tensor for name, tensor in module.state_dict().items() if name.rpartition(".")[0] not in quantized}
    for name, source in getattr(module, "all_tied_weights_keys", {}).items():
        if name in state and source in state and _shared(state[name], state[source]):
            del state[name]  # transformers ties it again when it loads
    for name, layer in quantized.items():
        state |= {f"{name}.{key}": tensor for key, tensor in _packed(layer).items()}
    save_torch_state_dict(state, directory, max_shard_size="4GB")
    module.config.architectures = [type(module).__name__]
    module.config.save_pretrained(directory)
    if quantized:
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] = _quantization_config(module, quantized, at_load=bool(model.files))
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if getattr(module, "generation_config", None) is not None:
        module.generation_config.save_pretrained(directory)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(directory)
    for name, text in model.files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")


def load_folder(directory: Path, *, tags: frozenset[str] | None = None) -> Model:
    """Read a folder that `save_folder` wrote, or any Hugging Face folder with float weights.

    Args:
        directory: a folder with `config.json` and safetensors.
        tags: those of the model; by default what its configuration says.

    Returns:
        The model in float32, quantized layers as `QuantizedLinear`.

    Raises:
        MissingError: there is no model in `directory`.
        DamagedError: its files cannot be read.
    """
    import transformers
    from safetensors import SafetensorError

    quiet_transformers()
    if not (directory / "config.json").is_file():
        raise MissingError("no config.json, so no Hugging Face model", where=str(directory))
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
        module = (
            _load_quantized(directory, config)
            if hasattr(config, "quantization_config")
            else _load_float(directory, config)
        )
        files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
        has_tokenizer = any((directory / name).is_file() for name in files)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory) if has_tokenizer else None
    except (ValueError, KeyError, RuntimeError, OSError, TypeError, SafetensorError) as error:
        raise DamagedError(f"cannot be loaded: {error}", where=str(directory)) from error
    encoder = is_encoder(config.to_dict())
    beside = sentence_files(directory) if encoder else {}
    if tags is None:
        tags = causal_lm_tags(module.config)
        tags = tags - {CAUSAL_LM} | {FEATURE_EXTRACTION} if encoder else tags
    return Model(module.eval().requires_grad_(False), tokenizer, tags, beside)


def _auto_class(config: Any) -> Any:
    import transformers

    return transformers.AutoModel if is_encoder(config.to_dict()) else transformers.AutoModelForCausalLM


def _load_float(directory: Path, config: Any) -> Any:
    import torch

    return _auto_class(config).from_pretrained(directory, dtype=torch.float32)


def _load_quantized(directory: Path, config: Any) -> Any:
    import torch
    from compressed_tensors.quantization import QuantizationConfig
    from transformers.initialization import no_init_weights

    from optkit.quantized import replace_module

    fields = QuantizationConfig.model_fields
    stored = QuantizationConfig.model_validate({k: v for k, v in config.quantization_config.items() if k in fields})
    if stored.format != "pack-quantized":
        raise ValueError(f"weights are stored as {stored.format}, optkit reads pack-quantized")
    del config.quantization_config
    with no_init_weights():
        module: Any = _auto_class(config).from_config(config, dtype=torch.float32)
    state = _read_state(directory)
    for name in sorted(key.removesuffix(".weight_packed") for key in state if key.endswith(".weight_packed")):
        replace_module(module, name, _unpacked(name, state, _scheme_of(name, stored)))
    missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
    tied = getattr(module, "all_tied_weights_keys", {}) if module.config.tie_word_embeddings else {}
    lacking = [name for name in missing if name not in tied]
    if lacking or unexpected:
        raise ValueError(f"tensors do not fit the configuration: missing {lacking[:3]}, unexpected {unexpected[:3]}")
    module.tie_weights()
    return module


def _read_state(directory: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        state |= load_file(file)
    return state


def _shared(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _packed(layer: QuantizedLinear) -> dict[str, Tensor]:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed = {
        "weight_packed": pack_to_int32(layer.weight, layer.scheme.bits),
        "weight_scale": layer.scale,
        "weight_shape": torch.tensor(layer.weight.shape),
    }
    if layer.zero_point is not None:
        packed["weight_zero_point"] = pack_to_int32(layer.zero_point, layer.scheme.bits, packed_dim=0).contiguous()
    if layer.bias is not None:
        packed["bias"] = layer.bias
    return packed


def _unpacked(name: str, state: dict[str, Tensor], scheme: WeightScheme) -> QuantizedLinear:
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    from optkit.quantized import QuantizedLinear

    shape = torch.Size(state.pop(f"{name}.weight_shape").tolist())
    weight = unpack_from_int32(state.pop(f"{name}.weight_packed"), scheme.bits, shape)
    scale = state.pop(f"{name}.weight_scale")
    packed = state.pop(f"{name}.weight_zero_point", None)
    zero_point = None if packed is None else unpack_from_int32(packed, scheme.bits, scale.shape, packed_dim=0)
    layer = QuantizedLinear(weight, scale, zero_point, state.pop(f"{name}.bias", None), scheme)
    # The layer's own tensors are in place; the rest of the state is loaded by name, and expects them there too.
    state |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    return layer


def _quantization_config(module: nn.Module, quantized: dict[str, QuantizedLinear], *, at_load: bool) -> dict[str, Any]:
    import torch
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    names: dict[WeightScheme, list[str]] = defaultdict(list)
    for name, layer in quantized.items():
        names[layer.scheme].append(name)
    groups = {}
    for index, (scheme, layers) in enumerate(names.items()):
        weights = QuantizationArgs(
            num_bits=scheme.bits,
            type="int",
            symmetric=scheme.symmetric,
            strategy=scheme.granularity,
            group_size=scheme.group_size,
        )
        # One scheme reads best as "every Linear but these"; several need their layers by name.
        groups[f"group_{index}"] = QuantizationScheme(
            targets=["Linear"] if len(names) == 1 else layers, weights=weights
        )
    config = QuantizationConfig(
        config_groups=groups,
        format="pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)],
    )
    stored = dict(config.model_dump(mode="json"))
    if at_load or not all(layer.scheme.symmetric for layer in quantized.values()):
        # transformers 5.23 finds packed zero points only on the way that dequantizes at load (its quantizer otherwise
        # prepares parameters of their unpacked shape), and sentence-transformers 6.2 calls `forward` past the hook that
        # would dequantize later. Others ignore the key.
        stored["dequantize"] = True
    return stored


def _scheme_of(name: str, stored: Any) -> WeightScheme:
    from optkit.quantized import WeightScheme

    for group in stored.config_groups.values():
        if name in group.targets or group.targets == ["Linear"]:
            weights = group.weights
            group_size = weights.group_size if weights.strategy == "group" else None
            return WeightScheme(weights.num_bits, group_size, weights.symmetric)
    raise ValueError(f"no config group of quantization_config names {name}")
