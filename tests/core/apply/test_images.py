"""Image classifiers through the same pipeline: their own data, gates, metrics and limits, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from optkit.apply import make_plan
from optkit.binding import from_data
from optkit.errors import MissingError, OptkitError, RecipeError
from optkit.plugins import Plugins
from optkit.recipe import bind_recipe, load_recipe
from tests.picturing import NAMES

PLUGINS = Plugins.load(third_party=False)
STATIC = {"quantize.int8_static": {"targets": ["Conv2d", "Linear"]}}


@pytest.fixture
def recipe(desk, tiny_classifier, tmp_path):
    """`recipe(**changes)`: ten images in ten classes, and three without; nothing of it is read."""
    for number in range(10):
        folder = tmp_path / "images" / NAMES[number]
        folder.mkdir(parents=True)
        Image.fromarray(np.full((5, 9), number, np.uint8)).save(folder / "a.png")
    (tmp_path / "loose").mkdir()
    for number in range(3):
        (tmp_path / f"loose/{number}.png").touch()

    def make(images="images", judged=256, **changes):
        dataset = {"imagefolder": {"path": str(tmp_path / images)}}
        evaluation = {"dataset": dataset, "images": judged, **changes.pop("evaluation", {})}
        changes = {"transforms": [], "evaluation": evaluation, "benchmark": {"blocks": 3}, **changes}
        if "calibration" in changes:
            changes["calibration"] = {"dataset": dataset, **changes["calibration"]}
        return desk.recipe(model={"hf": {"model": str(tiny_classifier)}}, **changes)

    return make


def plan_of(file):
    return make_plan(load_recipe(file, PLUGINS), PLUGINS)


def test_gates_that_a_recipe_leaves_out_are_those_of_its_task(recipe):
    file = recipe(gates=None)
    file.write_text(file.read_text().replace(',\n "gates": null', ""))
    planned = plan_of(file).recipe
    assert [(gate.metric, gate.at_least) for gate in planned.gates] == [
        ("label_agreement", 0.95),
        ("images_per_second", "-5%"),
    ]
    assert bind_recipe(from_data(planned.resolved()), PLUGINS) == planned, "what the manifest says can be planned again"


def test_limits_and_estimates_are_those_of_images(recipe):
    plan = plan_of(recipe(batching={"dynamic": {"max_batch_size": 6}}))
    assert (plan.limits.max_batch_size, plan.limits.max_length, plan.limits.kv_cache_tokens) == (6, 1, None)
    assert plan.task.batch_in_words(6, 1) == "6 images"
    few = plan.estimate
    many = plan_of(recipe(judged=50_000))
    assert many.estimate.memory_bytes > few.memory_bytes > 0
    assert many.estimate.seconds > few.seconds


def test_convolutions_are_pruned_and_quantized_by_a_recipe(recipe):
    prune = {"prune.structured": {"parts": ["channels"], "flops": "50%"}}
    recover = {"prune.recover": {"steps": 5}}
    plan = plan_of(recipe(transforms=[prune, recover, STATIC], calibration={"samples": 4}, judged=6))
    assert plan.tags >= {"pruned:channels", "weights:int8-channel", "activations:int8-static-asym"}
    assert plan.steps[0].card.parameters == pytest.approx(plan.card.parameters / 2, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"benchmark": {"prompt_tokens": 16}}, "prompt_tokens: means nothing .*, found 16; remove it"),
        ({"benchmark": {"output_tokens": 8}}, "output_tokens: means nothing .*, found 8; remove it"),
        ({"evaluation": {"tokens": 512}}, r"evaluation\.tokens: means nothing .*, found 512; remove it"),
        ({"evaluation": {"context_length": 64}}, "context_length: means nothing .*, found 64; remove it"),
        ({"max_length": 128}, "max_length: means nothing .*, found 128; remove it"),
        ({"kv_cache_tokens": 512}, r"kv_cache_tokens: means nothing .*\(image classifier\), found 512; remove it"),
        (
            {"transforms": [STATIC], "calibration": {"samples": 4, "sequence_length": 16}},
            r"sequence_length: means nothing .*, found 16; remove it",
        ),
        ({"evaluation": {"dataset": "python_reference"}}, "dataset: holds text, and this model reads images, found"),
        (
            {"transforms": [STATIC], "calibration": {"dataset": "python_reference"}},
            r"calibration\.dataset: holds text, and this model reads images, found 'python_reference'; name a dataset",
        ),
        ({"gates": [{"metric": "perplexity", "at_most": "+5%"}]}, "gate on label_agreement or images_per_second"),
        ({"gates": [{"metric": "label_agreement", "at_least": "1x"}]}, "label_agreement has no ratio"),
        ({"transforms": ["quantize.kv_cache"]}, "needs a model with task:causal-lm"),
        (
            {"transforms": [{"prune.layers": {"count": 1}}], "calibration": {"samples": 2}},
            "not in 2 blocks of their own",
        ),
        ({"transforms": [{"quantize.awq": {"bits": 4}}], "calibration": {"samples": 2}}, "resnet"),
        ({"transforms": [{"prune.structured": {"parts": ["ffn"], "ratio": 0.5}}]}, "ffn: no block has linear layers"),
        ({"backend": "openvino_genai"}, "task:image-classification"),
        (
            {"transforms": [STATIC], "calibration": {"samples": 4}},
            "the dataset has 10 images, 10 of them for the evaluation, found 4; lower it or evaluation.images",
        ),
    ],
)
def test_what_means_nothing_for_images_is_refused(recipe, changes, words):
    if changes.get("backend") == "openvino_genai":
        pytest.importorskip("openvino_genai")
    with pytest.raises(OptkitError, match=words):
        plan_of(recipe(**changes))


def test_images_mean_nothing_for_other_models(desk):
    evaluation = {"dataset": {"text_file": {"path": str(desk.text)}}, "tokens": 256, "context_length": 64}
    with pytest.raises(RecipeError, match=r"evaluation\.images: means nothing .*\(causal language model\), found 9"):
        plan_of(desk.recipe(evaluation=evaluation | {"images": 9}))
    with pytest.raises(RecipeError, match="holds images, and this model reads text, found 'imagefolder'"):
        plan_of(desk.recipe(evaluation={"dataset": {"imagefolder": {"path": "."}}}))


def test_accuracy_needs_classes(recipe):
    gates = [{"metric": "label_agreement", "at_least": 0.9}, {"metric": "accuracy", "at_least": 0.9}]
    assert plan_of(recipe(gates=gates))
    with pytest.raises(RecipeError, match=r"gates\[1\]: needs the true class of every image"):
        plan_of(recipe(images="loose", gates=gates))


def test_classes_and_images_that_are_not_there_are_refused(recipe, tmp_path):
    (tmp_path / "images/nine").rename(tmp_path / "images/nine!")
    with pytest.raises(RecipeError, match=r"a class that is none of the model's 10 \(zero, one, two, \.\.\.\), found"):
        plan_of(recipe())
    with pytest.raises(MissingError, match="nowhere: no such file or folder"):
        plan_of(recipe(images="nowhere"))
