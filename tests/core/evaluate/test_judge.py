"""Quality of tiny models beside each other: what is the same scores the same, what is worse is found to be."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from optkit.builtin.quality import KLDivergence, KLDivergenceP99, Perplexity, Top1Agreement
from optkit.errors import DamagedError, GateFailed
from optkit.evaluate import ModelScorer, SessionScorer, evaluate, parity
from optkit.metrics import TokenMetric
from optkit.steps import Limits
from optkit_backends.torch import Torch

METRICS = {
    "perplexity": Perplexity(),
    "kl": KLDivergence(),
    "kl_p99": KLDivergenceP99(),
    "top1": Top1Agreement(),
}
WINDOWS = [tuple(window) for window in np.random.default_rng(0).integers(10, 300, size=(6, 40)).tolist()]


class Scripted:
    """Gives the logits of a function of the window."""

    def __init__(self, logits):
        self.logits = logits


def quiet(*_):
    pass


def perturbed(tiny_llama, scale):
    model = tiny_llama().module
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter += scale * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return ModelScorer(model)


def test_the_same_model_is_exactly_as_good(tiny_llama):
    found = evaluate(ModelScorer(tiny_llama().module), ModelScorer(tiny_llama().module), WINDOWS, METRICS, quiet)
    assert (found.windows, found.tokens) == (6, 6 * 39)
    perplexity = found.metrics["perplexity"]
    assert (perplexity.ratio.value, perplexity.ratio.low, perplexity.ratio.high) == (1, 1, 1)
    assert perplexity.value == perplexity.baseline > 1
    for name, value in (("kl", 0), ("kl_p99", 0), ("top1", 1)):
        figure = found.metrics[name]
        assert (figure.baseline, figure.value, figure.interval.low, figure.interval.high) == (value,) * 4
        assert figure.ratio is None


def test_the_same_model_in_a_session_is_as_good(tiny_llama, tiny_folder, tmp_path):
    with Torch().open(tmp_path, tiny_folder, Limits(1, 64)) as session:
        found = evaluate(ModelScorer(tiny_llama().module), SessionScorer(session, 16), WINDOWS, METRICS, quiet)
        assert parity(ModelScorer(tiny_llama().module), SessionScorer(session, 16), WINDOWS) < 1e-5
    assert found.metrics["perplexity"].ratio.value == pytest.approx(1, abs=1e-5)
    assert found.metrics["kl"].value < 1e-6
    assert found.metrics["top1"].value == 1


def test_damage_is_found_and_more_damage_is_more(tiny_llama):
    baseline = ModelScorer(tiny_llama().module)
    found = [evaluate(baseline, perturbed(tiny_llama, scale), WINDOWS, METRICS, quiet) for scale in (0.02, 0.1, 0.5)]
    for name in ("kl", "kl_p99"):
        values = [quality.metrics[name].value for quality in found]
        assert 0 < values[0] < values[1] < values[2]
    agreement = [quality.metrics["top1"].value for quality in found]
    assert 1 >= agreement[0] > agreement[1] > agreement[2]
    for quality in found:
        kl = quality.metrics["kl"]
        assert 0 < kl.interval.low < kl.value < kl.interval.high
    assert [parity(baseline, perturbed(tiny_llama, scale), WINDOWS) for scale in (0.02, 0.1)] == sorted(
        parity(baseline, perturbed(tiny_llama, scale), WINDOWS) for scale in (0.02, 0.1)
    )


def test_figures_are_those_of_all_tokens_in_float64(tiny_llama):
    baseline, candidate = ModelScorer(tiny_llama().module), perturbed(tiny_llama, 0.1)
    found = evaluate(baseline, candidate, WINDOWS, METRICS, quiet)

    def losses(scorer):
        values = []
        for window in WINDOWS:
            exact = torch.from_numpy(scorer.logits(window)).double().log_softmax(-1).numpy()
            values += [-exact[position, window[position + 1]] for position in range(len(window) - 1)]
        return np.array(values)

    perplexity = found.metrics["perplexity"]
    before, after = losses(baseline), losses(candidate)
    assert perplexity.baseline == pytest.approx(math.exp(before.mean()), rel=1e-6)
    assert perplexity.value == pytest.approx(math.exp(after.mean()), rel=1e-6)
    assert perplexity.ratio.value == pytest.approx(math.exp((after - before).mean()), rel=1e-6)


def test_the_ratio_is_sharper_than_the_figures_because_both_read_the_same_text(tiny_llama):
    found = evaluate(ModelScorer(tiny_llama().module), perturbed(tiny_llama, 0.05), WINDOWS, METRICS, quiet)
    perplexity = found.metrics["perplexity"]
    alone = (perplexity.interval.high - perplexity.interval.low) / perplexity.value
    assert perplexity.ratio.high - perplexity.ratio.low < alone / 2


def test_the_interval_covers_the_true_ratio_about_as_often_as_it_says():
    """Models that give the target a known mean loss: the perplexity ratio is e**0.1 in truth."""

    class Loss(TokenMetric):
        unit = ""
        better = "lower"

        def per_token(self, logits, baseline, targets):
            return logits[:, 0]

        def aggregate(self, values):
            return float(np.exp(values.mean(dtype=np.float64)))

    random = np.random.default_rng(4)
    covered = 0
    for _ in range(60):
        # Hard and easy stretches of text are hard and easy for both models.
        hard = {window: random.normal(size=(40, 1)) + random.normal() for window in WINDOWS}
        extra = {window: 0.1 + 0.2 * random.normal(size=(40, 1)) for window in WINDOWS}
        found = evaluate(
            Scripted(lambda window: hard[window].astype(np.float32)),  # noqa: B023
            Scripted(lambda window: (hard[window] + extra[window]).astype(np.float32)),  # noqa: B023
            WINDOWS,
            {"loss": Loss()},
            quiet,
        ).metrics["loss"]
        covered += found.ratio.low <= math.exp(0.1) <= found.ratio.high
    # Of 60 trials at 90 to 97%, fewer than 48 happen less than once in a thousand.
    assert covered >= 48


def test_one_window_is_split_so_that_its_interval_is_one(tiny_llama):
    [window] = [sum(WINDOWS, ())]
    found = evaluate(ModelScorer(tiny_llama().module), perturbed(tiny_llama, 0.1), [window], METRICS, quiet)
    kl = found.metrics["kl"]
    assert kl.interval.low < kl.value < kl.interval.high
    assert found.tokens == 239


def test_windows_shorter_than_the_stretches_they_are_split_into(tiny_llama):
    scorer = ModelScorer(tiny_llama().module)
    found = evaluate(scorer, scorer, [(5, 6, 7)], METRICS, quiet)
    assert found.tokens == 2
    assert found.metrics["perplexity"].ratio.value == 1


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_broken_logits_are_an_error_and_no_figure(poison):
    def broken(window):
        logits = np.zeros((len(window), 320), np.float32)
        logits[-1, 3] = poison
        return logits

    good = Scripted(lambda window: np.zeros((len(window), 320), np.float32))
    for measured in (
        lambda one, other: evaluate(one, other, WINDOWS, METRICS, quiet),
        lambda one, other: parity(one, other, WINDOWS),
    ):
        with pytest.raises(GateFailed, match=r"^the model gives NaN or infinite logits; remove the transform"):
            measured(good, Scripted(broken))
        with pytest.raises(DamagedError, match=r"^the baseline gives NaN or infinite logits; check the model's files"):
            measured(Scripted(broken), good)


def test_another_vocabulary_is_an_error():
    small, large = (Scripted(lambda window, v=v: np.zeros((len(window), v), np.float32)) for v in (320, 321))
    with pytest.raises(GateFailed, match=r"logits of another shape than the baseline's \(40, 320\), found \(40, 321\)"):
        evaluate(small, large, WINDOWS, METRICS, quiet)


def test_parity_is_the_relative_distance_of_the_worst_window():
    def plain(window):
        return np.full((len(window), 4), 2.0, np.float32)

    def off(window):
        return plain(window) * (1.1 if window == WINDOWS[3] else 1.01)

    assert parity(Scripted(plain), Scripted(plain), WINDOWS) == 0
    assert parity(Scripted(plain), Scripted(off), WINDOWS) == pytest.approx(0.1, rel=1e-6)


def test_progress_and_plain_data(tiny_llama):
    seen = []
    scorer = ModelScorer(tiny_llama().module)
    found = evaluate(scorer, scorer, WINDOWS, METRICS, lambda *state: seen.append(state))
    assert seen == [(done, 6, "windows") for done in range(7)]
    shown = found.to_dict()
    assert json.loads(json.dumps(shown, allow_nan=False)) == shown
    assert shown["metrics"]["kl"]["ratio"] is None
    assert shown["metrics"]["perplexity"]["ratio"]["value"] == 1
