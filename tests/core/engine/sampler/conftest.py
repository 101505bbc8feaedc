"""What sampling means, row by row in float64, as plainly as it can be written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from optkit.engine import SamplingParams


@pytest.fixture(scope="session")
def altered() -> Callable[..., np.ndarray]:
    """Logits after min_tokens, bias and penalties."""

    def reference(
        logits: np.ndarray,
        params: SamplingParams,
        prompt: Sequence[int],
        output: Sequence[int],
        end_tokens: Sequence[int] = (),
    ) -> np.ndarray:
        values = logits.astype(np.float64)
        if len(output) < params.min_tokens:
            values[[*end_tokens, *params.stop_token_ids]] = -np.inf
        for token, bias in params.logit_bias.items():
            values[token] += bias
        for token in {*prompt, *output}:
            values[token] *= 1 / params.repetition_penalty if values[token] > 0 else params.repetition_penalty
        for token in set(output):
            values[token] -= params.frequency_penalty * list(output).count(token) + params.presence_penalty
        return values

    return reference


@pytest.fixture(scope="session")
def distribution() -> Callable[..., np.ndarray]:
    """The probabilities of altered logits after temperature, top_k, top_p and min_p."""

    def reference(values: np.ndarray, params: SamplingParams) -> np.ndarray:
        order = sorted(range(len(values)), key=lambda token: (-values[token], token))
        if params.temperature == 0:
            return np.eye(len(values))[order[0]]
        if params.top_k:
            order = order[: params.top_k]
        weights = np.exp((values[order].astype(np.float64) - values[order[0]]) / params.temperature)
        weights /= weights.sum()
        if params.top_p < 1:
            kept, reached = 0, 0.0
            while kept < len(order) and reached < params.top_p:
                reached += weights[kept]
                kept += 1
            order, weights = order[:kept], weights[:kept]
        likely = weights >= params.min_p * weights[0]
        probabilities = np.zeros(len(values))
        probabilities[np.array(order)[likely]] = weights[likely] / weights[likely].sum()
        return probabilities

    return reference
