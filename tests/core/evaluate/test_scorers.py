"""Every scorer gives the logits of one plain forward pass, and a record gives them back bit by bit."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from optkit.backends import TokenSession
from optkit.errors import MachineError
from optkit.evaluate import ModelScorer, Recorded, SessionScorer
from optkit.steps import Caps, KernelTime, Limits, StepPlan, StepResult
from optkit_backends.torch import Torch

WINDOW = tuple(np.random.default_rng(0).integers(10, 300, size=50).tolist())
OTHER = WINDOW[::-1]


class PagedSession(TokenSession):
    """A model whose logits are the sum of all tokens so far, which it keeps in blocks of four."""

    def __init__(self, blocks: int) -> None:
        self.caps = Caps("paged", 4, blocks, 2, mixed=True, vocab_size=5, max_length=4 * blocks)
        self.kept: dict[int, list[int]] = {}
        self.steps: list[int] = []

    def execute(self, plan: StepPlan) -> StepResult:
        (row,) = plan.rows
        self.steps.append(len(row.tokens))
        if row.computed == 0:
            self.kept = {block: [] for block in row.blocks}
        before = [token for block in row.blocks for token in self.kept[block]]
        assert len(before) == row.computed
        assert len(row.blocks) * 4 >= row.computed + len(row.tokens)
        for position, token in enumerate(row.tokens, row.computed):
            self.kept[row.blocks[position // 4]].append(token)
        sums = (sum(before) + np.cumsum(row.tokens)).astype(np.float32)
        return StepResult((np.repeat(sums[:, None], 5, axis=1),))

    def read_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        raise NotImplementedError("a scorer moves no blocks")

    def write_blocks(self, blocks: Sequence[int], contents: np.ndarray) -> None:
        raise NotImplementedError("a scorer moves no blocks")

    def profile(self, plan: StepPlan) -> list[KernelTime]:
        return []

    def close(self) -> None:
        self.kept.clear()


@pytest.fixture
def expected(tiny_llama):
    with torch.inference_mode():
        return tiny_llama().module(torch.tensor([WINDOW])).logits[0].numpy()


def test_the_model_itself(tiny_llama, expected):
    found = ModelScorer(tiny_llama().module).logits(WINDOW)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("step_tokens", [512, 50, 16, 7])
def test_a_session_in_chunks(tiny_folder, tmp_path, expected, step_tokens):
    with Torch().open(tmp_path, tiny_folder, Limits(2, 64)) as session:
        scorer = SessionScorer(session, step_tokens)
        scorer.logits(OTHER)  # what another window left in the cache must not show
        np.testing.assert_allclose(scorer.logits(WINDOW), expected, rtol=1e-4, atol=1e-4)


def test_a_paged_session():
    session = PagedSession(blocks=13)
    scorer = SessionScorer(session, step_tokens=20)
    for window in (WINDOW, OTHER, WINDOW[:3]):
        np.testing.assert_array_equal(scorer.logits(window)[:, 0], np.cumsum(window))
    assert session.steps == [20, 20, 10, 20, 20, 10, 3]


def test_a_window_that_does_not_fit_is_refused(tiny_folder, tmp_path):
    with pytest.raises(MachineError, match="a window of 50 tokens does not fit"):
        SessionScorer(PagedSession(blocks=12)).logits(WINDOW)
    with (
        Torch().open(tmp_path, tiny_folder, Limits(1, 32)) as session,
        pytest.raises(MachineError, match="a window of 50 tokens does not fit"),
    ):
        SessionScorer(session).logits(WINDOW)


class CountingScorer:
    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def logits(self, window):
        self.asked.append(window)
        return np.random.default_rng(len(window)).normal(size=(len(window), 11)).astype(np.float32)


def test_a_record_asks_once_and_answers_the_same(tmp_path):
    scorer = CountingScorer()
    recorded = Recorded(scorer, tmp_path)
    first = {window: np.array(recorded.logits(window)) for window in (WINDOW, OTHER, WINDOW[:7])}
    again = Recorded(scorer, tmp_path)
    for window, logits in first.items():
        np.testing.assert_array_equal(recorded.logits(window), logits)
        np.testing.assert_array_equal(again.logits(window), logits)
        assert again.logits(window).dtype == np.float32
    assert scorer.asked == [WINDOW, OTHER, WINDOW[:7]]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < (50 + 50 + 7) * 11 * 4 + 3 * 200


def test_a_full_disk_leaves_no_half_record(tmp_path):
    class Full(CountingScorer):
        def logits(self, window):
            # Stands for a disk that fills up while it is written to.
            (tmp_path / "record").rename(tmp_path / "gone")
            return super().logits(window)

    (tmp_path / "record").mkdir()
    with pytest.raises(MachineError, match="the baseline's logits cannot be kept") as raised:
        Recorded(Full(), tmp_path / "record").logits(WINDOW)
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.ENOENT
