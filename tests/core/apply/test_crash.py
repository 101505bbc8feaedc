"""`kill -9` at any moment: the output is absent or whole, and what was finished is not done again."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from optkit.apply.cache import StepCache
from optkit.artifact import open_artifact


def dying(*arguments: str | Path) -> dict[str, int]:
    script = Path(__file__).with_name("dying.py")
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_publishing_killed_at_each_system_call_leaves_the_old_or_the_new(tmp_path):
    seen = dying("publish", tmp_path)
    assert min(seen["absent"], seen["old"], seen["new"]) > 5


def test_publishing_without_an_atomic_exchange_puts_the_old_one_back(tmp_path):
    seen = dying("fallback", tmp_path)
    assert seen["absent"] > 0  # it did come to that
    assert min(seen["old"], seen["new"]) > 5


def test_a_step_killed_at_each_system_call_is_there_whole_or_made_again(tmp_path):
    seen = dying("cache", tmp_path)
    assert seen["kills"] > seen["found"] > 5


def test_an_apply_from_the_cache_killed_at_system_calls_is_absent_or_whole(desk):
    seen = dying("apply", desk.folder, desk.recipe())
    assert min(seen["absent"], seen["whole"]) > 20


# --- the command line, killed with everything that it started


class Trial:
    """One output that is made again and again, by processes that are killed."""

    def __init__(self, desk, watched):
        self.desk, self.watched, self.out = desk, watched, desk.folder / "out"
        self.killed = self.absent = self.whole = self.most_redone = 0
        self.previous: list[str] = []

    def run(self, lines: int | None = None, seconds: float | None = None) -> float | None:
        """Kill it so many seconds after its start, or after it told so many lines; without either let it end.

        Returns:
            How long it took, or None if it was killed.
        """
        kept, stood = {step.key for step, _, _ in StepCache().entries()}, self.out.exists()
        begin = time.monotonic()
        process = self.watched.start("apply", self.desk.folder / "recipe.yaml", "--output", self.out, "--overwrite")
        if lines is not None:
            while process.poll() is None and len(self.watched.lines(process.pid)) < lines:
                time.sleep(0.005)
        if seconds is not None:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=280)
        took = time.monotonic() - begin
        assert process.returncode in (0, -signal.SIGKILL), errors
        self.look(process.pid, kept, stood)
        if process.returncode == 0:
            self.previous = []
            return took
        self.killed += 1
        self.whole += self.out.exists()
        self.absent += not self.out.exists()
        return None

    def look(self, pid: int, kept: set[str], stood: bool) -> None:
        there = self.out.exists()
        assert there or not stood
        if there:
            open_artifact(self.out)
        told = self.watched.lines(pid)
        assert all(line["cached"] for line in told if line["event"] == "finished" and line["key"] in kept)
        started = [line["step"] for line in told if line["event"] == "started"]
        found = {line["step"] for line in told if line["event"] == "finished" and line["cached"]}
        redone = [step for step in started if step in self.previous and step not in found]
        self.most_redone = max(self.most_redone, len(redone))
        assert len(redone) <= 1, redone
        self.previous = [*self.previous, *(step for step in started if step not in self.previous)]


def only_the_benchmark_is_cached(desk):
    """What takes the longest is there already: a state of the cache that `optkit cache clear` can leave too."""
    for step, _, _ in list(StepCache().entries()):
        if step.name != "benchmark":
            shutil.rmtree(step.data.parent)


def test_three_kills_and_a_rerun(desk, watched):
    only_the_benchmark_is_cached(desk)
    desk.recipe()
    trial, chance = Trial(desk, watched), random.Random(9)
    for lines in (1, chance.randint(4, 6), chance.randint(7, 12)):
        assert trial.run(lines, chance.uniform(0, 0.2)) is None
    assert trial.run() is not None
    assert (trial.killed, trial.absent) == (3, 3)
    open_artifact(trial.out)
    assert sorted(os.listdir(desk.folder)) == ["cache", "out", "recipe.yaml"]
    assert not os.listdir(desk.folder / "cache" / "work")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_fifty_kills(desk, watched):
    """Rounds from an empty cache to a finished artifact; every other one replaces the artifact of the one before.

    In each the first kill comes at a random time of an undisturbed apply, two right after a random step began or ended,
    and three while the artifact is published.
    """
    desk.recipe()
    trial, chance, rounds = Trial(desk, watched), random.Random(9), 0
    shutil.rmtree(desk.folder / "cache")
    whole = trial.run()
    assert whole is not None
    while trial.killed < 50:
        rounds += 1
        shutil.rmtree(desk.folder / "cache")
        trial.previous = []
        if rounds % 2:
            shutil.rmtree(trial.out)
        trial.run(seconds=chance.uniform(0, whole))
        for _ in range(2):
            trial.run(chance.randint(1, 14), chance.uniform(0, 0.3))
        for _ in range(3):
            trial.run(14, chance.uniform(0, 0.05))
        assert trial.run() is not None
        open_artifact(trial.out)
        assert sorted(os.listdir(desk.folder)) == ["cache", "out", "recipe.yaml"]
        assert not os.listdir(desk.folder / "cache" / "work")
    sys.stdout.write(  # pytest -rP shows it
        f"{trial.killed} kills in {rounds} rounds of {whole:.0f} s: output absent {trial.absent} times, whole "
        f"{trial.whole} times; steps redone after a kill: at most {trial.most_redone}\n"
    )
