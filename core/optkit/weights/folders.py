"""Writing and reading the `weights/` folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.errors import DamagedError, MissingError, OptkitError
from optkit.model import Model
from optkit.schemes import SHAPES_ENTRY
from optkit.weights.cache import cache_args, describe_cache, restore_cache, restore_entry
from optkit.weights.compressed import quantization_config, schemes_of, stored_tags, tensors_of, unpacked
from optkit.weights.facts import FEATURE_EXTRACTION, IMAGE_CLASSIFICATION, files_beside, tags_of, task_tag

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["load_folder", "quiet_transformers", "save_folder"]


def quiet_transformers() -> None:
    """Keep transformers from drawing bars and warning on standard error: optkit shows its own progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def save_folder(model: Model, directory: Path) -> None:
    """Write `model` into `directory`, tokenizer included. The folder holds no code and no pickle.

    Raises:
        OptkitError: a convolution has integer weights and float activations, for which there is no format.
    """
    from huggingface_hub import save_torch_state_dict

    from optkit import shapes
    from optkit.quantized import QuantizedConv2d, quantized_layers

    quiet_transformers()
    module: Any = model.module
    for name, part in module.named_modules():
        if isinstance(part, QuantizedConv2d) and part.activations is None:
            what, remedy = "of a convolution weights alone cannot be integers", "quantize its activations too"
            raise OptkitError(f"a weights folder has no format for it: {what}", where=name, remedy=remedy)
    directory.mkdir(parents=True, exist_ok=True)
    quantized = dict(quantized_layers(module))
    state = {name: tensor for name, tensor in module.state_dict().items() if name.rpartition(".")[0] not in quantized}
    for name, source in getattr(module, "all_tied_weights_keys", {}).items():
        if name in state and source in state and _shared(state[name], state[source]):
            del state[name]  # transformers ties it again when it loads
    state |= tensors_of(quantized)
    save_torch_state_dict(state, directory, max_shard_size="4GB")
    module.config.architectures = [type(module).__name__]
    shapes.describe(module)
    describe_cache(module)
    module.config.save_pretrained(directory)
    if quantized or cache_args(module):
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"] = quantization_config(module, quantized, at_load="modules.json" in model.files)
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
        stored = getattr(config, "quantization_config", None)
        own = stored is not None and stored.get("quant_method") != "bitsandbytes"
        own = own or hasattr(config, SHAPES_ENTRY)
        module = _load_own(directory, config) if own else _load_float(directory, config)
        restore_entry(module)
        files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
        has_tokenizer = any((directory / name).is_file() for name in files)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory) if has_tokenizer else None
    except ImportError as error:
        raise MissingError(
            f"its weights are in the format of a library that is missing ({error})",
            where=str(directory),
            remedy="pip install 'optkit[bitsandbytes]'",
        ) from error
    except (ValueError, KeyError, RuntimeError, OSError, TypeError, SafetensorError) as error:
        raise DamagedError(f"cannot be loaded: {error}", where=str(directory)) from error
    if tags is None:
        tags = tags_of(config) | ({"shape:pruned"} if hasattr(config, SHAPES_ENTRY) else set())
    beside = files_beside(directory, task_tag(config.to_dict()))
    return Model(module.eval().requires_grad_(False), tokenizer, tags, beside)


def _auto_class(config: Any) -> Any:
    import transformers

    classes: dict[str, Any] = {
        FEATURE_EXTRACTION: transformers.AutoModel,
        IMAGE_CLASSIFICATION: transformers.AutoModelForImageClassification,
    }
    return classes.get(task_tag(config.to_dict()), transformers.AutoModelForCausalLM)


def _load_float(directory: Path, config: Any) -> Any:
    """What transformers loads by itself: float weights, and those of bitsandbytes in its own layers."""
    import logging

    import torch

    # bitsandbytes says on every product that inputs are cast, which is what its format is.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return _auto_class(config).from_pretrained(directory, dtype=torch.float32)


def _load_own(directory: Path, config: Any) -> Any:
    """What transformers cannot load, or not as optkit's layers: compressed-tensors' formats, and pruned shapes."""
    import torch
    from transformers.initialization import no_init_weights

    from optkit import shapes

    with no_init_weights():
        module: Any = _auto_class(config).from_config(_plain(config), dtype=torch.float32)
    shapes.reshape(module, getattr(config, SHAPES_ENTRY, {}))
    state = _read_state(directory)
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        _unpack(module, state, stored)
    missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
    tied = getattr(module, "all_tied_weights_keys", {}) if getattr(module.config, "tie_word_embeddings", False) else {}
    lacking = [name for name in missing if name not in tied]
    if lacking or unexpected:
        raise ValueError(f"tensors do not fit the configuration: missing {lacking[:3]}, unexpected {unexpected[:3]}")
    module.tie_weights()
    return module


def _plain(config: Any) -> Any:
    """The configuration of the float model."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain


def _unpack(module: Any, state: dict[str, Tensor], described: Mapping[str, Any]) -> None:
    """Put quantized layers, and the scales of a cache, into the model; takes their tensors out of `state`."""
    import torch
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import is_match

    from optkit.quantized import replace_module

    fields = QuantizationConfig.model_fields
    stored = QuantizationConfig.model_validate({k: v for k, v in described.items() if k in fields})
    groups = stored.model_dump(mode="json")
    stored_tags(groups)  # refuses what cannot be read
    layers = dict(module.named_modules())
    for name in sorted(key.removesuffix(".weight_scale") for key in state if key.endswith(".weight_scale")):
        layer = layers.get(name)
        if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            raise ValueError(f"{name} is quantized, and no linear layer or convolution")
        group = next((key for key, group in stored.config_groups.items() if is_match(name, layer, group.targets)), None)
        if group is None:
            raise ValueError(f"no config group of quantization_config names {name}")
        schemes = schemes_of(groups["config_groups"][group])
        replace_module(module, name, unpacked(name, layer, state, schemes))
    if stored.kv_cache_scheme is not None:
        restore_cache(module, state, groups["kv_cache_scheme"])


def _read_state(directory: Path) -> dict[str, Tensor]:
    """Tensors by name; floats of 16 bits become float32."""
    import torch
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        state |= load_file(file)
    half = (torch.float16, torch.bfloat16)
    return {name: tensor.float() if tensor.dtype in half else tensor for name, tensor in state.items()}


def _shared(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape
