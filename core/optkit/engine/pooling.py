"""From a token's vectors to a text's: pooling, as the files of sentence-transformers say.

Format: `modules.json` names the modules of the pipeline, `1_Pooling/config.json` how tokens are pooled, and
`sentence_bert_config.json` and `config_sentence_transformers.json` how text becomes tokens; see `Transformer`,
`Pooling` and `SentenceTransformer` of sentence-transformers 2 to 5, https://sbert.net.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from optkit.errors import DamagedError, RecipeError

__all__ = ["Pooling", "Preparation", "pooling_of", "preparation_of"]

Floats = npt.NDArray[np.float32]

_MODES: Mapping[str, Callable[[Floats], Floats]] = {
    "cls": lambda hidden: hidden[0],
    "lasttoken": lambda hidden: hidden[-1],
    "max": lambda hidden: hidden.max(axis=0),
    "mean": lambda hidden: hidden.mean(axis=0),
    "mean_sqrt_len": lambda hidden: hidden.sum(axis=0) / np.sqrt(np.float32(len(hidden))),
}
# In the order in which sentence-transformers joins them, with the old spelling in its configuration.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True, slots=True)
class Pooling:
    """How the vectors of a text's tokens become one vector."""

    modes: tuple[str, ...] = ("mean",)
    """Of several the vectors are joined."""
    normalize: bool = False
    """Whether the result has length 1."""

    def __call__(self, hidden: Floats, *, normalize: bool | None = None) -> Floats:
        """One vector from `[tokens, hidden]` float32, without padding.

        Args:
            hidden: the last layer's output.
            normalize: in the place of the model's own `normalize`.
        """
        parts = [_MODES[mode](hidden) for mode in self.modes]
        pooled: Floats = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if self.normalize if normalize is None else normalize:
            # The smallest divisor of torch.nn.functional.normalize.
            pooled = pooled / np.float32(max(float(np.linalg.norm(pooled)), 1e-12))
        return pooled


@dataclass(frozen=True, slots=True)
class Preparation:
    """What happens to a text before its tokens."""

    lowercase: bool = False
    prompt: str = ""
    """Put before every text."""

    def __call__(self, text: str) -> str:
        text = (self.prompt + text).strip()
        return text.lower() if self.lowercase else text


def pooling_of(files: Mapping[str, str]) -> Pooling:
    """The pooling that a model's files ask for; without `modules.json` the mean, not normalized.

    Args:
        files: contents by path, as `optkit.model.Model.files` has them.

    Raises:
        RecipeError: the pipeline has modules, or a pooling, that optkit does not have.
        DamagedError: a file is not what sentence-transformers writes.
    """
    if "modules.json" not in files:
        return Pooling()
    modes: tuple[str, ...] = ("mean",)
    normalize = False
    for module in _modules(files):
        kind, path = str(module.get("type", "")).rpartition(".")[2], str(module.get("path", ""))
        if kind == "Pooling":
            config = _object(files, f"{path}/config.json")
            modes = _modes(config)
            if config.get("include_prompt") is False and preparation_of(files).prompt:
                raise RecipeError("leaves its prompt out of the pooling, which optkit cannot", where=path)
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise RecipeError("has a module after the encoder that optkit does not have", where=path, found=kind)
    return Pooling(modes, normalize)


def preparation_of(files: Mapping[str, str]) -> Preparation:
    """What a model's files ask to be done to texts; the arguments and errors are those of `pooling_of`."""
    bert, whole = (
        _object(files, name, {}) for name in ("sentence_bert_config.json", "config_sentence_transformers.json")
    )
    prompt = whole.get("default_prompt_name")
    prompts = whole.get("prompts") or {}
    if prompt is not None and prompt not in prompts:
        raise DamagedError(
            "default_prompt_name is none of prompts", where="config_sentence_transformers.json", found=prompt
        )
    return Preparation(bool(bert.get("do_lower_case")), "" if prompt is None else str(prompts[prompt]))


def _modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    given = config.get("pooling_mode")
    if given is None:
        found = [mode for flag, mode in _FLAGS.items() if config.get(flag)]
    else:
        found = [given] if isinstance(given, str) else list(given)
    unknown = [mode for mode in found if mode not in _MODES]
    if unknown or not found:
        raise RecipeError(
            f"pools in a way that optkit does not have (it has {', '.join(_MODES)})",
            where="pooling",
            found=unknown[0] if unknown else "none",
        )
    return tuple(found)


def _modules(files: Mapping[str, str]) -> list[Mapping[str, Any]]:
    data = _parsed(files, "modules.json")
    if not (isinstance(data, list) and all(isinstance(module, dict) for module in data)):
        raise DamagedError("not a list of modules", where="modules.json")
    return data


def _object(files: Mapping[str, str], name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if name not in files and default is not None:
        return default
    data = _parsed(files, name)
    if not isinstance(data, dict):
        raise DamagedError("not a JSON object", where=name)
    return data


def _parsed(files: Mapping[str, str], name: str) -> Any:
    try:
        return json.loads(files[name])
    except KeyError:
        raise DamagedError("modules.json names it, and it is not there", where=name) from None
    except ValueError as error:
        raise DamagedError(f"not readable JSON ({error})", where=name) from error
