"""The recipe: what a user writes, bound to the plugins that it names.

A relative path inside a recipe is relative to the current directory, as on a command line, not to the recipe's file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.errors import PydanticUserError
from pydantic.json_schema import models_json_schema

from optkit.backends import Backend
from optkit.batching import Batcher
from optkit.binding import Document, bind, read
from optkit.binding.document import Keys, kind_of, spelt
from optkit.datasets import Dataset
from optkit.errors import OptkitError
from optkit.options import Options
from optkit.plugins import Kind, Plugins
from optkit.sources import Source
from optkit.transforms import Transform

__all__ = [
    "Benchmark",
    "Evaluation",
    "Gate",
    "Limit",
    "Recipe",
    "Use",
    "bind_recipe",
    "load_recipe",
    "recipe_schema",
]

T = TypeVar("T", bound=Options)

_SLOTS: tuple[Kind, ...] = ("source", "transform", "backend", "batcher", "dataset")

_PERCENT = re.compile(r"([+-]\d+(?:\.\d+)?)%", re.ASCII)
_RATIO = re.compile(r"(\d+(?:\.\d+)?)x", re.ASCII)
_NO_LIMIT = "is no limit; write a percentage like +3%, a ratio like 1.5x, or a number without quotes"
_LIMIT_SCHEMA = {
    "anyOf": [{"type": "number"}, {"type": "string", "pattern": rf"^({_PERCENT.pattern}|{_RATIO.pattern})$"}]
}


@dataclass(frozen=True, slots=True)
class Limit:
    """What a gate allows."""

    kind: Literal["ratio", "absolute"]
    """`ratio`: of the metric to the baseline's; `absolute`: of the metric itself."""
    value: float


def _limit(text: str | int | float) -> Limit:
    if isinstance(text, int | float):
        return Limit("absolute", float(text))
    if percent := _PERCENT.fullmatch(text):
        ratio = (100 + float(percent[1])) / 100
    elif times := _RATIO.fullmatch(text):
        ratio = float(times[1])
    else:
        raise ValueError(_NO_LIMIT)
    if not 0 < ratio < 1e6:
        raise ValueError("must be above -100% or 0x, and below 1000000x")
    return Limit("ratio", ratio)


def _checked(value: object) -> object:
    if value is not None:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(_NO_LIMIT)
        _limit(value)
    return value


Bound = Annotated[str | int | float | None, BeforeValidator(_checked), WithJsonSchema(_LIMIT_SCHEMA)]


class Gate(Options):
    """A limit on one metric of the optimized model. If the result misses it, nothing is published.

    A limit is relative to the baseline, `+3%`, `-10%` or `1.5x`, or a plain number in the metric's own unit.
    """

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["at_most"]}, {"required": ["at_least"]}]})

    metric: str
    """A metric; `optkit plugins list` shows them."""
    at_most: Bound = None
    """The largest value that passes."""
    at_least: Bound = None
    """The smallest value that passes."""

    @model_validator(mode="after")
    def _one_side(self) -> Gate:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("needs either at_most or at_least; write one of them, and a second gate for the other")
        return self

    @property
    def limit(self) -> Limit:
        """What `at_most` or `at_least` stands for."""
        return next(_limit(bound) for bound in (self.at_most, self.at_least) if bound is not None)


class Benchmark(Options):
    """How speed is measured: prompt and output lengths of a run, and how often it is repeated.

    An encoder embeds the evaluation text; it has no prompt and no output tokens.
    """

    prompt_tokens: int = Field(default=128, ge=1)
    """Tokens of the prompt."""
    output_tokens: int = Field(default=32, ge=8)
    """Tokens to generate."""
    blocks: int = Field(default=6, ge=3, le=1000)
    """Repetitions; each runs the baseline and the optimized model in random order. More narrow the interval."""
    seed: int = Field(default=0, ge=0, le=(1 << 32) - 1)
    """Of the prompts and of the order of runs."""


class EvaluationKeys(Options):
    """How quality is measured: the text, how much of it, and in windows of which length."""

    dataset: Any = "python_reference"
    """A dataset plugin."""
    tokens: int = Field(default=4096, ge=256)
    """Tokens to evaluate; more narrow the interval."""
    context_length: int = Field(default=512, ge=32)
    """Tokens of one window. An encoder reads paragraphs, which are cut at this length."""


