"""A recipe with its plugins: what a user wrote, bound to the classes that it names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from optkit.backends import Backend
from optkit.batching import Batcher
from optkit.binding import Document, bind, read
from optkit.binding.document import Keys, kind_of, spelt
from optkit.datasets import Dataset
from optkit.errors import OptkitError
from optkit.options import Options
from optkit.plugins import Kind, Plugins
from optkit.recipe.keys import Benchmark, CalibrationKeys, Gate, RecipeKeys
from optkit.sources import Source
from optkit.transforms import Transform

__all__ = ["CalibrationData", "Evaluation", "Recipe", "Use", "bind_recipe", "load_recipe"]

T = TypeVar("T", bound=Options)


@dataclass(frozen=True)
class Use(Generic[T]):
    """A plugin that a recipe names, with its options."""

    name: str
    options: T
    """An instance of the plugin's class."""
    distribution: str
    version: str

    def resolved(self) -> dict[str, Any]:
        """The recipe's node for it, every default filled in."""
        return {self.name: self.options.model_dump(mode="json", by_alias=True, round_trip=True)}


@dataclass(frozen=True)
class Evaluation:
    """See `EvaluationKeys`."""

    dataset: Use[Dataset]
    tokens: int
    context_length: int
    images: int


@dataclass(frozen=True)
class CalibrationData:
    """See `CalibrationKeys`."""

    dataset: Use[Dataset]
    samples: int
    sequence_length: int


@dataclass(frozen=True)
class Recipe:
    """A recipe whose every name and option was checked. Two are equal if they ask for the same, wherever it stands."""

    name: str
    model: Use[Source]
    transforms: tuple[Use[Transform], ...]
    backend: Use[Backend]
    batching: Use[Batcher]
    max_length: int | None
    kv_cache_tokens: int | None
    calibration: CalibrationData | None
    """None where no transform runs the model on data."""
    evaluation: Evaluation
    benchmark: Benchmark
    gates: tuple[Gate, ...] | None
    """None: those of the model's task, which planning puts here."""
    document: Document = field(compare=False, repr=False)

    def resolved(self) -> dict[str, Any]:
        """The recipe as JSON data with every default filled in; binding it again gives an equal recipe."""
        return {
            "name": self.name,
            "model": self.model.resolved(),
            "transforms": [use.resolved() for use in self.transforms],
            "backend": self.backend.resolved(),
            "batching": self.batching.resolved(),
            "max_length": self.max_length,
            "kv_cache_tokens": self.kv_cache_tokens,
            "calibration": None
            if self.calibration is None
            else {
                "dataset": self.calibration.dataset.resolved(),
                "samples": self.calibration.samples,
                "sequence_length": self.calibration.sequence_length,
            },
            "evaluation": {
                "dataset": self.evaluation.dataset.resolved(),
                "tokens": self.evaluation.tokens,
                "context_length": self.evaluation.context_length,
                "images": self.evaluation.images,
            },
            "benchmark": self.benchmark.model_dump(mode="json"),
            "gates": None if self.gates is None else [_written(gate) for gate in self.gates],
        }

    def placed(self, error: OptkitError, *keys: str | int) -> OptkitError:
        """The same error with its place in the recipe before the file that it names."""
        what = f"{error.where}: {error.what}" if error.where else error.what
        return type(error)(what, where=self.document.where(*keys), found=error.found, remedy=error.remedy)


def _written(gate: Gate) -> dict[str, Any]:
    return gate.model_dump(mode="json", exclude_none=True)


def load_recipe(path: Path, plugins: Plugins) -> Recipe:
    """The recipe in a file. For the errors see `optkit.binding.read` and `bind_recipe`."""
    return bind_recipe(read(path), plugins)


