"""Recovery: a short distillation from the model that the recipe started with."""

from __future__ import annotations

import copy
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from optkit.errors import GateFailed, OptkitError, RecipeError
from optkit.model import Model, ModelCard
from optkit.transforms import Transform, TransformContext
from optkit_prune.patterns import QUANTIZED

__all__ = ["Recover"]

_RANK = 16
_LEARNING_RATES = {"full": 2e-4, "lora": 1e-3}
# Without half of its multiplications a ResNet for digits, 98.8% right before, is 13% right. 200 steps of 64 images at
# the rate of transformers bring it to 90%, at this one to 98.4%.
_CHANNELS_RATE = 2e-3
_HELD_OUT = 0.1
# Tokens or rows of samples of one length that run together: SmolLM2 learns 1.4 times as fast from two windows of 256.
_AT_ONCE = 512
# Of a divergence or a relative error: below it there is nothing but rounding.
_LOST = 1e-9


class Recover(Transform):
    """Trains a pruned model for a few hundred steps to answer as the model did before pruning.

    A language model learns the whole distribution of the next token (KL divergence), an encoder the hidden states, any
    other model the distribution that its output is. A tenth of the calibration samples, which it does not train on,
    judges how much of what was lost is won back. Weights that a mask set to 0 stay 0, and a tied head stays tied.
    Dropout is off, and batch norms keep their statistics.

    Costs as much as running the original model four times (LoRA: three times) on `steps` times `batch_tokens` tokens,
    and the memory of gradients and two moments of Adam for each weight that is trained, besides the original model;
    LoRA on a mask holds each changed weight too. It goes on after a kill from the last 25th step. Use it after the step
    that prunes and before quantization. Give it calibration text of the kind that the model is for, a hundred samples
    or more: it learns what is there, and forgets some of what is not. Not for a model that lost next to nothing, or
    nearly all.

    Papers: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531; Muralidharan et al., Compact
    Language Models via Pruning and Knowledge Distillation, arXiv:2407.14679; Hu et al., LoRA, arXiv:2106.09685.
    """

    requires = frozenset({"weights:float"})
    conflicts = QUANTIZED
    calibration: ClassVar[bool] = True
    baseline: ClassVar[bool] = True

    method: Literal["full", "lora"] = "full"
    """`full` trains every weight. `lora` trains a change of low rank of each linear layer and convolution but the head,
    with less memory, and adds it to the weights in the end."""
    steps: int = Field(default=200, ge=1)
    """Updates of the weights."""
    batch_tokens: int = Field(default=512, ge=1)
    """Tokens of one step: whole calibration samples are taken until they have so many. Rows, where inputs are no
    text: of images 64 are enough."""
    learning_rate: float | None = Field(default=None, gt=0, lt=1)
    """At its peak, after a tenth of the steps; from there it falls to 0 by a cosine. null: 0.0002, for LoRA 0.001,
    where channels of convolutions were pruned 0.002."""
    temperature: float = Field(default=1.0, ge=0.1, le=100)
    """Divides the logits of both models in training: above 1, unlikely answers count more."""
    rank: int | None = Field(default=None, ge=1)
    """Of the changes that `lora` trains; null: 16."""
    seed: int = Field(default=0, ge=0)
    """Of the order of samples and of LoRA's first weights."""
    at_least: float | None = Field(default=0.0, le=1)
    """Gate: the share of the lost quality that must be won back. It is 1 - after / before of the distance from the
    original model on the samples that are not trained on; of a divergence less comes back than of log-perplexity.
    0: the model must not become worse. null: no gate."""

    @model_validator(mode="after")
    def _rank_of_lora(self) -> Self:
        if self.rank is not None and self.method == "full":
            raise ValueError("rank goes with method: lora")
        return self

    def provides(self) -> frozenset[str]:
        return frozenset()

    def work_bytes(self, card: ModelCard) -> int:
        layers = [shape for name, shape in card.linears.items() if name != "lm_head"]
        widths = sum(out + inputs for out, inputs in layers)
        trained = card.parameters if self.method == "full" else (self.rank or _RANK) * widths
        # Of one sample, or of short ones together: what layers and the functions between them keep for the gradients,
        # and the logits of both.
        logits = 5 * card.vocab_size if "task:causal-lm" in card.tags else 0
        kept = min(self.batch_tokens, max(card.max_length, _AT_ONCE)) * (2 * widths + logits)
        # Gradients, two moments, and the copy of one of the three that a checkpoint is written from.
        return 4 * (4 * trained + kept)

    def forward_passes(self) -> float:
        # A step runs the original model and this one, and goes back through it, which takes twice as long: once, where
        # most weights have no gradient. Counted in runs on 128 samples of 512 tokens.
        runs = 4 if self.method == "full" else 3
        return 4 * _HELD_OUT + runs * self.steps * self.batch_tokens / 65_536

    def apply(self, model: Model, context: TransformContext) -> Model:
        import torch

        from optkit_prune.distill import Lesson, Training, distance_of, held_out, joined, schedule, size_of
        from optkit_prune.lora import adapt, merge

        if context.baseline is None:
            raise OptkitError("there is no model to learn from", remedy="give it in TransformContext.baseline")
        learnt, judged = held_out(context.calibration.inputs, _HELD_OUT)
        module, teacher, device = model.module, context.baseline.module, context.device
        if device != "cpu":
            teacher = copy.deepcopy(teacher).to(device)
        module.to(device)
        lesson = Lesson(module, teacher, distance_of(model.tags), device)
        masked = any(tag.startswith("sparsity:") for tag in model.tags)
        before = lesson.judge(judged, lambda: context.progress(0, self.steps, "judging"))
        if before < _LOST:
            what, remedy = "answers as the original model does, so that nothing can be won back", "prune it first"
            raise RecipeError(what, where="the model", found=before, remedy=remedy)
        module.requires_grad_(False)
        lora = self.method == "lora"
        if lora:
            trained = adapt(module, self.rank or _RANK, torch.Generator().manual_seed(self.seed), masked=masked)
        else:
            trained = dict(module.named_parameters())
            module.requires_grad_(True)
        rate = self.learning_rate or self._usual_rate(model.tags)
        training = Training(trained, self.steps, rate, context.checkpoint, masked=masked and not lora)
        plan = schedule([size_of(batch) for batch in learnt], self.steps, self.batch_tokens, self.seed)
        started, told = training.resumed(), ""
        for step in range(started, self.steps):
            batches = joined((learnt[place] for place in plan[step]), _AT_ONCE)
            total = sum(map(size_of, batches))
            lost = 0.0
            for batch in batches:
                context.progress(step, self.steps, told)
                loss = lesson.between(batch, self.temperature) * (size_of(batch) / total)
                loss.backward()  # type: ignore[no-untyped-call]  # torch's own
                lost += loss.item()
            training.step(step)
            training.keep(step)
            told = f"loss {lost:.4g}"
        module.requires_grad_(False)
        if lora:
            merge(module)
        after = lesson.judge(judged, lambda: context.progress(self.steps, self.steps, f"{told}, judging"))
        module.to("cpu")
        self._judge(before, after, context)
        return model

    def _usual_rate(self, tags: frozenset[str]) -> float:
        return _CHANNELS_RATE if "pruned:channels" in tags else _LEARNING_RATES[self.method]

    def _judge(self, before: float, after: float, context: TransformContext) -> None:
        """Say how much was won back.

        Raises:
            GateFailed: it is less than `at_least`.
        """
        won = 1 - after / before
        told = f"distance from the original model {before:.4g} -> {after:.4g} on held-out samples, {won:.1%} won back"
        context.progress(self.steps, self.steps, told)
        # Not below also where it is NaN.
        if self.at_least is not None and not won >= self.at_least:
            raise GateFailed(
                f"{told}, at least {self.at_least:.1%} asked for",
                where="prune.recover",
                remedy="train longer, prune less, or lower at_least",
            )
