"""Measuring causal language models: predictions of a text's tokens, and timed greedy generations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optkit.backends import AnySession, EngineSession, TokenSession
from optkit.bench import EngineArm, GenerationArm, Samples, SessionArm, TransformersArm, Workload, measure
from optkit.datasets import TextDataset
from optkit.errors import GateFailed, RecipeError
from optkit.evaluate import (
    EngineScorer,
    ModelScorer,
    Quality,
    Recorded,
    Scorer,
    SessionScorer,
    evaluate,
    every_window,
    parity,
    windows,
)
from optkit.measure.task import Amount, Demand, Told
from optkit.measure.texts import Reader, Text, TextTask, calibration_tokens
from optkit.metrics import Metric, Run, RunMetric, TokenMetric
from optkit.model import Model, ModelCard
from optkit.recipe import Benchmark, Evaluation, Gate, Recipe
from optkit.steps import Limits

__all__ = ["Generation", "prompts_of"]

_FLOAT = 4
_PARITY_WINDOWS, _PARITY_TOKENS = 2, 128
# Python and dispatch per layer and token of an eager transformers model, in seconds.
_EAGER_LAYER_SECONDS = 1.5e-3


class Generation(TextTask[Scorer, GenerationArm]):
    """Causal language models."""

    noun = "causal language model"
    output = "logits"
    generates = True
    needs_whole = True
    meaningless = (("evaluation", "images"),)
    gates = (
        Gate(metric="perplexity", at_most="+5%"),
        Gate(metric="decode_tokens_per_second", at_least="-5%"),
    )
    quality_metric = TokenMetric
    speed_metric = RunMetric

    def scorer(self, model: Model) -> Scorer:
        return ModelScorer(model.module)

    def scorer_of_session(self, session: AnySession, weights: Path) -> Scorer:
        if isinstance(session, EngineSession):
            return EngineScorer(session)
        if not isinstance(session, TokenSession):
            raise GateFailed("the backend opened a causal language model as another kind of model")
        return SessionScorer(session)

    def scorer_of_arm(self, arm: GenerationArm) -> Scorer:
        if isinstance(arm, TransformersArm):
            return ModelScorer(arm.module)
        if isinstance(arm, EngineArm):
            return EngineScorer(arm.session)
        assert isinstance(arm, SessionArm)
        return SessionScorer(arm.session)

    def recorded(self, scorer: Scorer, scratch: Path) -> Scorer:
        return Recorded(scorer, scratch)

    def data(self, reader: Reader, dataset: TextDataset, amount: Amount, longest: int) -> Text:
        return windows(reader.tokenizer, dataset, amount.tokens, longest)

    def samples(self, reader: Reader, dataset: TextDataset, length: int) -> Iterator[tuple[int, ...]]:
        return every_window(reader.tokenizer, dataset, length)

    def check(self, recipe: Recipe, card: ModelCard, gated: Sequence[type[Metric]]) -> tuple[str, ...]:
        needed, prompt = self.tokens(recipe.evaluation), recipe.benchmark.prompt_tokens
        if prompt > needed:
            raise recipe.document.error(
                f"the evaluation text, which prompts are taken from, has {needed} tokens",
                "benchmark",
                "prompt_tokens",
                found=prompt,
                remedy="lower it, or raise evaluation.tokens",
            )
        return super().check(recipe, card, gated)

    def evaluate(
        self, baseline: Scorer, candidate: Scorer, data: Text, metrics: Mapping[str, TokenMetric], told: Told
    ) -> Quality:
        return evaluate(baseline, candidate, data, metrics, told)

    def parity(self, reference: Scorer, candidate: Scorer, data: Text) -> float:
        return parity(reference, candidate, [window[:_PARITY_TOKENS] for window in data[:_PARITY_WINDOWS]])

    def time(self, arms: Sequence[GenerationArm], data: Text, settings: Benchmark, told: Told) -> Samples[Run]:
        workload = Workload(settings.prompt_tokens, settings.output_tokens, settings.blocks, settings.seed)
        return measure(arms, prompts_of(data, settings.prompt_tokens), workload, told, again=arms[-1].name)

    def request(self, data: Text, settings: Benchmark) -> dict[str, Any]:
        return {"prompt": prompts_of(data, settings.prompt_tokens)[0], "output_tokens": settings.output_tokens}

    def positions(self, recipe: Recipe) -> int:
        benchmark = recipe.benchmark
        return max(benchmark.prompt_tokens + benchmark.output_tokens, recipe.evaluation.context_length)

    def pieces(self, dataset: TextDataset) -> Iterator[str]:
        return dataset.texts()

    def tokens(self, evaluation: Evaluation) -> int:
        window = min(evaluation.context_length, evaluation.tokens)
        return evaluation.tokens // window * window

    def demand(
        self, recipe: Recipe, card: ModelCard, limits: Limits, token_seconds: float, cache_value_bytes: int
    ) -> Demand:
        window = recipe.evaluation.context_length * card.vocab_size * _FLOAT
        # Without a figure in the recipe the cache takes what memory there is, at least one sequence.
        cache = (limits.kv_cache_tokens or limits.max_length) * card.kv_values_per_token * cache_value_bytes
        decode = card.parameters * _FLOAT / 10e9 + card.layers * _EAGER_LAYER_SECONDS
        generation = recipe.benchmark.prompt_tokens * token_seconds + recipe.benchmark.output_tokens * decode
        return Demand(
            memory_bytes=3 * window + cache,  # logits of a window exist three times in a metric
            disk_bytes=recipe.evaluation.tokens * card.vocab_size * _FLOAT,
            evaluation_tokens=recipe.evaluation.tokens,
            calibration_tokens=calibration_tokens(recipe, card),
            # Two runs a block for the baseline, and about half as long again for both arms of the optimized model.
            benchmark_seconds=3 * recipe.benchmark.blocks * generation,
        )

    def usage(self, artifact: Path) -> str:
        return f'Next: optkit generate {artifact} "Why is the sky blue?"   or: optkit explain {artifact}'


def prompts_of(text: Text, length: int) -> list[tuple[int, ...]]:
    """Windows of evaluation text cut into prompts of `length` tokens.

    Raises:
        RecipeError: there is less text than one prompt.
    """
    tokens = [token for window in text for token in window]
    prompts = [tuple(tokens[start : start + length]) for start in range(0, len(tokens) - length + 1, length)]
    if not prompts:
        raise RecipeError(
            f"the evaluation text has {len(tokens)} tokens, the benchmark's prompt needs {length}",
            remedy="raise evaluation.tokens or lower benchmark.prompt_tokens",
        )
    return prompts
