"""Gates: the limits that a recipe sets on its own result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optkit.backends import Lowering
from optkit.recipe import Gate

__all__ = ["GateResult", "check_gates"]


@dataclass(frozen=True, slots=True)
class GateResult:
    """One gate and what came of it."""

    gate: str
    """As the recipe says it, for example `perplexity at_most +3%`."""
    passed: bool
    message: str


def check_gates(
    gates: Sequence[Gate],
    figures: Mapping[str, Mapping[str, Any]],
    lowering: Mapping[str, Lowering],
    parity: Mapping[str, float],
    output: str = "logits",
) -> list[GateResult]:
    """Judge a result.

    Args:
        gates: of the recipe.
        figures: by metric, with `baseline`, `value`, `ratio` where there is one, and `withheld`: the reason where a
            figure cannot be trusted.
        lowering: which kernel ran each weight format, for the message.
        parity: `distance` of the runtime's output from the transformed model's and the `tolerance` of its kernels.
        output: what the model gives.

    Returns:
        Parity first, then the gates in the recipe's order.
    """
    kernels = ", ".join(f"{tag} ran as {lowered.kernel}" for tag, lowered in sorted(lowering.items()))
    return [_parity(parity, output, kernels), *(_judge(gate, figures.get(gate.metric), kernels) for gate in gates)]


def _parity(parity: Mapping[str, float], output: str, kernels: str) -> GateResult:
    distance, tolerance = parity["distance"], parity["tolerance"]
    message = (
        f"parity: {output} are {distance:.2g} away from the transformed model's, {tolerance:.2g} is allowed ({kernels})"
    )
    return GateResult("parity", distance <= tolerance, message)


def _judge(gate: Gate, figure: Mapping[str, Any] | None, kernels: str) -> GateResult:
    side, limit = ("at_most", gate.at_most) if gate.at_most is not None else ("at_least", gate.at_least)
    name = f"{gate.metric} {side} {limit}"
    if figure is None or figure.get("withheld"):
        reason = "nothing measured it" if figure is None else figure["withheld"]
        return GateResult(name, False, f"gate {name}: the figure is withheld ({reason})")
    value, baseline = figure["value"], figure["baseline"]
    shown = f"{value:.4g}"
    if gate.limit.kind == "ratio":
        if figure.get("ratio") is None and not baseline:
            return GateResult(name, False, f"gate {name}: the baseline's figure is 0, to which there is no ratio")
        # Of a speed it is not the ratio of the two figures: the report explains, and both must say the same.
        value = value / baseline if figure.get("ratio") is None else figure["ratio"]["value"]
        shown = f"{value:.4g}x the baseline's {baseline:.4g}"
    passed = value <= gate.limit.value if side == "at_most" else value >= gate.limit.value
    return GateResult(name, passed, f"gate {name}: is {shown}" + ("" if passed else f" ({kernels})"))