class RecipeKeys(Options):
    """A recipe: a model, what is done to its weights, and what runs it."""

    name: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=100)
    """The artifact's name; the name of the recipe's file by default."""
    model: Any
    """Where the model comes from: a source plugin."""
    transforms: tuple[Any, ...] = ()
    """What is done to its weights, in this order: transform plugins."""
    backend: Any = "torch"
    """The runtime: a backend plugin."""
    batching: Any = "static"
    """The batching strategy: a batcher plugin."""
    max_length: int | None = Field(default=None, ge=1)
    """Tokens of one sequence, prompt and output together; by default what the model was trained for, at most 2048."""
    kv_cache_tokens: int | None = Field(default=None, ge=1)
    """Tokens that the KV cache holds for all sequences together; by default what they can use, or what measured free
    memory allows, whichever is less."""
    evaluation: EvaluationKeys = EvaluationKeys()
    benchmark: Benchmark = Benchmark()
    gates: tuple[Gate, ...] | None = None
    """Limits that the result must keep; an empty list means none. By default a causal language model keeps `perplexity`
    within +5% and `decode_tokens_per_second` within -5%, an encoder `embedding_cosine` at 0.95 or more and
    `sequences_per_second` within -5%."""


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
            "evaluation": {
                "dataset": self.evaluation.dataset.resolved(),
                "tokens": self.evaluation.tokens,
                "context_length": self.evaluation.context_length,
            },
            "benchmark": self.benchmark.model_dump(mode="json"),
            "gates": None if self.gates is None else [_written(gate) for gate in self.gates],
        }


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
    recipe = Recipe(
        name=keys.name or _name_of(document.path),
        model=_use("source", keys.model, document, plugins, "model"),
        transforms=tuple(
            _use("transform", node, document, plugins, "transforms", index)
            for index, node in enumerate(keys.transforms)
        ),
        backend=_use("backend", keys.backend, document, plugins, "backend"),
        batching=_use("batcher", keys.batching, document, plugins, "batching"),
        max_length=keys.max_length,
        kv_cache_tokens=keys.kv_cache_tokens,
        evaluation=Evaluation(
            _use("dataset", keys.evaluation.dataset, document, plugins, "evaluation", "dataset"),
            keys.evaluation.tokens,
            keys.evaluation.context_length,
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


def recipe_schema(plugins: Plugins) -> dict[str, Any]:
    """JSON Schema, draft 2020-12, of recipes that use the installed plugins. Those that fail to import are left out."""
    installed = {kind: _classes(kind, plugins) for kind in _SLOTS}
    classes = dict.fromkeys(plugin for named in installed.values() for plugin in named.values())
    models: list[type[Options]] = [RecipeKeys, EvaluationKeys, Gate, *classes]
    references, generated = models_json_schema([(model, "validation") for model in models])
    definitions: dict[str, Any] = generated["$defs"]
    keys = {model: reference["$ref"].rpartition("/")[2] for (model, _), reference in references.items()}
    for kind, named in installed.items():
        variants = [variant for name, plugin in named.items() for variant in _variants(name, plugin, keys[plugin])]
        definitions[f"plugin.{kind}"] = {"oneOf": variants} if variants else {"not": {}}
    definitions[keys[Gate]]["properties"]["metric"]["enum"] = plugins.names("metric")
    definitions[keys[EvaluationKeys]]["properties"]["dataset"] |= _reference("plugin.dataset")
    recipe = definitions.pop(keys[RecipeKeys])
    recipe["properties"]["model"] |= _reference("plugin.source")
    recipe["properties"]["transforms"]["items"] = _reference("plugin.transform")
    recipe["properties"]["backend"] |= _reference("plugin.backend")
    recipe["properties"]["batching"] |= _reference("plugin.batcher")
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **recipe, "title": "optkit recipe", "$defs": definitions}


def _classes(kind: Kind, plugins: Plugins) -> dict[str, type[Options]]:
    found: dict[str, type[Options]] = {}
    for name in plugins.names(kind):
        with suppress(OptkitError, PydanticUserError):
            plugin: type[Options] = plugins.get(kind, name)
            plugin.model_json_schema()  # a plugin that has none must not take the others along
            found[name] = plugin
    return found


def _variants(name: str, plugin: type[Options], key: str) -> Iterator[dict[str, Any]]:
    yield {"type": "object", "properties": {name: _reference(key)}, "required": [name], "additionalProperties": False}
    if not any(option.is_required() for option in plugin.model_fields.values()):
        yield {"const": name}


def _reference(key: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{key}"}
