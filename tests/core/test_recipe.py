"""Recipes: bound to plugins, resolved and bound again, described by a schema, and refused in one line."""

# ruff: noqa: E501 - a message stands in one line, verbatim

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from optkit.backends import Backend, Lowering, TokenSession
from optkit.batching import Batcher, MemoryView, SequenceView, Wait
from optkit.binding import from_data, parse
from optkit.datasets import TextDataset
from optkit.errors import MissingError, OptkitError, RecipeError
from optkit.hookspecs import Registration, hookimpl
from optkit.metrics import Run, RunMetric
from optkit.model import Model, ModelCard
from optkit.options import Options
from optkit.plugins import Plugins
from optkit.recipe import Benchmark, Gate, Limit, Recipe, bind_recipe, load_recipe, recipe_schema
from optkit.sources import Source
from optkit.steps import Limits, StepPlan
from optkit.transforms import Transform, TransformContext


class Folder(Source):
    """A model in a folder."""

    path: str
    """The folder."""
    revision: str = "main"

    def inspect(self) -> ModelCard:
        raise MissingError("no such folder", where=self.path)

    def fingerprint(self) -> str:
        return "0" * 64

    def load(self) -> Model:
        raise MissingError("no such folder", where=self.path)


class Part(Options):
    """A nested section."""

    ratio: float = Field(default=0.5, gt=0, lt=1)


class Round(Transform):
    """Rounds the weights."""

    bits: int = Field(default=8, ge=2, le=8)
    mode: Literal["channel", "group"] = "channel"
    group_size: int | None = None
    share: float = 0.5
    ignore: tuple[str, ...] = ("lm_head",)
    part: Part = Part()
    labels: dict[str, int] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _groups(self) -> Round:
        if (self.mode == "group") != (self.group_size is not None):
            raise ValueError("group_size goes with mode: group; give both or neither")
        return self

    def provides(self) -> frozenset[str]:
        return frozenset({f"weights:int{self.bits}-channel"})

    def apply(self, model: Model, context: TransformContext) -> Model:
        return model.tagged(*self.provides())


class Eager(Backend):
    """Runs nothing."""

    threads: int = 1

    def unavailable(self) -> str | None:
        return None

    def lowering(self, tags: frozenset[str]) -> Mapping[str, Lowering]:
        return {}

    def compile(self, model: Model, directory: Path) -> None:
        (directory / "empty").touch()

    def open(self, runtime: Path, weights: Path, limits: Limits) -> TokenSession:
        raise MissingError("nothing to open")


class One(Batcher):
    """One at a time."""

    max_batch_size: int = Field(default=1, ge=1)

    @property
    def max_sequences(self) -> int:
        return self.max_batch_size

    def plan(
        self, waiting: Sequence[SequenceView], running: Sequence[SequenceView], memory: MemoryView, now: float
    ) -> StepPlan | Wait:
        return Wait(None)


class Text(TextDataset):
    """A text."""

    text: str = "hello"

    def texts(self) -> Iterator[str]:
        yield self.text


class Speed(RunMetric):
    """Tokens in a second."""

    unit: ClassVar[str] = "1/s"
    better: ClassVar[Literal["higher", "lower"]] = "higher"

    def of(self, run: Run) -> float:
        return 1.0


class Everything:
    """A plugin of each kind, one that cannot be imported and one that is not what it says."""

    @hookimpl
    def register_sources(self) -> Registration:
        return {"folder": Folder}

    @hookimpl
    def register_transforms(self) -> Registration:
        return {"round": Round, "round.again": Round, "broken": "no_such_module:Broken", "mistaken": Eager}

    @hookimpl
    def register_backends(self) -> Registration:
        return {"torch": Eager}

    @hookimpl
    def register_batchers(self) -> Registration:
        return {"static": One}

    @hookimpl
    def register_datasets(self) -> Registration:
        return {"python_reference": Text}

    @hookimpl
    def register_metrics(self) -> Registration:
        return {"perplexity": Speed, "decode_tokens_per_second": Speed, "absent": "no_such_module:Metric"}


