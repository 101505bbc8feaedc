"""Models in the Hugging Face format: a folder, or an id of the hub."""

from __future__ import annotations

import difflib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optkit.builtin.files import locate, sha256
from optkit.errors import DamagedError, MissingError, OptkitError, RecipeError
from optkit.model import Model, ModelCard
from optkit.schemes import SHAPES_ENTRY
from optkit.sources import Source
from optkit.weights import CAUSAL_LM, FEATURE_EXTRACTION, IMAGE_CLASSIFICATION, files_beside, sentence_files, task_tag
from optkit.weights.cache import entry_tags
from optkit.weights.compressed import stored_tags
from optkit.weights.images import PREPARATION, labels_of, pixels_of

__all__ = ["HuggingFace", "card_of", "classifier_card_of", "encoder_card_of"]

Shapes = Mapping[str, tuple[int, ...]]


class HuggingFace(Source):
    """A causal language model, a sentence encoder or an image classifier in a Hugging Face folder with safetensors, or
    on the hub.

    Folders in compressed-tensors' pack-quantized, int-quantized and float-quantized formats load as quantized models,
    with one scheme or several. An encoder is a model without a head, whose architecture ends in `Model`; the files of
    sentence-transformers beside it say how long its texts are and how tokens are pooled. The architecture of an image
    classifier ends in `ForImageClassification`; its image processor (`preprocessor_config.json`) prepares the images.
    """

    model: str
    """A folder, `package:NAME/inner/folder`, or a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`. A hub id is
    downloaded on first use into the Hugging Face cache; with `HF_HUB_OFFLINE=1` it must be there already."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""

    def inspect(self) -> ModelCard:
        folder = self._folder()
        config = _json(folder / "config.json")
        shapes: dict[str, tuple[int, ...]] = {}
        for file in _weight_files(folder):
            shapes |= safetensors_shapes(file)
        name = Path(self.model).name
        task = task_tag(config)
        files = files_beside(folder, task)
        if task == IMAGE_CLASSIFICATION:
            return classifier_card_of(config, shapes, files, name=name)
        if task == FEATURE_EXTRACTION:
            tokenizer = folder / "tokenizer_config.json"
            limits = _json(tokenizer) if tokenizer.is_file() else {}
            return encoder_card_of(config, shapes, files, limits, name=name)
        return card_of(config, shapes, name=name)

    def fingerprint(self) -> str:
        folder = self._folder()
        small = [file for file in sorted(folder.iterdir()) if file.suffix in {".json", ".jinja", ".model", ".txt"}]
        deeper = [folder / name for name in sorted(sentence_files(folder)) if "/" in name]
        return sha256([*small, *deeper, *_weight_files(folder)])

    def load(self) -> Model:
        from optkit.weights import load_folder

        folder = self._folder()
        _weight_files(folder)
        return load_folder(folder, tags=self.inspect().tags)

    def _folder(self) -> Path:
        if self.model.startswith("package:") or Path(self.model).expanduser().exists():
            folder = locate(self.model)
            if self.revision is not None:
                what = "revision goes with a hub id, not with a folder"
                raise RecipeError(what, found=self.revision, remedy="remove it")
        else:
            folder = self._download()
        if not (folder / "config.json").is_file():
            remedy = "name a folder with config.json and *.safetensors"
            raise MissingError("no config.json, so no Hugging Face model", where=str(folder), remedy=remedy)
        return folder

    def _download(self) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.constants import HF_HUB_OFFLINE
        from huggingface_hub.errors import HFValidationError

        patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
        try:
            return Path(snapshot_download(self.model, revision=self.revision, allow_patterns=patterns))
        except HFValidationError as error:
            raise MissingError(
                "no such folder, and no hub id either", where=self.model, remedy="check the path"
            ) from error
        except Exception as error:  # the hub's client raises whatever its network stack does
            reason = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else type(error).__name__
            near = difflib.get_close_matches(self.model, [entry.name for entry in Path().iterdir()], n=1)
            remedy = f"did you mean {near[0]!r}?" if near else "check the path or id, or download it first"
            what = f"neither a folder nor available from the hub ({reason})"
            raise MissingError(what, where=self.model, remedy=remedy) from error


def card_of(config: Mapping[str, Any], shapes: Shapes, *, name: str) -> ModelCard:
    """The card of a causal language model.

    Args:
        config: the contents of its `config.json`.
        shapes: of its tensors, by transformers' names.
        name: for people.

    Raises:
        RecipeError: it is another kind of model.
        DamagedError: the configuration lacks what every such model has.
    """
    architectures = config.get("architectures") or ["none"]
    if not any(str(kind).endswith("ForCausalLM") for kind in architectures):
        remedy = "choose one whose architecture ends in ForCausalLM, Model (an encoder) or ForImageClassification"
        what = "is no causal language model, encoder or image classifier"
        raise RecipeError(what, where=name, found=architectures[0], remedy=remedy)
    try:
        layers, hidden, heads = (
            int(config[key]) for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
        )
        kv_heads = int(config.get("num_key_value_heads") or heads)
        head_dim = int(config.get("head_dim") or hidden // heads)
        vocab, architecture = int(config["vocab_size"]), str(config["model_type"])
        tied = bool(config.get("tie_word_embeddings", True)) and "lm_head.weight" not in shapes
        linears = _linears(shapes)
        if tied:
            linears["lm_head"] = (vocab, hidden)
        return ModelCard(
            name=name,
            tags=frozenset({CAUSAL_LM, f"arch:{architecture}"}) | _weight_tags(config) | _shape_tags(config),
            linears=linears,
            parameters=sum(_count(shape) for shape in shapes.values()),
            bytes_per_parameter=4,
            vocab_size=vocab,
            hidden_size=hidden,
            layers=layers,
            max_length=int(config.get("max_position_embeddings", 2048)),
            kv_values_per_token=_cached(shapes) or 2 * layers * kv_heads * head_dim,
            tied_head=tied,
            head_size=head_dim,
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DamagedError(f"config.json is incomplete ({type(error).__name__}: {error})", where=name) from error


# Their position embeddings begin behind the padding token's, so that many of them are never used.
_OFFSET_POSITIONS = {"camembert", "data2vec-text", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"}


def encoder_card_of(
    config: Mapping[str, Any], shapes: Shapes, files: Mapping[str, str], tokenizer: Mapping[str, Any], *, name: str
) -> ModelCard:
    """The card of an encoder without a head.

    Args:
        config: the contents of its `config.json`.
        shapes: of its tensors, by transformers' names.
        files: those of sentence-transformers, by path.
        tokenizer: the contents of its `tokenizer_config.json`.
        name: for people.

    Raises:
        RecipeError: its pooling, or what comes after it, is nothing that optkit has.
        DamagedError: the configuration lacks what every such model has.
    """
    from optkit.engine.pooling import pooling_of, preparation_of

    try:
        pooling_of(files), preparation_of(files)
    except OptkitError as error:
        where = f"{name}/{error.where}" if error.where else name
        raise type(error)(error.what, where=where, found=error.found, remedy=error.remedy) from error
    try:
        architecture = str(config["model_type"])
        positions = int(config.get("max_position_embeddings") or config.get("n_positions") or 512)
        if architecture in _OFFSET_POSITIONS:
            positions -= int(config.get("pad_token_id", 1)) + 1
        # As sentence-transformers has it: its own figure before the tokenizer's, and never beyond the positions.
        own = json.loads(files.get("sentence_bert_config.json", "{}")).get("max_seq_length")
        trained = own or tokenizer.get("model_max_length")
        return ModelCard(
            name=name,
            tags=frozenset({FEATURE_EXTRACTION, f"arch:{architecture}"}) | _weight_tags(config) | _shape_tags(config),
            linears=_linears(shapes),
            # Old files carry the numbers of the positions beside the weights.
            parameters=sum(_count(shape) for key, shape in shapes.items() if not key.endswith("position_ids")),
            bytes_per_parameter=4,
            vocab_size=int(config["vocab_size"]),
            hidden_size=int(config.get("hidden_size") or config["dim"]),
            layers=int(config.get("num_hidden_layers") or config["n_layers"]),
            max_length=min(positions, int(trained or positions)),
            kv_values_per_token=0,
            tied_head=False,
            head_size=int(config["hidden_size"]) // int(config["num_attention_heads"])
            if {"hidden_size", "num_attention_heads"} <= config.keys()
            else 0,
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DamagedError(f"config.json is incomplete ({type(error).__name__}: {error})", where=name) from error


# Of batch norms: they are learnt, but not trained.
_STATISTICS = (".running_mean", ".running_var", ".num_batches_tracked")


def classifier_card_of(config: Mapping[str, Any], shapes: Shapes, files: Mapping[str, str], *, name: str) -> ModelCard:
    """The card of an image classifier.

    Args:
        config: the contents of its `config.json`.
        shapes: of its tensors, by transformers' names.
        files: holds its `preprocessor_config.json`.
        name: for people.

    Raises:
        DamagedError: a configuration lacks what every such model has.
    """
    try:
        pixels = pixels_of(config, files[PREPARATION])
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"{PREPARATION} says no size ({error})", where=name) from error
    try:
        # Of models in stages the last is the widest.
        hidden = config.get("hidden_size") or (config.get("hidden_sizes") or config.get("embed_dims") or [0])[-1]
        return ModelCard(
            name=name,
            tags=frozenset({IMAGE_CLASSIFICATION, f"arch:{config['model_type']}"})
            | _weight_tags(config)
            | _shape_tags(config),
            linears=_linears(shapes),
            parameters=sum(_count(shape) for key, shape in shapes.items() if not key.endswith(_STATISTICS)),
            bytes_per_parameter=4,
            vocab_size=0,
            hidden_size=int(hidden),
            layers=int(config.get("num_hidden_layers") or sum(config.get("depths") or ())),
            max_length=1,
            kv_values_per_token=0,
            tied_head=False,
            convolutions={
                key.removesuffix(".weight"): (shape[0], shape[1], shape[2], shape[3])
                for key, shape in shapes.items()
                if len(shape) == 4 and key.endswith(".weight")
            },
            pixels=pixels,
            labels=labels_of(config),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DamagedError(f"config.json is incomplete ({type(error).__name__}: {error})", where=name) from error


_BESIDE_WEIGHTS = (
    ".weight_packed",
    ".weight_scale",
    ".weight_zero_point",
    ".input_scale",
    ".input_zero_point",
    ".k_scale",
    ".v_scale",
)


def safetensors_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, by name; only its header is read.

    Packed integers count with the shape of the weights that they stand for, scales and zero points not at all.
    Format: https://github.com/huggingface/safetensors#format

    Raises:
        DamagedError: the header is not that of a safetensors file.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100_000_000:
                raise ValueError("header too long")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            shapes: dict[str, tuple[int, ...]] = {}
            for name, entry in header.items():
                if name.endswith(".weight_shape"):
                    stream.seek(8 + length + entry["data_offsets"][0])
                    shapes[name.removesuffix("_shape")] = struct.unpack("<2q", stream.read(16))
                elif not name.endswith(_BESIDE_WEIGHTS):
                    shapes[name] = tuple(entry["shape"])
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        remedy = "get it again"
        raise DamagedError(f"not a readable safetensors file ({error})", where=str(file), remedy=remedy) from error
    return shapes


def _weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise MissingError(
            "no *.safetensors in the folder",
            where=str(folder),
            remedy="save the model with safetensors; optkit reads no pickle",
        )
    return files


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(f"not readable JSON ({error})", where=str(file)) from error
    if not isinstance(data, dict):
        raise DamagedError("not a JSON object", where=str(file))
    return data


def _weight_tags(config: Mapping[str, Any]) -> frozenset[str]:
    stored, cache = config.get("quantization_config"), entry_tags(config)
    if stored is None:
        return frozenset({"weights:float"}) | cache
    try:
        return stored_tags(stored) | {"weights:float"} | cache
    except ValueError:
        return frozenset({f"weights:{stored.get('quant_method', 'quantized')}"})


def _shape_tags(config: Mapping[str, Any]) -> frozenset[str]:
    return frozenset({"shape:pruned"}) if SHAPES_ENTRY in config else frozenset()


def _cached(shapes: Shapes) -> int:
    """Numbers that layers keep of a token, where keys and values have layers of their own; else 0."""
    # The second factor of a layer of low rank gives what it keeps.
    endings = (".k_proj.weight", ".v_proj.weight", ".k_proj.1.weight", ".v_proj.1.weight")
    return sum(shape[0] for name, shape in shapes.items() if name.endswith(endings))


def _linears(shapes: Shapes) -> dict[str, tuple[int, int]]:
    return {
        key.removesuffix(".weight"): (shape[0], shape[1]) for key, shape in shapes.items() if _is_linear(key, shape)
    }


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    own = name.rpartition(".")[0].rpartition(".")[2]
    # Embeddings, and MPNet's and T5's tables of what distances between tokens add to scores.
    return len(shape) == 2 and name.endswith(".weight") and "embed" not in own and own != "relative_attention_bias"


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
