"""`kill -9` at any moment loses no answer that was kept, answers nothing twice, and leaves nothing lying about."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .crashing import committed, computed

PROGRAM = Path(__file__).with_name("crashing.py")
LINES = 300


# Every step is a slow test; the others are a third of them.
@pytest.mark.parametrize(("first", "stride"), [(2, 3), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_a_death_at_any_step_of_a_life_is_survived(tmp_path, first, stride):
    command = [sys.executable, PROGRAM, "points", tmp_path, str(first), str(stride)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 30  # syncs, renames, removals, rows and commits


def test_a_server_that_is_killed_again_and_again_answers_every_line_once(tmp_path):
    chance, kept, kills = random.Random(1), set(), 0
    while True:
        before = len(computed(tmp_path))
        server = subprocess.Popen(
            [sys.executable, PROGRAM, "serve", tmp_path, str(LINES)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        wanted = before + chance.randint(1, LINES // 4)
        while server.poll() is None and len(computed(tmp_path)) < wanted and kills < 3:
            time.sleep(0.001)
        if kills < 3:
            os.kill(server.pid, signal.SIGKILL)
        out, err = server.communicate()
        again = computed(tmp_path)[before:]
        # What was kept before this life was not computed in it.
        assert not kept & set(again)
        if server.returncode == 0:
            break
        assert server.returncode == -signal.SIGKILL, err
        kills += 1
        now = committed(tmp_path)
        assert kept <= now
        kept = now
    assert kills == 3
    assert json.loads(out)["request_counts"]["total"] == LINES
    assert set(computed(tmp_path)) == set(range(LINES))
    assert 0 < len(kept) < LINES
