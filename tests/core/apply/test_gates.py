"""Gates: judged by the report's own figures; what misses one is kept aside and never published."""

from __future__ import annotations

import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.apply.gates import check_gates
from optkit.artifact import hash_files, open_artifact
from optkit.backends import Lowering
from optkit.errors import GateFailed
from optkit.recipe import Gate

KERNELS = {"weights:int4-group": Lowering("MatMulNBits", native=True)}
EQUAL = {"distance": 0.0, "tolerance": 1e-3}
FIGURES = {
    "perplexity": {"baseline": 20.0, "value": 20.6, "ratio": {"value": 1.03, "low": 1.0, "high": 1.06}},
    # The ratio of a speed is the median of the blocks' ratios, here not 150 / 100.
    "decode_tokens_per_second": {"baseline": 100.0, "value": 150.0, "ratio": {"value": 1.4, "low": 1.3, "high": 1.5}},
    "kl": {"baseline": 0.0, "value": 0.05, "ratio": None},
    "repetition": {"baseline": 0.0, "value": 0.0, "ratio": None},
    "overflow": {"baseline": 20.0, "value": math.inf, "ratio": {"value": math.nan, "low": 0, "high": 0}},
    "ttft_ms": {"withheld": "optimized repeats one token over and over and baseline does not"},
}


def judge(metric, **limit):
    parity, result = check_gates([Gate(metric=metric, **limit)], FIGURES, KERNELS, EQUAL)
    assert parity.passed
    return result


@pytest.mark.parametrize(
    ("metric", "limit", "passed", "shown"),
    [
        ("perplexity", {"at_most": "+3%"}, True, "is 1.03x the baseline's 20"),
        ("perplexity", {"at_most": "+2.9%"}, False, "is 1.03x the baseline's 20 ("),
        ("perplexity", {"at_most": "1.031x"}, True, "1.03x"),
        ("perplexity", {"at_most": 20.6}, True, "is 20.6"),
        ("perplexity", {"at_most": 20}, False, "is 20.6 ("),
        ("perplexity", {"at_least": 20.6}, True, "is 20.6"),
        ("decode_tokens_per_second", {"at_least": "1.4x"}, True, "is 1.4x the baseline's 100"),
        ("decode_tokens_per_second", {"at_least": "1.45x"}, False, "is 1.4x the baseline's 100 ("),
        ("decode_tokens_per_second", {"at_least": 150}, True, "is 150"),
        ("decode_tokens_per_second", {"at_most": "-10%"}, False, "is 1.4x"),
        ("kl", {"at_most": 0.05}, True, "is 0.05"),
        ("kl", {"at_most": 0.049}, False, "is 0.05 ("),
        ("overflow", {"at_most": 1e300}, False, "is inf"),
        ("overflow", {"at_most": "2x"}, False, "nan"),
        ("repetition", {"at_most": "2x"}, False, "the baseline's figure is 0, to which there is no ratio"),
        ("ttft_ms", {"at_most": "2x"}, False, "withheld (optimized repeats one token over and over"),
        ("throughput", {"at_least": 1}, False, "withheld (nothing measured it)"),
    ],
)
def test_a_gate_judges_and_says_what_it_saw(metric, limit, passed, shown):
    result = judge(metric, **limit)
    assert result.passed is passed
    side, bound = next(iter(limit.items()))
    assert result.gate == f"{metric} {side} {bound}"
    assert result.message.startswith(f"gate {metric} {side} {bound}: ")
    assert shown in result.message
    if "(" in shown and "withheld" not in shown:
        assert result.message.endswith("(weights:int4-group ran as MatMulNBits)")


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_at_most_and_at_least_split_the_line_at_the_limit(value, limit):
    figures = {"kl": {"baseline": 0.0, "value": value}}
    gates = [Gate(metric="kl", at_most=limit), Gate(metric="kl", at_least=limit)]
    _, below, above = check_gates(gates, figures, KERNELS, EQUAL)
    assert (below.passed, above.passed) == (value <= limit, value >= limit)


@pytest.mark.parametrize(("distance", "passed"), [(1e-3, True), (1.1e-3, False), (math.nan, False)])
def test_parity_is_a_gate_that_every_recipe_has(distance, passed):
    (result,) = check_gates([], {}, KERNELS, {"distance": distance, "tolerance": 1e-3})
    assert result.passed is passed
    assert "0.001 is allowed (weights:int4-group ran as MatMulNBits)" in result.message


# --- in an apply


def test_gates_that_are_kept_are_in_the_report(desk, run):
    gates = [{"metric": "perplexity", "at_most": "2x"}, {"metric": "top1_agreement", "at_least": 0.01}]
    outcome = run(desk.recipe(gates=gates), desk.folder / "out")
    told = json.loads((desk.folder / "out" / "report.json").read_text())["gates"]
    assert [gate["gate"] for gate in told] == ["parity", "perplexity at_most 2x", "top1_agreement at_least 0.01"]
    assert all(gate["passed"] for gate in outcome.report["gates"])
    assert not (desk.folder / "out.rejected").exists()


def test_what_misses_gates_is_kept_aside_and_all_of_them_are_named(desk, run):
    gates = [{"metric": "kl", "at_most": 1e-6}, {"metric": "perplexity", "at_most": "2x"}]
    gates.append({"metric": "size_bytes", "at_most": "0.1x"})
    out = desk.folder / "out"
    with pytest.raises(GateFailed) as failed:
        run(desk.recipe(gates=gates), out)
    message, figures = str(failed.value), open_artifact(desk.folder / "out.rejected").report()["metrics"]
    assert failed.value.exit_code == 1
    assert message.startswith(
        f"{out}: gate kl at_most 1e-06: is {figures['kl']['value']:.4g} (sparsity:unstructured ran as "
    )
    assert "weights:int8-channel ran as torch.nn.functional.linear in float32)" in message
    assert f"gate size_bytes at_most 0.1x: is {figures['size_bytes']['ratio']['value']:.4g}x" in message
    assert "perplexity" not in message
    assert message.endswith(f"; the artifact was kept aside at {out}.rejected")
    assert sorted(os.listdir(desk.folder)) == ["cache", "out.rejected", "recipe.yaml"]


def test_a_good_artifact_stays_when_a_later_apply_misses_its_gates(desk, run):
    out = desk.folder / "out"
    run(desk.recipe(), out)
    good, place = hash_files(out), out.stat().st_ino
    for limit in (1e-6, 1e-7):  # the second replaces what the first kept aside
        with pytest.raises(GateFailed):
            run(desk.recipe(gates=[{"metric": "kl", "at_most": limit}]), out, overwrite=True)
        assert (hash_files(out), out.stat().st_ino) == (good, place)
        open_artifact(out)
        assert open_artifact(desk.folder / "out.rejected").manifest.recipe["gates"][0]["at_most"] == limit
    assert sorted(os.listdir(desk.folder)) == ["cache", "out", "out.rejected", "recipe.yaml"]


def test_a_missed_gate_is_an_exit_code_of_1(desk, watched):
    recipe = desk.recipe(gates=[{"metric": "kl", "at_most": 1e-6}])
    process = watched.start("apply", recipe, "--output", desk.folder / "out")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "optkit: " in errors
    assert "gate kl at_most 1e-06" in errors
    assert not (desk.folder / "out").exists()
