"""What prune.structured refuses, and where."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from optkit.errors import OptkitError, RecipeError
from optkit_prune.structured import Structured
from tests.calibrating import context, texts
from tests.plugins.prune.test_structured import IMPORTANCES, card, pruned


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ratio": 0.05}, "ratio removes none of the 128 of ffn model.layers.0, in steps of 32, found 0.05"),
        ({"ratio": 0.95}, "ratio leaves none of the 128 of ffn model.layers.0"),
        ({"parts": ("heads",), "ratio": 0.4}, "no whole number of the 2 heads of each KV head, found 0.4; choose 0.5"),
        ({"parts": ("channels",), "ratio": 0.5}, "channels: the model has no convolutions"),
        ({"parameters": "1%"}, r"parameters: with the least of ffn it keeps \d+%"),
        ({"parameters": "1B"}, "parameters: the model has 115008 already, found '1B'"),
        (
            {"parameters": "70%", "round_to": 256},
            "round_to: ffn model.layers.0 has 128 and would",
        ),
    ],
)
def test_what_cannot_be_met_is_refused_before_the_work(tiny_llama, options, said):
    model = tiny_llama()
    with pytest.raises(RecipeError, match=said):
        Structured(**options).check(card(model))
    if "channels" not in options.get("parts", ()):
        with pytest.raises(RecipeError, match=said):
            pruned(model, **options)


def test_a_budget_that_leaves_a_part_whole_is_refused(tiny_llama):
    model = tiny_llama(num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(RecipeError, match="flops: is reached before a step of heads has to go"):
        Structured(parts=("ffn", "heads"), flops="80%").check(card(model))


def test_other_architectures_are_refused(tiny_llama):
    before = card(tiny_llama())
    others = {f"h.0.mlp.{name}": shape for name, shape in (("c_fc", (128, 64)), ("c_proj", (64, 128)))}
    for part, said in (("ffn", "ffn: no block has"), ("heads", "heads: no block has")):
        with pytest.raises(RecipeError, match=said):
            Structured(parts=(part,), ratio=0.5).check(type(before)(**(fields(before) | {"linears": others})))
    with pytest.raises(RecipeError, match="width: can be pruned of"):
        gemma = fields(before) | {"tags": frozenset({"task:causal-lm", "arch:gemma"})}
        Structured(parts=("width",), ratio=0.5).check(type(before)(**gemma))


def fields(card):
    return {name: getattr(card, name) for name in card.__dataclass_fields__}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "exactly one amount"),
        ({"ratio": 0.5, "flops": "50%"}, "exactly one amount"),
        ({"ratio": 0.0}, "greater than 0"),
        ({"ratio": 0.96}, "less than or equal to 0.95"),
        ({"flops": "50M"}, "is a share"),
        ({"latency": "100%"}, "between 0% and 100%"),
        ({"parameters": "half"}, "between 0% and 100%"),
        ({"ratio": 0.5, "parts": ("ffn", "ffn")}, "repeats"),
        ({"ratio": 0.5, "parts": ("channels", "ffn")}, "without other parts"),
        ({"ratio": 0.5, "parts": ("width",), "allocation": "global"}, "one for all layers"),
        ({"ratio": 0.5, "kv_groups": True}, "goes with heads"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, said):
    with pytest.raises(ValidationError, match=said):
        Structured(**options)


def test_calibration_is_asked_for_where_it_is_used(tiny_llama):
    for importance in IMPORTANCES:
        pruner = Structured(ratio=0.5, importance=importance)
        assert pruner.calibration == (importance not in ("magnitude", "random"))
        assert (pruner.forward_passes() > 0) == pruner.calibration
        if pruner.calibration:
            with pytest.raises(OptkitError, match="there is no calibration data"):
                pruner.apply(tiny_llama(), context(texts()))
        else:
            pruner.apply(tiny_llama(), context(texts()))
    assert Structured(latency="80%", importance="magnitude").calibration
    before = card(tiny_llama())
    assert Structured(ratio=0.5, importance="taylor").work_bytes(before) > 0


def test_a_model_that_is_not_finite_is_refused(tiny_llama):
    model = tiny_llama()
    model.module.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(OptkitError, match=r"ffn model\.layers\.1: its importances are not finite"):
        pruned(model, ratio=0.5, importance="magnitude")


class Shifted(torch.nn.Module):
    def forward(self, gate):
        return gate.roll(1, -1)


def test_channels_that_depend_on_their_places_are_refused(tiny_llama):
    model = tiny_llama()
    mlp = model.module.model.layers[0].mlp
    mlp.act_fn = Shifted()
    with pytest.raises(OptkitError, match="does not compute what it does with these at zero"):
        pruned(model, ratio=0.5, importance="magnitude")
