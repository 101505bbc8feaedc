"""The plan: everything that can be known before the work, from headers alone."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace

import pytest

from optkit.apply import make_plan
from optkit.apply.plan import check_room
from optkit.errors import MachineError, RecipeError
from optkit.hookspecs import hookimpl
from optkit.metrics import Metric, RunMetric
from optkit.plugins import Plugins
from optkit.recipe import load_recipe


def plan_of(desk, **changes):
    plugins = Plugins.load(third_party=False)
    return make_plan(load_recipe(desk.recipe(**changes), plugins), plugins)


def test_tags_are_folded_and_kernels_named(desk):
    plan = plan_of(desk)
    prune, quantize = plan.steps
    assert prune.tags == plan.card.tags | {"sparsity:unstructured"}
    assert quantize.tags == plan.tags == prune.tags | {"weights:int8-channel"}
    assert {tag for tag in plan.lowering if tag.startswith("weights:")} == {"weights:float", "weights:int8-channel"}
    assert all(lowered.possible for lowered in plan.lowering.values())
    assert (plan.limits.max_batch_size, plan.limits.max_length) == (1, 256)
    assert plan_of(desk, transforms=[]).tags == plan.card.tags


def test_a_backend_that_gains_nothing_from_zeros_is_named(desk):
    plan = plan_of(desk)
    zeros = plan.lowering["sparsity:unstructured"]
    assert (zeros.kernel, zeros.native, zeros.possible) == ("dense kernels", False, True)
    [warning] = plan.warnings
    assert warning.startswith("torch gains nothing from sparsity:unstructured: zeros are multiplied as any weight")
    assert plan_of(desk, transforms=[{"quantize.rtn": {"bits": 8}}]).warnings == ()


def test_each_transform_is_checked_against_the_model_that_it_gets(desk):
    untied = plan_of(desk, transforms=[{"quantize.rotate": {}}])
    head = untied.card.vocab_size * untied.card.hidden_size if untied.card.tied_head else 0
    assert untied.steps[0].card.parameters == untied.card.parameters + head
    assert untied.estimate.weight_bytes == 4 * untied.steps[0].card.parameters


def test_estimates_follow_the_recipe(desk):
    plain, small = plan_of(desk, transforms=[]).estimate, plan_of(desk).estimate
    assert plain.weight_bytes == 4 * plan_of(desk).card.parameters
    assert small.weight_bytes < plain.weight_bytes / 1.5
    long = {"dataset": {"text_file": {"path": str(desk.text)}}, "tokens": 512, "context_length": 256}
    more = plan_of(desk, evaluation=long).estimate
    assert more.memory_bytes > small.memory_bytes > 0
    assert more.disk_bytes > small.disk_bytes > 2 * small.weight_bytes
    assert small.seconds > 0


def test_a_cache_of_bfloat16_is_estimated_at_half(desk):
    changes = {"max_length": 256, "kv_cache_tokens": 100_000}
    plain, half = (
        plan_of(desk, transforms=transforms, **changes)
        for transforms in ([], [{"quantize.kv_cache": {"dtype": "bfloat16"}}])
    )
    assert half.lowering["kv:bfloat16"].native
    assert half.recipe.calibration is None
    saved = plain.estimate.memory_bytes - half.estimate.memory_bytes
    assert saved == 100_000 * plain.card.kv_values_per_token * 2


def test_a_cache_that_a_runtime_cannot_keep_is_refused(desk):
    transforms = [{"quantize.kv_cache": {"dtype": "bfloat16"}}]
    with pytest.raises(RecipeError, match=r"kv:bfloat16.*its attention kernel for the CPU keeps float32 or int8"):
        plan_of(desk, transforms=transforms, backend="onnxruntime")


def test_no_weights_are_read_and_no_runtime_is_imported(desk, tmp_path):
    model = tmp_path / "headers"
    shutil.copytree(desk.model, model)
    file = model / "model.safetensors"
    (header,) = struct.unpack("<Q", file.read_bytes()[:8])
    os.truncate(file, 8 + header)
    script = (
        "import sys\nfrom pathlib import Path\nfrom optkit.apply import make_plan\nfrom optkit.plugins import Plugins\n"
        "from optkit.recipe import load_recipe\nplugins = Plugins.load(third_party=False)\n"
        "plan = make_plan(load_recipe(Path(sys.argv[1]), plugins), plugins)\nprint(plan.card.parameters)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'compressed_tensors'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    for backend in ("torch", "torchscript", "onnxruntime"):
        recipe = desk.recipe(model={"hf": {"model": str(model)}}, backend=backend)
        done = subprocess.run([sys.executable, "-c", script, recipe], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == plan_of(desk).card.parameters


@pytest.mark.parametrize("needs", ["shape", "option"])
def test_a_gate_on_what_nothing_can_measure_is_refused_before_the_work(desk, needs):
    class OfNoShape(Metric):
        unit, better = "", "lower"

    class WithOption(RunMetric):
        unit, better = "", "lower"
        quantile: float

        def of(self, run):
            return self.quantile

    class Offers:
        @hookimpl
        def register_metrics(self):
            return {"odd": OfNoShape if needs == "shape" else WithOption}

    plugins = Plugins.load(third_party=False)
    plugins.register(Offers(), "odd ones")
    recipe = load_recipe(desk.recipe(gates=[{"metric": "odd", "at_most": 1}]), plugins)
    with pytest.raises(RecipeError, match=r"recipe\.yaml:\d+:\d+: gates\[0\]: odd is no metric of quality"):
        make_plan(recipe, plugins)
    make_plan(load_recipe(desk.recipe(), plugins), plugins)  # installed but not named, it is in nobody's way


def test_room_for_the_artifact_is_looked_for_where_it_will_stand(desk, tmp_path):
    estimate = plan_of(desk).estimate
    check_room(tmp_path / "not" / "there" / "yet", estimate)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(MachineError, match=r"the artifact takes about .* GB, .* are free; choose another output"):
        check_room(tmp_path / "out", replace(estimate, weight_bytes=free))


def test_the_resolved_recipe_plans_the_same(desk, tmp_path):
    plan = plan_of(desk)
    (tmp_path / "again.yaml").write_text(json.dumps(plan.recipe.resolved()))
    plugins = Plugins.load(third_party=False)
    again = make_plan(load_recipe(tmp_path / "again.yaml", plugins), plugins)
    assert (again.recipe, again.steps, again.lowering, again.limits) == (
        plan.recipe, plan.steps, plan.lowering, plan.limits,
    )  # fmt: skip
