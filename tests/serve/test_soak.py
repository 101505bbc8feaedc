"""Memory and blocks come back after a long mixed load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/soak.py"


@pytest.mark.soak
def test_memory_stays_where_it_is(language, tmp_path):
    seconds = os.environ.get("OPTKIT_SOAK_SECONDS", "1800")
    target = tmp_path / "soak.json"
    subprocess.run([sys.executable, SCRIPT, language, seconds, target], check=True)
    data = json.loads(target.read_text())
    assert max(data["slope_in_second_half_mib_per_hour_per_1000_requests"].values()) < 1
    assert not any(data["left_at_the_end"].values())
    assert data["requests"] > 1000
    kinds = {outcome.partition(" ")[0] for outcome in data["outcomes"]}
    assert kinds == {"whole", "stream", "leave", "structured", "several", "wrong", "look", "batch"}
    allowed = {"200", "whole", "left", "completed 4", "400", "404", "429"}
    assert {outcome.partition(" ")[2] for outcome in data["outcomes"]} <= allowed
