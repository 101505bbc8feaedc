"""Every recipe that comes with the project: planned always, applied for real by `make test-slow`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optkit.apply import apply, make_plan
from optkit.artifact import open_artifact
from optkit.errors import RecipeError
from optkit.plugins import Plugins
from optkit.quantized import quantized_layers
from optkit.recipe import load_recipe
from optkit.weights import load_folder

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PLUGINS = Plugins.load(third_party=False)

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def needed(smollm2: Path, minilm: Path) -> None:
    """The models that the recipes name."""


def skip_without_its_runtime(path: Path) -> None:
    backend = load_recipe(path, PLUGINS).backend.options
    missing = backend.unavailable()
    if missing is not None:
        pytest.skip(f"{path.name} {missing}")


def test_there_are_recipes() -> None:
    assert "quickstart" in {path.stem for path in RECIPES}
    assert list((ROOT / "recipes").glob("*.yml")) == []


@every_recipe
def test_it_binds_and_is_named_after_its_file(path: Path) -> None:
    recipe = load_recipe(path, PLUGINS)
    assert recipe.name == path.stem
    assert recipe.transforms
    assert path.read_text(encoding="utf-8").startswith("# ")
    # Nothing of the machine that it was written on.
    assert "/home" not in path.read_text(encoding="utf-8")


@every_recipe
def test_it_plans_and_every_format_has_a_kernel(path: Path) -> None:
    skip_without_its_runtime(path)
    plan = make_plan(load_recipe(path, PLUGINS), PLUGINS)
    assert [step.name for step in plan.steps] == [use.name for use in plan.recipe.transforms]
    formats = {tag for tag in plan.tags if tag.startswith("weights:")}
    assert formats <= plan.lowering.keys()
    assert all(lowered.possible for lowered in plan.lowering.values())
    assert plan.estimate.weight_bytes < plan.card.parameters * plan.card.bytes_per_parameter


@every_recipe
def test_it_does_not_quantize_to_the_grid_that_the_model_came_on(path: Path) -> None:
    # The GGUF file holds 4-bit integers with a scale and a minimum for 32 weights: to round to that again is free.
    for use in load_recipe(path, PLUGINS).transforms:
        options = use.options.model_dump()
        assert (options.get("bits"), options.get("group_size"), options.get("symmetric")) != (4, 32, False)


def test_pruning_after_quantization_is_refused_at_its_line(tmp_path: Path) -> None:
    text = (ROOT / "recipes/prune-then-quantize.yaml").read_text(encoding="utf-8")
    prune, quantize = (
        next(line for line in text.splitlines() if line.startswith(f"  - {name}")) for name in ("prune", "quantize")
    )
    swapped = text.replace(prune, "PRUNE").replace(quantize, prune).replace("PRUNE", quantize)
    (tmp_path / "swapped.yaml").write_text(swapped, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"swapped\.yaml:\d+:5: .*cannot come after quantize\.rtn") as raised:
        make_plan(load_recipe(tmp_path / "swapped.yaml", PLUGINS), PLUGINS)
    line = int(str(raised.value).split(":")[1])
    assert swapped.splitlines()[line - 1] == prune


@pytest.mark.slow
@pytest.mark.timeout(900)
@every_recipe
def test_it_applies_and_keeps_its_gates(path: Path, tmp_path: Path) -> None:
    skip_without_its_runtime(path)
    plan = make_plan(load_recipe(path, PLUGINS), PLUGINS)
    outcome = apply(plan, PLUGINS, tmp_path / "made", progress=lambda *_: None)
    assert not outcome.existed
    artifact = open_artifact(tmp_path / "made")
    report = json.loads((artifact.path / "report.json").read_text(encoding="utf-8"))
    assert [gate["passed"] for gate in report["gates"]] == [True] * (1 + len(plan.recipe.gates))
    assert report["parity"]["distance"] <= report["parity"]["tolerance"]
    assert {"size_bytes", *(gate.metric for gate in plan.task.gates)} <= report["metrics"].keys()
    schemes = {layer.scheme.tag for _, layer in quantized_layers(load_folder(artifact.weights).module)}
    assert schemes == {tag for tag in artifact.manifest.tags if tag.startswith("weights:int")}