class Twin:
    @hookimpl
    def register_backends(self) -> Registration:
        return {"torch": Eager}


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    plugins = Plugins()
    plugins.register(Everything(), "everything", "optkit-everything", "1.2")
    return plugins


MODEL = "model:\n  folder: {path: smol}\n"

FULL = """\
name: quickstart
model:
  folder: {path: "package:smol/model", revision: v2}
transforms:
  - round: {bits: 4, mode: group, group_size: 32, ignore: []}
  - round.again
backend:
  torch: {}
batching:
  static: {max_batch_size: 4}
max_length: 1024
evaluation:
  dataset: {python_reference: {text: notes}}
  tokens: 1024
  context_length: 128
benchmark: {prompt_tokens: 64, output_tokens: 16, blocks: 3, seed: 7}
gates:
  - {metric: perplexity, at_most: +3%}
  - {metric: decode_tokens_per_second, at_least: 1.5x}
"""


def test_a_recipe_is_bound_to_its_plugins(plugins: Plugins) -> None:
    recipe = bind_recipe(parse(FULL, "recipes/full.yaml"), plugins)
    assert recipe.name == "quickstart"
    assert recipe.model.options == Folder(path="package:smol/model", revision="v2")
    assert [use.name for use in recipe.transforms] == ["round", "round.again"]
    assert recipe.transforms[0].options == Round(bits=4, mode="group", group_size=32, ignore=())
    assert recipe.transforms[1].options == Round()
    assert (recipe.transforms[0].distribution, recipe.transforms[0].version) == ("optkit-everything", "1.2")
    assert (recipe.backend.name, recipe.backend.options) == ("torch", Eager())
    assert recipe.batching.options.max_sequences == 4
    assert recipe.max_length == 1024
    assert recipe.evaluation.dataset.options == Text(text="notes")
    assert (recipe.evaluation.tokens, recipe.evaluation.context_length) == (1024, 128)
    assert recipe.benchmark == Benchmark(prompt_tokens=64, output_tokens=16, blocks=3, seed=7)
    assert [gate.limit for gate in recipe.gates] == [Limit("ratio", 1.03), Limit("ratio", 1.5)]
    assert recipe.document.text == FULL
    assert recipe.document.where("backend", recipe.backend.name) == "recipes/full.yaml:8:3"


def test_defaults_are_filled_in(plugins: Plugins) -> None:
    recipe = bind_recipe(parse(MODEL, "recipes/Llama 3 int8.yaml"), plugins)
    assert recipe.resolved() == {
        "name": "llama-3-int8",
        "model": {"folder": {"path": "smol", "revision": "main"}},
        "transforms": [],
        "backend": {"torch": {"threads": 1}},
        "batching": {"static": {"max_batch_size": 1}},
        "max_length": None,
        "kv_cache_tokens": None,
        "calibration": None,
        "evaluation": {
            "dataset": {"python_reference": {"text": "hello"}},
            "tokens": 4096,
            "context_length": 512,
            "images": 256,
        },
        "benchmark": {"prompt_tokens": 128, "output_tokens": 32, "blocks": 6, "seed": 0},
        "gates": None,
    }
    assert bind_recipe(parse(MODEL), plugins).name == "recipe"


def test_equality_is_about_what_is_asked_for(plugins: Plugins) -> None:
    one, other = bind_recipe(parse(FULL, "a.yaml"), plugins), bind_recipe(parse("# moved\n" + FULL, "b.yaml"), plugins)
    assert one == other
    assert bind_recipe(parse(FULL.replace("seed: 7", "seed: 8")), plugins) != one


