"""Encoders through the same pipeline: their own gates, metrics and limits, and refusals of what means nothing."""

from __future__ import annotations

import pytest

from optkit.apply import apply, make_plan
from optkit.artifact import open_artifact
from optkit.errors import GateFailed, RecipeError
from optkit.plugins import Plugins
from optkit.recipe import bind_recipe, load_recipe

BLOCKS = {"blocks": 3}


@pytest.fixture
def recipe(desk, tiny_encoder):
    def make(**changes):
        given = {"model": {"hf": {"model": str(tiny_encoder)}}, "benchmark": BLOCKS, **changes}
        return desk.recipe(**given)

    return make


def plan_of(file):
    plugins = Plugins.load(third_party=False)
    return make_plan(load_recipe(file, plugins), plugins)


def without_gates(file):
    lines = [line for line in file.read_text().splitlines() if '"gates"' not in line]
    file.write_text("\n".join(lines).replace('"blocks": 3\n },', '"blocks": 3\n }'))
    return file


def test_gates_that_a_recipe_leaves_out_are_those_of_its_task(recipe, desk):
    encoder = plan_of(without_gates(recipe())).recipe
    assert [(gate.metric, gate.at_least) for gate in encoder.gates] == [
        ("embedding_cosine", 0.95),
        ("sequences_per_second", "-5%"),
    ]
    model = plan_of(without_gates(desk.recipe(benchmark=BLOCKS))).recipe
    assert [gate.metric for gate in model.gates] == ["perplexity", "decode_tokens_per_second"]
    for planned in (encoder, model):
        from optkit.binding import from_data

        again = bind_recipe(from_data(planned.resolved()), Plugins.load(third_party=False))
        assert again == planned, "what the manifest says can be planned again"
    assert plan_of(recipe()).recipe.gates == ()


def test_limits_are_those_of_its_texts(recipe):
    plan = plan_of(recipe(batching={"bucketed": {"max_batch_size": 6}}))
    assert (plan.limits.max_batch_size, plan.limits.max_length, plan.limits.kv_cache_tokens) == (6, 64, None)
    assert plan_of(recipe(max_length=20)).limits.max_length == 20
    wide = {"dataset": "python_reference", "tokens": 4096, "context_length": 512}
    assert plan_of(recipe(evaluation=wide)).limits.max_length == 64  # longer paragraphs are cut there
    with pytest.raises(RecipeError, match="the model was trained for 64 positions, found 65"):
        plan_of(recipe(max_length=65))
    small, large = (plan_of(recipe(evaluation=wide | {"tokens": t})).estimate for t in (256, 40_960))
    assert large.memory_bytes > small.memory_bytes > 0
    assert large.seconds > small.seconds
    assert large.disk_bytes == small.disk_bytes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"gates": [{"metric": "perplexity", "at_most": "+5%"}]},
            r"perplexity is no metric of .* \(encoder\); gate on embedding_cosine or sequences_per_second",
        ),
        (
            {"gates": [{"metric": "embedding_cosine", "at_least": "1x"}]},
            "embedding_cosine has no ratio to the baseline",
        ),
        ({"benchmark": {"prompt_tokens": 16}}, r"prompt_tokens: means nothing .*\(encoder\), found 16; remove it"),
        ({"benchmark": {"output_tokens": 8}}, r"output_tokens: means nothing .*\(encoder\), found 8; remove it"),
        ({"kv_cache_tokens": 512}, r"kv_cache_tokens: means nothing .*\(encoder\), found 512; remove it"),
        ({"backend": "onnxruntime", "transforms": [{"quantize.w4a8": {"group_size": 32}}]}, "onnxruntime cannot run"),
    ],
)
def test_what_means_nothing_for_an_encoder_is_refused(recipe, changes, words):
    if changes.get("backend") == "onnxruntime":
        pytest.importorskip("onnxruntime")
    with pytest.raises(RecipeError, match=words):
        plan_of(recipe(**changes))


def test_an_encoders_gate_on_a_language_model_is_refused(desk):
    gates = [{"metric": "sequences_per_second", "at_least": "1x"}]
    with pytest.raises(RecipeError, match=r"no metric of this model's task \(causal language model\)"):
        plan_of(desk.recipe(gates=gates))


LEAKY = """
import numpy as np
from optkit.hookspecs import hookimpl
from optkit_backends.torch import Torch
from optkit_backends.torch.tensors import TorchTensorSession

class Session(TorchTensorSession):
    def run(self, inputs):
        return super().run({**inputs, "attention_mask": np.ones_like(inputs["attention_mask"])})

class Leaky(Torch):
    def open(self, runtime, weights, limits):
        return Session(weights)

@hookimpl
def register_backends():
    return {"leaky": Leaky}
"""


def test_a_runtime_that_lets_padding_in_is_rejected(recipe, desk, install, events):
    """Each sequence alone is right, so that quality would not show it; parity does."""
    install("optkit_leaky", LEAKY)
    plugins, out, told = Plugins.load(only=["optkit_leaky"]), desk.folder / "out", events()
    plugins.register(told, "events")
    gates = [{"metric": "embedding_cosine", "at_least": 0.999}]
    file = recipe(transforms=[], backend="leaky", gates=gates, batching={"dynamic": {"max_batch_size": 4}})
    plan = make_plan(load_recipe(file, plugins), plugins)
    with pytest.raises(GateFailed, match=r"parity: hidden states are .* away from the transformed model's, 1e-05 is"):
        apply(plan, plugins, out, progress=lambda *_: None)
    assert told.made == ["save weights", "compile", "quality", "benchmark"]
    rejected = open_artifact(desk.folder / "out.rejected")
    assert [gate["passed"] for gate in rejected.report()["gates"]] == [False, True]
    assert rejected.manifest.servable_by == ["optkit", "transformers", "sentence-transformers"]
    assert "hidden states" in (rejected.path / "report.html").read_text()
