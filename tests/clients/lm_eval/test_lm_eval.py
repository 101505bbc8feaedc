"""lm-evaluation-harness scores a served model as it scores the same weights itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serving import Server

_RUN = Path(__file__).parent / "run.py"
_WINDOW = 128
"""Shorter than some of the texts, so that windows have to roll."""
_KEY = "a-key-for-lm-eval"


@pytest.fixture(scope="module")
def in_process(client: Callable[..., str], smollm2_artifact: Path) -> dict[str, Any]:
    arguments = {"pretrained": str(smollm2_artifact / "weights"), "dtype": "float32", "max_length": _WINDOW}
    return _last_line(client("lm_eval", _RUN, "hf", json.dumps({**arguments, "device": "cpu"}), "8"))


@pytest.fixture
def served(serve: Callable[..., Server], client: Callable[..., str], smollm2_artifact: Path) -> dict[str, Any]:
    server = serve(smollm2_artifact, keys=(_KEY,))
    arguments = {
        "model": "smollm2",
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": str(smollm2_artifact / "weights"),
        "tokenizer_backend": "huggingface",
        "num_concurrent": 3,
        # One token is kept for the answer, and one stands for what the in-process model cuts off.
        "max_length": _WINDOW + 2,
        "max_retries": 1,
    }
    found = _last_line(client("lm_eval", _RUN, "local-completions", json.dumps(arguments), "4", OPENAI_API_KEY=_KEY))
    server.settled()
    return found


def test_scores_are_those_of_the_in_process_model(in_process: dict[str, Any], served: dict[str, Any]) -> None:
    scores = in_process["scores"]
    print(json.dumps({"in process": scores, "served": served["scores"]}))
    assert set(scores) == {
        *("choice.acc", "choice.acc_norm", "generation.exact_match"),
        *("rolling.word_perplexity", "rolling.byte_perplexity", "rolling.bits_per_byte"),
    }
    # Tasks on which everything or nothing is right would compare little.
    assert all(0.1 < scores[name] < 0.95 for name in ("choice.acc", "choice.acc_norm", "generation.exact_match"))
    assert served["scores"] == pytest.approx(scores, rel=0.005)
    for task in ("choice", "rolling"):
        assert _numbers(served["outputs"][task]) == pytest.approx(_numbers(in_process["outputs"][task]), rel=0.005)
    assert served["outputs"]["generation"] == in_process["outputs"]["generation"]


def _last_line(output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def _numbers(outputs: Any) -> list[float]:
    """Of lists in lists, in their order."""
    if isinstance(outputs, list):
        return [number for one in outputs for number in _numbers(one)]
    return [float(outputs == "True" if isinstance(outputs, str) and outputs in ("True", "False") else outputs)]
