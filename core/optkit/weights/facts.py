"""What a Hugging Face folder says of its model, read without its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from optkit.errors import DamagedError

__all__ = ["CAUSAL_LM", "FEATURE_EXTRACTION", "causal_lm_tags", "holds_encoder", "is_encoder", "sentence_files"]

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
