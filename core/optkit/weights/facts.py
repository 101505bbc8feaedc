"""What a Hugging Face folder says of its model, read without its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from optkit.errors import DamagedError
from optkit.weights.images import preparation_file

__all__ = [
    "CAUSAL_LM",
    "FEATURE_EXTRACTION",
    "IMAGE_CLASSIFICATION",
    "files_beside",
    "folder_task",
    "sentence_files",
    "tags_of",
    "task_tag",
]

CAUSAL_LM, FEATURE_EXTRACTION = "task:causal-lm", "task:feature-extraction"
IMAGE_CLASSIFICATION = "task:image-classification"
"""Tasks, by the names of Hugging Face's pipelines; an encoder without a head extracts features."""
_SENTENCE_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")


def tags_of(config: Any) -> frozenset[str]:
    """The tags of an untouched model with this transformers configuration."""
    return frozenset({task_tag(config.to_dict()), f"arch:{config.model_type}", "weights:float"})


def task_tag(config: Mapping[str, Any]) -> str:
    """The task of the model that the contents of a `config.json` describe, by the name of its architecture.

    `BertModel` is an encoder without a head, `ResNetForImageClassification` classifies images. Whatever is neither
    counts as a causal language model, which is checked where it is loaded.
    """
    architectures = config.get("architectures") or [""]
    name = str(architectures[0])
    if name.endswith("ForImageClassification"):
        return IMAGE_CLASSIFICATION
    # GPT2LMHeadModel and its like have a head all the same.
    headed = name.endswith(("HeadModel", "HeadsModel"))
    encoder = name.endswith("Model") and not headed and not config.get("is_encoder_decoder")
    return FEATURE_EXTRACTION if encoder else CAUSAL_LM


def folder_task(directory: Path) -> str:
    """The same for the model in a folder.

    Raises:
        DamagedError: its `config.json` cannot be read.
    """
    try:
        return task_tag(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError, TypeError, LookupError) as error:
        raise DamagedError(f"not readable JSON ({error})", where=str(directory / "config.json")) from error


def files_beside(folder: Path, task: str) -> dict[str, str]:
    """The text files in a folder that its model is used with, by path; see `optkit.model.Model.files`.

    Raises:
        DamagedError: as `sentence_files`; or nothing says how images become the numbers that a classifier reads.
    """
    if task == FEATURE_EXTRACTION:
        return sentence_files(folder)
    return preparation_file(folder) if task == IMAGE_CLASSIFICATION else {}


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
