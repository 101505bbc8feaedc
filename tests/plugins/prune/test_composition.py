"""Pruning on a mask, then quantization: zeros stay zero. The other order is refused before the work."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from optkit.apply import make_plan
from optkit.errors import RecipeError
from optkit.model import Model
from optkit.plugins import Plugins
from optkit.quantized import quantized_layers
from optkit.recipe import load_recipe
from optkit.transforms import Transform
from optkit.weights import load_folder, save_folder
from tests.calibrating import context, texts

GROUPS = {"granularity": "group", "group_size": 16}
CALIBRATION = texts(20)
MASKS = ["magnitude", "random", "sparsegpt", "wanda"]
AMOUNTS: list[dict[str, Any]] = [{"sparsity": 0.5}, {"pattern": "2:4"}]
WEIGHT_ONLY = [
    {"bits": 8},
    {"bits": 8, "symmetric": False},
    {"bits": 4, **GROUPS},
    {"bits": 3, "symmetric": False, **GROUPS},
]
MIXED = {"effective_bits": 8.0, "group_size": 16, "sensitivity_tokens": 16}
QUANTIZERS: list[tuple[str, dict[str, Any]]] = [
    *(("rtn", options) for options in WEIGHT_ONLY),
    *(("awq", {"grid": 2, **options}) for options in WEIGHT_ONLY),
    *(("hqq", options) for options in WEIGHT_ONLY),
    *(("gptq", options) for options in WEIGHT_ONLY),
    ("gptq", {"bits": 4, "symmetric": False, "act_order": False, **GROUPS}),
    ("gptq", {"bits": 3, "scale_search": False, **GROUPS}),
    ("int8_dynamic", {}),
    ("int8_static", {}),
    ("int8_static", {"symmetric": True, "observer": "minmax"}),
    ("fp8", {}),
    ("fp8", {"activations": "static"}),
    ("w4a8", {"group_size": 16}),
    ("bitsandbytes", {"format": "nf4"}),
    ("bitsandbytes", {"format": "nf4", "double_quantization": False}),
    ("bitsandbytes", {"format": "fp4"}),
    ("bitsandbytes", {"format": "int8"}),
    ("mixed", {**MIXED, "algorithm": "rtn", "symmetric": False}),
    ("mixed", {**MIXED, "algorithm": "gptq"}),
    ("smoothquant", {"inner": True}),
]

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def named(case: tuple[str, dict[str, Any]]) -> Any:
    name, options = case
    marks = [needs_bitsandbytes] if name == "bitsandbytes" else []
    return pytest.param(name, options, id=f"{name}-{options}", marks=marks)


@functools.cache
def plugins() -> Plugins:
    return Plugins.load(third_party=False)


def transform(name: str, **options: Any) -> Transform:
    made: Transform = plugins().get("transform", name)(**options)
    return made


@pytest.fixture(scope="module")
def pruned(tiny_llama: Callable[..., Model]) -> Callable[..., Model]:
    """`pruned(mask, amount)`: a pruned model that nobody else has."""

    @functools.cache
    def once(mask: str, amount: str) -> Model:
        model = tiny_llama(hidden_size=32, intermediate_size=48, num_hidden_layers=1)
        # Not centred: asymmetric ranges get zero points that are not in the middle.
        for layer in linears(model).values():
            layer.weight += 0.05
        return transform(f"prune.{mask}", **json.loads(amount)).apply(model, context(CALIBRATION))

    return lambda mask, amount: copy.deepcopy(once(mask, json.dumps(amount)))


def linears(model: Model) -> dict[str, Any]:
    return {
        name: layer
        for name, layer in model.module.named_modules()
        if isinstance(layer, torch.nn.Linear) and name != "lm_head"
    }


def dequantized(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that layers stand for; what did not become a quantized layer comes as it is."""
    yield from ((name, layer.dequantized()) for name, layer in quantized_layers(model.module))
    for name, layer in linears(model).items():
        weight = layer.weight
        if type(layer).__name__ == "Linear4bit":
            from bitsandbytes.functional import dequantize_4bit

            yield name, dequantize_4bit(weight.data, weight.quant_state)
        elif type(layer).__name__ == "Linear8bitLt":
            yield name, weight.data * weight.SCB[:, None] / 127
        else:
            yield name, weight