LIMITS = (
    st.integers(-(10**6), 10**6)
    | st.floats(-1e6, 1e6)
    | st.integers(-99, 10**6).map(lambda percent: f"{percent:+d}%")
    | st.decimals(0, 100, places=2).map(lambda percent: f"+{percent}%")
    | st.integers(1, 10**6 - 1).map(lambda ratio: f"{ratio}x")
)
NAMES = st.text(max_size=8).filter(lambda text: "\0" not in text)
ROUND = st.fixed_dictionaries(
    {},
    optional={
        "bits": st.integers(2, 8),
        "share": st.floats(allow_nan=False, allow_infinity=False) | st.integers(-5, 5),
        "ignore": st.lists(NAMES, max_size=3),
        "part": st.fixed_dictionaries({}, optional={"ratio": st.floats(0.01, 0.99)}),
        "labels": st.dictionaries(NAMES, st.integers(), max_size=3),
    },
) | st.integers(1, 99).map(lambda size: {"mode": "group", "group_size": size})
RECIPES = st.fixed_dictionaries(
    {"model": st.builds(lambda path: {"folder": {"path": path}}, NAMES)},
    optional={
        "name": st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True),
        "transforms": st.lists(
            st.just("round") | st.sampled_from(["round", "round.again"]).flatmap(lambda name: ROUND.map(lambda o: {name: o})),
            max_size=3,
        ),
        "backend": st.just("torch") | st.builds(lambda n: {"torch": {"threads": n}}, st.integers()),
        "batching": st.builds(lambda n: {"static": {"max_batch_size": n}}, st.integers(1, 64)),
        "max_length": st.none() | st.integers(1, 10**6),
        "evaluation": st.fixed_dictionaries(
            {},
            optional={
                "dataset": st.builds(lambda text: {"python_reference": {"text": text}}, NAMES),
                "tokens": st.integers(256, 10**6),
                "context_length": st.integers(32, 10**6),
            },
        ),
        "benchmark": st.fixed_dictionaries({}, optional={"output_tokens": st.integers(8, 99), "blocks": st.integers(3, 1000)}),
        "gates": st.lists(
            st.builds(
                lambda metric, side, limit: {"metric": metric, side: limit},
                st.sampled_from(["perplexity", "decode_tokens_per_second"]),
                st.sampled_from(["at_most", "at_least"]),
                LIMITS,
            ),
            max_size=4,
            unique_by=lambda gate: (gate["metric"], "at_most" in gate),
        ),
    },
)  # fmt: skip


@given(RECIPES)
def test_a_resolved_recipe_binds_to_an_equal_one(data: dict[str, Any]) -> None:
    plugins = Plugins()
    plugins.register(Everything(), "everything", "optkit-everything", "1.2")
    recipe = bind_recipe(from_data(data), plugins)
    resolved = recipe.resolved()
    again = bind_recipe(from_data(resolved), plugins)
    assert again == recipe
    assert again.resolved() == resolved
    assert bind_recipe(parse(json.dumps(resolved)), plugins) == recipe
    for key in ("name", "max_length"):
        assert key not in data or resolved[key] == data[key]
    assert len(recipe.transforms) == len(data.get("transforms", []))
    assert resolved["gates"] == data.get("gates")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["folder", "round", "path", "metric", "at_most", "dataset", ""]), inner, max_size=3)), st.sampled_from(["model", "transforms", "backend", "batching", "evaluation", "benchmark", "gates", "name"]))  # fmt: skip
def test_whatever_a_slot_holds_is_bound_or_refused_in_one_line(value: Any, key: str) -> None:
    plugins = Plugins()
    plugins.register(Everything(), "everything")
    try:
        recipe = bind_recipe(from_data({"model": {"folder": {"path": "x"}}, key: value}, "api"), plugins)
    except OptkitError as error:
        line = str(error)
    else:
        assert isinstance(recipe, Recipe)
        line = "api: fine"
    assert line.startswith("api: ")
    assert line.isprintable()


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("+3%", Limit("ratio", 1.03)),
        ("-10%", Limit("ratio", 0.9)),
        ("+0%", Limit("ratio", 1.0)),
        ("+2.5%", Limit("ratio", 1.025)),
        ("1.5x", Limit("ratio", 1.5)),
        ("1x", Limit("ratio", 1.0)),
        (22, Limit("absolute", 22.0)),
        (0.05, Limit("absolute", 0.05)),
        (-1, Limit("absolute", -1.0)),
    ],
)
def test_limits(limit: str | float, expected: Limit) -> None:
    assert Gate(metric="perplexity", at_most=limit).limit == expected
    assert Gate(metric="perplexity", at_least=limit).limit == expected