def bind_recipe(document: Document, plugins: Plugins) -> Recipe:
    """The recipe in a document. Imports the plugins that it names, and no others.

    Raises:
        RecipeError: a key, value, plugin or metric that does not exist or does not fit; with position and remedy.
        MissingError: a plugin that it names cannot be imported.
    """
    keys = bind(RecipeKeys, document.data, document)
    transforms = tuple(
        _use("transform", node, document, plugins, "transforms", index) for index, node in enumerate(keys.transforms)
    )
    recipe = Recipe(
        name=keys.name or _name_of(document.path),
        model=_use("source", keys.model, document, plugins, "model"),
        transforms=transforms,
        backend=_use("backend", keys.backend, document, plugins, "backend"),
        batching=_use("batcher", keys.batching, document, plugins, "batching"),
        max_length=keys.max_length,
        kv_cache_tokens=keys.kv_cache_tokens,
        calibration=_calibration(keys, transforms, document, plugins),
        evaluation=Evaluation(
            _use("dataset", keys.evaluation.dataset, document, plugins, "evaluation", "dataset"),
            keys.evaluation.tokens,
            keys.evaluation.context_length,
            keys.evaluation.images,
        ),
        benchmark=keys.benchmark,
        gates=keys.gates,
        document=document,
    )
    _check_gates(recipe.gates or (), document, plugins)
    return recipe


def _name_of(path: str) -> str:
    name = re.sub(r"[^a-z0-9._-]+", "-", Path(path).stem.lower()).strip("._-")
    return name[:100] or "recipe"


def _calibration(
    keys: RecipeKeys, transforms: tuple[Use[Transform], ...], document: Document, plugins: Plugins
) -> CalibrationData | None:
    if not any(use.options.calibration for use in transforms):
        if keys.calibration is not None:
            what = "no transform of this recipe runs the model on data"
            raise document.error(what, "calibration", remedy="remove it")
        return None
    asked = keys.calibration or CalibrationKeys()
    dataset = _use("dataset", asked.dataset, document, plugins, "calibration", "dataset")
    return CalibrationData(dataset, asked.samples, asked.sequence_length)


def _use(kind: Kind, node: Any, document: Document, plugins: Plugins, *keys: str | int) -> Use[Any]:
    name, options, place = _named(kind, node, document, keys)
    offer = plugins.find(kind, name, where=document.where(*place))
    plugin: type[Options] = plugins.get(kind, name, where=document.where(*place))
    return Use(name, bind(plugin, options, document, *keys, name), offer.distribution, offer.version)


def _named(kind: Kind, node: Any, document: Document, keys: Keys) -> tuple[str, dict[str, Any], Keys]:
    """The name of the plugin that a node stands for, its options, and the path of the name."""
    match node:
        case str() if node:
            return node, {}, keys
        case dict() if len(node) == 1:
            [(name, options)] = node.items()
            if isinstance(options, dict):
                return name, options, (*keys, name)
            what = f"must be a mapping of options, found {kind_of(options)}"
            raise document.error(
                what, *keys, name, remedy=f"write {spelt(name)}: {{KEY: VALUE}}, or {spelt(name)} alone"
            )
        case dict() if node:
            first, *others = (spelt(key) for key in node)
            below = node[next(iter(node))] is None
            item = "start each one with '- '" if kind == "transform" else "keep one"
            remedy = f"indent {', '.join(others)} further, as options of {first}" if below else item
            raise document.error(f"must name one {kind}, found {', '.join([first, *others])}", *keys, remedy=remedy)
    found = "an empty mapping" if node == {} else kind_of(node)
    raise document.error(f"must name one {kind}, found {found}", *keys, remedy="write NAME or NAME: {KEY: VALUE}")


def _check_gates(gates: tuple[Gate, ...], document: Document, plugins: Plugins) -> None:
    seen: dict[tuple[str, bool], int] = {}
    for index, gate in enumerate(gates):
        plugins.find("metric", gate.metric, where=document.where("gates", index, "metric"))
        first = seen.setdefault((gate.metric, gate.at_most is None), index)
        if first != index:
            side = "at_least" if gate.at_most is None else "at_most"
            what = f"a second {side} for {gate.metric}, gates[{first}] is the first"
            raise document.error(what, "gates", index, remedy="remove one of them")