@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("quantizer", "options"), [named(case) for case in QUANTIZERS])
def test_zeros_stay_zero(pruned, mask, amount, quantizer, options):
    model = pruned(mask, amount)
    gone = {name: layer.weight == 0 for name, layer in linears(model).items()}
    assert len(gone) == 7
    assert all(zero.sum() == zero.numel() // 2 for zero in gone.values())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="bitsandbytes")
        model = transform(f"quantize.{quantizer}", **options).apply(model, context(CALIBRATION))
    found = dict(dequantized(model))
    assert found.keys() == gone.keys()
    for name, weight in found.items():
        assert (weight[gone[name]] == 0).all(), name
        assert weight.any(), name
    if quantizer != "smoothquant":
        assert any(tag.startswith("weights:") and tag != "weights:float" for tag in model.tags)
        assert any(tag.startswith("sparsity:") for tag in model.tags)


def test_zeros_stay_zero_through_two_steps(pruned):
    model = pruned("wanda", {"pattern": "2:4"})
    gone = {name: layer.weight == 0 for name, layer in linears(model).items()}
    for name in ("smoothquant", "int8_dynamic"):
        model = transform(f"quantize.{name}").apply(model, context(CALIBRATION))
    for name, weight in dequantized(model):
        assert (weight[gone[name]] == 0).all(), name


@pytest.fixture
def plan(tiny_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """`plan(*transforms)` plans a recipe with these transforms."""
    (tmp_path / "text.txt").write_text("A text of a few words. " * 200)
    dataset = {"text_file": {"path": str(tmp_path / "text.txt")}}

    def make(*transforms: dict[str, Any]) -> Any:
        keys = {
            "model": {"hf": {"model": str(tiny_folder)}},
            "transforms": list(transforms),
            "backend": "torch",
            "evaluation": {"dataset": dataset, "tokens": 256, "context_length": 64},
            "benchmark": {"prompt_tokens": 16, "output_tokens": 8},
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(keys))
        return make_plan(load_recipe(tmp_path / "recipe.yaml", plugins()), plugins())

    return make


ROUNDING = [
    ("rtn", {}, "weights:int8-channel"),
    ("gptq", {"bits": 4, **GROUPS}, "weights:int4-group"),
    ("awq", {"bits": 4, "symmetric": False, **GROUPS}, "weights:int4-group-asym"),
    ("hqq", {}, "weights:int8-channel"),
    ("int8_dynamic", {}, "activations:int8-dynamic"),
    ("int8_static", {}, "activations:int8-static-asym"),
    ("fp8", {}, "activations:fp8-dynamic"),
    ("w4a8", {"group_size": 16}, "activations:int8-dynamic"),
    pytest.param("bitsandbytes", {}, "weights:bnb-nf4", marks=needs_bitsandbytes),
    ("mixed", {"effective_bits": 5.0}, "weights:int3-group"),
    ("kv_cache", {}, "kv:int8-head"),
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("quantizer", "options", "tag"), ROUNDING)
def test_the_other_order_is_refused_at_plan(plan, tmp_path, quantizer, options, tag, mask):
    first, second = {f"quantize.{quantizer}": options}, {f"prune.{mask}": {"sparsity": 0.5}}
    with pytest.raises(RecipeError) as refused:
        plan(first, second)
    where, _, line = str(refused.value).partition(": ")
    assert where.startswith(str(tmp_path / "recipe.yaml"))
    assert line == (
        f"transforms[1].prune.{mask}: cannot come after quantize.{quantizer}, which leaves the model with {tag}; "
        "put it before that step, or leave one out"
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_pruning_then_quantizing_is_planned(plan, mask, amount):
    planned = plan({f"prune.{mask}": amount}, {"quantize.gptq": {"bits": 4, **GROUPS}})
    tag = "sparsity:2:4" if "pattern" in amount else "sparsity:unstructured"
    assert {tag, "weights:int4-group"} < planned.tags
    assert any("gains nothing from" in warning for warning in planned.warnings)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_saved_and_loaded_holds_the_pattern(pruned, tmp_path, symmetric):
    model = pruned("sparsegpt", {"pattern": "2:4"})
    options = {"bits": 4, "symmetric": symmetric, **GROUPS}
    model = transform("quantize.gptq", **options).apply(model, context(CALIBRATION))
    save_folder(model, tmp_path)
    loaded = load_folder(tmp_path, tags=model.tags)
    layers = [layer.dequantized() for _, layer in quantized_layers(loaded.module)]
    assert len(layers) == 7
    for weight in layers:
        assert ((weight.reshape(-1, 4) != 0).sum(-1) <= 2).all()
        assert weight.any()


def test_a_mask_on_a_mask_is_refused_at_plan(plan):
    with pytest.raises(RecipeError, match=r"prune\.wanda: cannot come after prune\.magnitude"):
        plan({"prune.magnitude": {"sparsity": 0.5}}, {"prune.wanda": {"pattern": "2:4"}})


def test_rotating_what_is_pruned_is_refused_at_plan(plan):
    with pytest.raises(RecipeError, match=r"cannot come after prune\.magnitude, which leaves the model with sparsity"):
        plan({"prune.magnitude": {"sparsity": 0.5}}, {"quantize.rotate": {}})


@pytest.mark.parametrize("written", ["{pattern: 2:4}", "{pattern: '2:4'}", "\n      pattern: 2:4"])
def test_a_pattern_needs_no_quotes_in_a_recipe(tmp_path, written):
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{hf: {{model: nowhere}}}}\ntransforms:\n  - prune.magnitude: {written}\n"
    )
    [step] = load_recipe(tmp_path / "recipe.yaml", plugins()).transforms
    assert step.options.provides() == {"sparsity:2:4"}