SHAPE = "write NAME or NAME: {KEY: VALUE}"
LIMIT = "write a percentage like +3%, a ratio like 1.5x, or a number without quotes"
SIDES = "needs either at_most or at_least; write one of them, and a second gate for the other"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("transforms:\n  - round: {bits: 12}", "4:13: transforms[0].round.bits: must be 2 to 8, found 12"),
        ("transforms:\n  - round: {bit: 4}", "4:13: transforms[0].round.bit: unknown key; did you mean 'bits'? (known keys: bits, mode, group_size, share, ignore, part, labels)"),
        ("transforms:\n  - round: {mode: group}", "4:5: transforms[0].round: group_size goes with mode: group; give both or neither"),
        ("transforms:\n  - round:\n      part:\n        ratio: 1", "6:9: transforms[0].round.part.ratio: must be more than 0 and less than 1, found 1"),
        ("transforms:\n  - rund", "4:5: unknown transform, found 'rund'; did you mean 'round'?"),
        ("transforms:\n  - round\n  - zzz: {}", "5:5: unknown transform, found 'zzz'; installed are: broken, mistaken, round, round.again"),
        ("transforms:\n  - broken", "4:5: plugin 'everything' of optkit-everything 1.2 failed to load 'no_such_module:Broken': ModuleNotFoundError: No module named 'no_such_module'; update optkit-everything, or leave it out with --block everything"),
        ("transforms:\n  - mistaken", "4:5: plugin 'everything' of optkit-everything 1.2 offers 'mistaken' as a transform, but it is no Transform"),
        ("transforms:\n  - round:\n    bits: 4\n    share: 1", "4:5: transforms[0]: must name one transform, found round, bits, share; indent bits, share further, as options of round"),
        ("transforms:\n  - round: {}\n    round.again: {}", "4:5: transforms[0]: must name one transform, found round, round.again; start each one with '- '"),
        ("transforms:\n  - round:", "4:5: transforms[0].round: must be a mapping of options, found null; write round: {KEY: VALUE}, or round alone"),
        ("transforms:\n  - round: 4", "4:5: transforms[0].round: must be a mapping of options, found 4; write round: {KEY: VALUE}, or round alone"),
        ("transforms:\n  - round: [bits]", "4:5: transforms[0].round: must be a mapping of options, found a list; write round: {KEY: VALUE}, or round alone"),
        ("transforms:\n  -\n  - round", f"4:4: transforms[0]: must name one transform, found null; {SHAPE}"),
        ("transforms: [[round]]", f"3:14: transforms[0]: must name one transform, found a list; {SHAPE}"),
        ("transforms: [4]", f"3:14: transforms[0]: must name one transform, found 4; {SHAPE}"),
        ("transforms: round", "3:1: transforms: must be a list, found 'round'; write [\"round\"]"),
        ("transforms: {round: {}}", "3:1: transforms: must be a list, found a mapping; start each item with '- '"),
        ("transforms:", "3:1: transforms: must be a list, found null; give it a value, or leave the key out"),
        ("backend: onnx", "3:1: unknown backend, found 'onnx'; installed are: torch"),
        ("backend: {onnx: {}}", "3:11: unknown backend, found 'onnx'; installed are: torch"),
        ("backend: [torch]", f"3:1: backend: must name one backend, found a list; {SHAPE}"),
        ("backend: {}", f"3:1: backend: must name one backend, found an empty mapping; {SHAPE}"),
        ("backend: ''", f"3:1: backend: must name one backend, found ''; {SHAPE}"),
        ("backend: {torch: {}, onnx: {}}", "3:1: backend: must name one backend, found torch, onnx; keep one"),
        ("batching: {static: {max_batch_size: 0}}", "3:21: batching.static.max_batch_size: must be at least 1, found 0"),
        ("max_length: 0", "3:1: max_length: must be at least 1, found 0"),
        ("evaluation: {tokens: 100}", "3:14: evaluation.tokens: must be at least 256, found 100"),
        ("evaluation: {context_length: 1}", "3:14: evaluation.context_length: must be at least 32, found 1"),
        ("evaluation: {dataset: wikitext}", "3:14: unknown dataset, found 'wikitext'; installed are: python_reference"),
        ("evaluation:\n  dataset: {python_reference: {text: 4}}", "4:32: evaluation.dataset.python_reference.text: must be a string, found 4; put it in quotes"),
        ("evaluation:", "3:1: evaluation: must be a mapping, found null; give it a value, or leave the key out"),
        ("benchmark: {blocks: 2}", "3:13: benchmark.blocks: must be 3 to 1000, found 2"),
        ("benchmark: {prompt_tokens: 0}", "3:13: benchmark.prompt_tokens: must be at least 1, found 0"),
        ("benchmark: {output_tokens: 7}", "3:13: benchmark.output_tokens: must be at least 8, found 7"),
        ("benchmark: {seed: -1}", "3:13: benchmark.seed: must be 0 to 4294967295, found -1"),
        ("gates: [{metric: perplexty, at_most: 1x}]", "3:10: unknown metric, found 'perplexty'; did you mean 'perplexity'?"),
        ("gates: [{metric: perplexity}]", f"3:9: gates[0]: {SIDES}"),
        ("gates: [{metric: perplexity, at_most: 1, at_least: 1}]", f"3:9: gates[0]: {SIDES}"),
        ("gates: [{at_most: 1}]", "3:9: gates[0]: metric is missing; add metric: VALUE"),
        ("gates: [{metric: perplexity, at_most: 3%}]", f"3:30: gates[0].at_most: is no limit, found '3%'; {LIMIT}"),
        ("gates: [{metric: perplexity, at_most: '3'}]", f"3:30: gates[0].at_most: is no limit, found '3'; {LIMIT}"),
        ("gates: [{metric: perplexity, at_most: true}]", f"3:30: gates[0].at_most: is no limit, found true; {LIMIT}"),
        ("gates: [{metric: perplexity, at_most: [1]}]", f"3:30: gates[0].at_most: is no limit; {LIMIT}"),
        ("gates: [{metric: perplexity, at_most: x1.5}]", f"3:30: gates[0].at_most: is no limit, found 'x1.5'; {LIMIT}"),
        ("gates: [{metric: perplexity, at_most: -100%}]", "3:30: gates[0].at_most: must be above -100% or 0x, and below 1000000x, found '-100%'"),
        ("gates: [{metric: perplexity, at_most: 0x}]", "3:30: gates[0].at_most: must be above -100% or 0x, and below 1000000x, found '0x'"),
        ("gates: [{metric: perplexity, at_most: 9999999x}]", "3:30: gates[0].at_most: must be above -100% or 0x, and below 1000000x, found '9999999x'"),
        ("gates:\n- {metric: perplexity, at_most: 1}\n- {metric: perplexity, at_least: 1}\n- {metric: perplexity, at_most: 2}", "6:3: gates[2]: a second at_most for perplexity, gates[0] is the first; remove one of them"),
        ("name: My Recipe", "3:1: name: must match ^[a-z0-9][a-z0-9._-]*$, found 'My Recipe'"),
        ("name: ..", "3:1: name: must match ^[a-z0-9][a-z0-9._-]*$, found '..'"),
        ("transform: []", "3:1: transform: unknown key; did you mean 'transforms'? (known keys: name, model, transforms, backend, batching, max_length, kv_cache_tokens, calibration, evaluation, benchmark, gates)"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_in_one_line(plugins: Plugins, text: str, expected: str) -> None:
    with pytest.raises(OptkitError) as caught:
        bind_recipe(parse(f"{MODEL}{text}\n", "recipes/q.yaml"), plugins)
    assert str(caught.value) == f"recipes/q.yaml:{expected}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x", "1:1: model is missing; add model: VALUE"),
        ("model: folder", "1:1: model.folder: path is missing; add path: VALUE"),
        ("model: {folder: {}}", "1:9: model.folder: path is missing; add path: VALUE"),
        ("model:", f"1:1: model: must name one source, found null; {SHAPE}"),
        ("model: hf", "1:1: unknown source, found 'hf'; installed are: folder"),
    ],
)
def test_a_recipe_needs_a_model(plugins: Plugins, text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        bind_recipe(parse(text, "q.yaml"), plugins)
    assert str(caught.value) == f"q.yaml:{expected}"


def test_a_name_offered_twice_is_refused() -> None:
    plugins = Plugins()
    plugins.register(Everything(), "everything", "optkit-everything")
    plugins.register(Twin(), "twin", "optkit-twin")
    with pytest.raises(RecipeError) as caught:
        bind_recipe(parse(MODEL, "q.yaml"), plugins)
    assert str(caught.value) == (
        "q.yaml:1:1: backend 'torch' is offered by two plugins, everything (optkit-everything) and twin (optkit-twin); "
        "leave one out with --block twin"
    )
    assert recipe_schema(plugins)["$defs"]["plugin.backend"] == {"not": {}}


def test_a_recipe_is_loaded_from_a_file(plugins: Plugins, tmp_path: Path) -> None:
    file = tmp_path / "tiny.int8.yaml"
    file.write_text(MODEL, encoding="utf-8")
    recipe = load_recipe(file, plugins)
    assert recipe.name == "tiny.int8"
    assert recipe.document.path == str(file)


def test_schema_describes_every_installed_plugin(plugins: Plugins) -> None:
    schema = recipe_schema(plugins)
    json.dumps(schema)
    definitions = schema["$defs"]
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == ["model"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["model"]["$ref"] == "#/$defs/plugin.source"
    assert schema["properties"]["transforms"]["items"] == {"$ref": "#/$defs/plugin.transform"}
    assert schema["properties"]["backend"]["default"] == "torch"

    node = {"type": "object", "required": ["folder"], "additionalProperties": False}
    assert definitions["plugin.source"] == {"oneOf": [node | {"properties": {"folder": {"$ref": "#/$defs/Folder"}}}]}
    names = [
        variant.get("const") or {key: option["$ref"] for key, option in variant["properties"].items()}
        for variant in definitions["plugin.transform"]["oneOf"]
    ]
    assert names == [{"round": "#/$defs/Round"}, "round", {"round.again": "#/$defs/Round"}, "round.again"]
    assert definitions["Round"]["properties"]["part"]["$ref"] == "#/$defs/Part"
    assert definitions["Folder"]["properties"]["path"]["description"] == "The folder."
    assert definitions["Gate"]["properties"]["metric"]["enum"] == ["absent", "decode_tokens_per_second", "perplexity"]
    assert schema["properties"]["gates"]["default"] is None

    def references(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            yield from [part["$ref"]] if "$ref" in part else []
        for child in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            yield from references(child)

    assert {reference.removeprefix("#/$defs/") for reference in references(schema)} == definitions.keys()


def test_nothing_installed_gives_a_schema_that_nothing_fits() -> None:
    definitions = recipe_schema(Plugins())["$defs"]
    assert {key: value for key, value in definitions.items() if key.startswith("plugin.")} == {
        f"plugin.{kind}": {"not": {}} for kind in ("source", "transform", "backend", "batcher", "dataset")
    }


def test_reading_a_recipe_imports_no_runtime(tmp_path: Path) -> None:
    file = tmp_path / "q.yaml"
    file.write_text("model: {gguf: {file: x}}\ntransforms: [quantize.rtn]\ngates: []\n", encoding="utf-8")
    code = (
        "import sys; from pathlib import Path; from optkit.plugins import Plugins; from optkit.recipe import load_recipe;"
        f"load_recipe(Path({str(file)!r}), Plugins.load(third_party=False));"
        "print(sorted({'torch', 'transformers', 'onnxruntime'} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
