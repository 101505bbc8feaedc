"""The step cache: what is found is what was made, whatever happened to the files in between."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from optkit.apply.cache import StepCache, key_of, locked, sweep, workplace
from optkit.errors import MachineError

KEYS = [key_of(step=number) for number in range(3)]


def writes(content, report=None):
    def work(directory):
        (directory / "inner").mkdir()
        (directory / "inner" / "weights").write_bytes(content)
        (directory / "config").write_text("{}")
        return {} if report is None else report

    return work


def forbidden(directory):
    pytest.fail("made again")


# --- keys

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
inputs = st.dictionaries(st.text(min_size=1), values, max_size=5)


@given(inputs, st.randoms())
def test_a_key_does_not_depend_on_the_order(given, random):
    def shuffled(value):
        if isinstance(value, dict):
            items = list(value.items())
            random.shuffle(items)
            return {key: shuffled(inner) for key, inner in items}
        return [shuffled(inner) for inner in value] if isinstance(value, list) else value

    key = key_of(**given)
    assert key == key_of(**shuffled(given))
    assert len(key) == 64
    assert int(key, 16) >= 0


@given(inputs, inputs)
def test_different_inputs_have_different_keys(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (key_of(**one) == key_of(**other)) is same


@given(inputs, st.text(min_size=1), values, values)
def test_a_change_in_one_input_changes_the_key(rest, name, one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (key_of(**rest | {name: one}) == key_of(**rest | {name: other})) is same


def test_keys_are_of_values_and_not_of_their_text():
    different = [1, 1.5, "1", True, None, "null", [], {}, [1], ["1"], {"1": 1}, [[1]]]
    assert len({key_of(value=value) for value in different}) == len(different)
    assert key_of(a="b", c="d") != key_of(a="b,c", d="")


# --- making and finding


def test_what_was_made_is_found(tmp_path):
    report = {"loss": 0.1 + 0.2, "pair": (1, 2), "by layer": {10: "b", 9: "a"}, "none": None, "huge": 1e300}
    made = StepCache().run(KEYS[0], "a step", writes(b"weights", report))
    found = StepCache().run(KEYS[0], "a step", forbidden)
    assert (made.hit, found.hit) == (False, True)
    assert made.report == found.report == json.loads(json.dumps(report))
    assert (made.key, made.name, made.data, made.seconds) == (found.key, found.name, found.data, found.seconds)
    assert (found.data / "inner" / "weights").read_bytes() == b"weights"
    assert StepCache().run(KEYS[1], "a step", writes(b"other")).hit is False


def test_a_failure_leaves_nothing_and_passes_through():
    def fails(directory):
        writes(b"half")(directory)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/calibration.txt")

    with pytest.raises(FileNotFoundError, match=r"/calibration\.txt"):
        StepCache().run(KEYS[0], "a step", fails)
    assert not list(StepCache().entries())
    assert not list((StepCache().root.parent / "work").iterdir())
    assert StepCache().run(KEYS[0], "a step", writes(b"whole")).hit is False


def test_a_report_that_is_not_json_is_a_bug_of_the_step_and_leaves_nothing():
    with pytest.raises(TypeError):
        StepCache().run(KEYS[0], "a step", writes(b"", {"model": object()}))
    assert not list(StepCache().entries())


def test_clear_removes_what_was_not_used_lately():
    old, new = (StepCache().run(key, "a step", writes(bytes(1000))) for key in KEYS[:2])
    os.utime(old.data.parent / "step.json", (0, 0))
    assert [round(used) == 0 for _, _, used in StepCache().entries()].count(True) == 1
    assert StepCache().clear(unused_for=3600) > 1000
    assert [step.key for step, _, _ in StepCache().entries()] == [new.key]
    os.utime(new.data.parent / "step.json", (0, 0))
    StepCache().run(KEYS[1], "a step", forbidden)  # to find it is to use it
    assert StepCache().clear(unused_for=3600) == 0
    assert StepCache().clear() > 1000
    assert not list(StepCache().root.iterdir())


class Machine(RuleBasedStateMachine):
    """Runs, failures, crashes and damage in any order; the model is what each key was last made of."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.before = os.environ.get("OPTKIT_CACHE")
        os.environ["OPTKIT_CACHE"] = str(self.folder)
        self.made: dict[str, bytes] = {}
        self.count = 0

    def teardown(self):
        if self.before is None:
            del os.environ["OPTKIT_CACHE"]
        else:
            os.environ["OPTKIT_CACHE"] = self.before
        shutil.rmtree(self.folder)

    @rule(key=st.sampled_from(KEYS))
    def run(self, key):
        self.count += 1
        content = f"{key} {self.count}".encode()
        step = StepCache().run(key, f"step {key}", writes(content, {"count": self.count}))
        assert step.hit is (key in self.made)
        expected = self.made.setdefault(key, content)
        assert (step.data / "inner" / "weights").read_bytes() == expected
        assert step.report["count"] == int(expected.split()[1])

    @rule(key=st.sampled_from(KEYS))
    def fail(self, key):
        def work(directory):
            writes(b"half")(directory)
            raise ZeroDivisionError

        if key in self.made:
            assert StepCache().run(key, "", work).hit
        else:
            with pytest.raises(ZeroDivisionError):
                StepCache().run(key, "", work)

    @rule(key=st.sampled_from(KEYS))
    def crash(self, key):
        """Killed while at work: what it had written stays in its work place."""
        place = self.folder / "work" / key
        place.mkdir(parents=True, exist_ok=True)
        (place / "step.json").write_text("{")

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def damage(self, data):
        key = data.draw(st.sampled_from(sorted(self.made)))
        files = sorted(file for file in (self.folder / "steps" / key).rglob("*") if file.is_file())
        file = data.draw(st.sampled_from(files))
        content = bytearray(file.read_bytes())
        how = data.draw(st.sampled_from(["flip", "cut", "grow", "remove", "add"]))
        # Not drawn below the length: step.json holds seconds, so its length differs from run to run.
        place, bit = data.draw(st.integers(0, 10_000)) % len(content), data.draw(st.integers(0, 7))
        if how == "flip":
            content[place] ^= 1 << bit
        elif how == "cut":
            del content[place:]
        elif how == "grow":
            content += b"x"
        if how == "remove":
            file.unlink()
        elif how == "add":
            (self.folder / "steps" / key / "data" / "more").write_bytes(b"")
        else:
            file.write_bytes(content)
        del self.made[key]

    @rule()
    def clear(self):
        StepCache().clear()
        assert not list((self.folder / "work").glob("*"))
        self.made = {}

    @invariant()
    def nothing_whole_is_lost(self):
        assert self.made.keys() <= {step.key for step, _, _ in StepCache().entries()}


