"""Our GPTQ against those of llm-compressor and GPTQModel, on the same calibration data, judged by the same code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_PEERS = Path(__file__).parents[3] / "benchmarks/quality/peers"
_LENGTH = 256
_CALIBRATION = 32
_EVALUATION = 16
"""Windows."""
_OURS = 'optkit_quantize.gptq:GPTQ{"bits": 4, "granularity": "group", "group_size": 64}'
_THEIRS = {
    "llm_compressor": ("llm_compressor.py", "--algorithm", "gptq"),
    "gptqmodel": ("gptq_model.py",),
}
_THREADS = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}


@pytest.fixture(scope="module")
def place(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in `float`, and windows in `calibration.json` and `evaluation.json`, of text that they do not share."""
    from optkit.builtin.gguf import GGUF
    from optkit.builtin.texts import PythonReference
    from optkit.evaluate import every_window
    from optkit.weights import save_folder

    place = tmp_path_factory.mktemp("peers")
    model = GGUF(file=str(smollm2)).load()
    save_folder(model, place / "float")
    windows = list(every_window(model.tokenizer, PythonReference(), _LENGTH))
    middle = len(windows) // 2
    (place / "calibration.json").write_text(json.dumps(windows[middle : middle + _CALIBRATION]))
    (place / "evaluation.json").write_text(json.dumps(windows[:_EVALUATION]))
    return place


@pytest.fixture(scope="module")
def ours(place: Path) -> dict[str, Any]:
    words = (place / "float", place / "calibration.json", place / "ours", _OURS)
    return _own("ours.py", *words) | _own("judge.py", place / "ours", place / "evaluation.json")


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("peer", _THEIRS)
def test_our_perplexity_is_at_most_a_hundredth_above_theirs(
    peer: str, client: Callable[..., str], place: Path, ours: dict[str, Any]
) -> None:
    script, *options = _THEIRS[peer]
    words = (_PEERS / script, place / "float", place / "calibration.json", place / peer, *options)
    theirs = json.loads(client(peer, *words, **_THREADS).splitlines()[-1])
    theirs |= _own("judge.py", place / peer, place / "evaluation.json")
    print(json.dumps({"ours": ours, peer: theirs, "times as long": ours["seconds"] / theirs["seconds"]}))
    assert ours["tokens"] == theirs["tokens"] == _CALIBRATION * _LENGTH
    assert ours["perplexity"] <= 1.01 * theirs["perplexity"]


def _own(script: str, *words: str | Path) -> dict[str, Any]:
    """What a script says that runs in this environment."""
    command = [sys.executable, _PEERS / script, *words]
    environment = {**os.environ, **_THREADS, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
