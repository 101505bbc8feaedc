"""Our GPTQ, AWQ and SmoothQuant against those of llm-compressor and GPTQModel: same data, judged by the same code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = Path(__file__).parents[3] / "benchmarks/quality/peers.py"


@pytest.fixture(scope="module")
def compared(
    environment: Callable[[str], Path], smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """`compared(algorithm)`: what `benchmarks/quality/peers.py` writes of it, about 20 minutes for the longest."""
    for peer in ("llm_compressor", "gptqmodel"):
        environment(peer)
    work = tmp_path_factory.mktemp("peers")

    def compare(algorithm: str) -> dict[str, Any]:
        output = work / "compared.json"
        threads = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
        command = [sys.executable, _SCRIPT, work, "--only", algorithm, "--output", output]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads, check=False)
        assert done.returncode == 0, done.stderr[-8000:]
        found: dict[str, Any] = json.loads(output.read_text())["algorithms"][algorithm]
        return found

    return compare


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("algorithm", "peers"),
    [("gptq", {"llm_compressor", "gptqmodel"}), ("awq", {"llm_compressor"}), ("smoothquant", {"llm_compressor"})],
)
def test_our_perplexity_is_at_most_a_hundredth_above_theirs(
    algorithm: str, peers: set[str], compared: Callable[[str], dict[str, Any]]
) -> None:
    found = compared(algorithm)
    print(json.dumps(found))
    ours = found["runs"].pop("optkit")
    assert found["runs"].keys() == peers
    for theirs in found["runs"].values():
        assert theirs["tokens"] == ours["tokens"]
        assert theirs["ours_over_theirs"]["perplexity"] <= 1.01