Machine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestAnyOrderOfEvents = Machine.TestCase


# --- locks and work places


def test_threads_make_a_step_once():
    made = []

    def work(directory):
        made.append(threading.get_ident())
        return {}

    threads = [threading.Thread(target=StepCache().run, args=(KEYS[0], "a step", work)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_a_killed_process_with_our_number_is_in_nobodys_way():
    """In a container every run has the same process number."""
    place = StepCache().root.parent / "work" / KEYS[0]
    (place / "data" / "inner").mkdir(parents=True)
    (place / "data" / "inner" / "half").write_bytes(b"half")
    step = StepCache().run(KEYS[0], "a step", writes(b"whole"))
    assert sorted(file.name for file in step.data.rglob("*")) == ["config", "inner", "weights"]
    assert not place.exists()


def test_sweep_takes_what_nobody_holds(tmp_path):
    """Another process at work is told by its lock: its number means nothing in another container."""
    script = (
        "import sys\nfrom optkit.apply.cache import locked, workplace\n"
        "with locked('held'), workplace('held') as place:\n"
        "    (place / 'file').touch()\n    print('ready', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "ready\n"
    work = StepCache().root.parent / "work"
    (work / "left").mkdir()
    with locked("mine"), workplace("mine") as mine:
        sweep()
        assert sorted(os.listdir(work)) == ["held", "mine"]
        assert mine.is_dir()
        with locked("held", wait=False) as free:
            assert not free
    assert sorted(os.listdir(work)) == ["held"]
    holder.kill()
    holder.communicate()
    sweep()
    assert not os.listdir(work)


# --- a machine that refuses


def test_a_cache_that_cannot_be_made_is_said_plainly(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(MachineError, match=r"cache/locks: the cache cannot be written \(Not a directory\)"):
        StepCache().run(KEYS[0], "a step", writes(b""))
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "steps").write_text("in the way")
    with pytest.raises(MachineError, match="the cache cannot be written"):
        StepCache().run(KEYS[0], "a step", writes(b""))
    assert not list((tmp_path / "cache" / "work").iterdir())


@pytest.mark.parametrize("writer", ["python", "rust", "own"])
def test_a_full_disk_is_said_plainly_and_leaves_nothing(tmp_path, writer):
    """Files may have 4096 bytes at most here: a disk that is full for one process only."""
    script = """
import resource, sys
import numpy as np
from safetensors.numpy import save_file
from optkit.apply.cache import StepCache
from optkit.errors import MachineError

def work(directory):
    if sys.argv[1] == "python":
        (directory / "weights").write_bytes(bytes(5000))
    if sys.argv[1] == "rust":
        save_file({"weights": np.zeros(5000, np.float32)}, directory / "weights")
    return {"long": "x" * 5000}

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    StepCache().run("key", "a step", work)
except MachineError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script, writer], capture_output=True, text=True, check=True)
    cache = tmp_path / "optkit-cache"
    remedy = "optkit cache clear frees old steps, OPTKIT_CACHE names another place"
    assert done.stdout == f"{cache}/steps: the cache cannot be written (File too large); {remedy}\n"
    assert not [path for path in cache.rglob("*") if path.parent.name in ("steps", "work")]
