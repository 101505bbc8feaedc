"""An artifact opens by the names in its manifest, in this process and in the one that measures memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from optkit.artifact import publish, staging
from optkit.bench import Opening, SessionArm, TransformersArm, open_arm, opening_of, peak_memory
from optkit.bench.child import peak_resident_bytes
from optkit.engine import Engine, Request, SamplingParams
from optkit.errors import DamagedError, MissingError, OptkitError, RecipeError
from optkit.opening import Files, open_session
from optkit.plugins import Plugins
from optkit.steps import Limits

PROMPT = (7, 42, 99, 5, 300)
REQUEST = {"prompt": PROMPT, "output_tokens": 3}


@pytest.fixture(scope="module")
def plugins():
    return Plugins.load(third_party=False)


@pytest.fixture
def recipe(tiny_folder):
    return {
        "model": {"hf": {"model": str(tiny_folder), "revision": None}},
        "transforms": [{"of_a_plugin_that_is_gone": {}}],
        "backend": {"torch": {}},
        "batching": {"static": {"max_batch_size": 1}},
    }


@pytest.fixture
def artifact(recipe, tiny_folder, tmp_path):
    facts = {
        "name": "tiny",
        "recipe": recipe,
        "recipe_hash": "",
        "tags": [],
        "max_batch_size": 1,
        "max_length": 64,
        "steps": [],
        "servable_by": [],
        "machine": {},
    }
    target = tmp_path / "artifact"
    with staging(target) as staged:
        (staged / "weights").mkdir()
        (staged / "runtime").mkdir()
        for file in tiny_folder.iterdir():
            (staged / "weights" / file.name).write_bytes(file.read_bytes())
        return publish(staged, target, facts)


def test_baseline_and_artifact_open_as_arms(recipe, artifact, plugins):
    before, after = open_arm(Opening(recipe, None), plugins, "before"), open_arm(opening_of(artifact), plugins, "after")
    assert isinstance(before, TransformersArm)
    assert isinstance(after, SessionArm)
    assert (before.name, after.name) == ("before", "after")
    assert before.run(PROMPT, 6).output == after.run(PROMPT, 6).output
    after.close()


def test_an_artifact_opens_as_a_session_with_its_batcher(artifact, plugins):
    with open_session(artifact, plugins) as (session, batcher):
        assert session.caps.max_length == 64
        events = list(Engine(session, batcher).stream(Request(PROMPT, SamplingParams(max_tokens=4))))
    assert [event.finished for event in events] == [None, None, None, "length"]


@pytest.mark.parametrize("files", [True, False])
def test_peak_memory_is_that_of_a_process_of_its_own(recipe, artifact, plugins, files):
    opening = opening_of(artifact) if files else Opening(recipe, None)
    ballast = bytearray(os.urandom(1024)) * (1 << 20)  # 1 GiB here is nothing to the other process
    measured = peak_memory(opening, plugins, REQUEST)
    assert len(ballast) == 1 << 30
    # More than Python with torch in it needs at the least, and less than our ballast.
    assert 100e6 < measured < 1 << 30


def test_the_measuring_process_counts_what_it_holds():
    code = (
        "from optkit.bench.child import peak_resident_bytes as peak\n"
        "before = peak(); held = b'x' * (200 << 20); del held; print(peak() - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert (190 << 20) < grown < (260 << 20)
    assert peak_resident_bytes() > 0


def test_errors_of_the_measuring_process_arrive_as_what_they_are(recipe, plugins, tmp_path):
    gone = Opening({**recipe, "model": {"hf": {"model": str(tmp_path / "gone"), "revision": None}}}, None)
    with pytest.raises(MissingError) as here:
        open_arm(gone, plugins, "here")
    with pytest.raises(MissingError) as there:
        peak_memory(gone, plugins, REQUEST)
    assert str(there.value) == str(here.value)


def test_a_crash_of_the_measuring_process_is_a_bug_with_its_last_word(recipe, plugins):
    with pytest.raises(OptkitError, match=r"ended with code 1: TypeError: ") as raised:
        peak_memory(Opening(recipe, None), plugins, {**REQUEST, "output_tokens": "three"})
    assert raised.value.exit_code == 70


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"backend": {"nothing": {}}}, RecipeError, "unknown backend, found 'nothing'"),
        ({"backend": None}, DamagedError, "the manifest's recipe names no backend"),
        ({"batching": {"static": {}, "other": {}}}, DamagedError, "the manifest's recipe names no batcher"),
        (
            {"batching": {"static": {"max_batch_size": 0}}},
            DamagedError,
            r"the installed batcher 'static' does not take the manifest's max_batch_size \(Input should be",
        ),
    ],
)
def test_what_a_manifest_names_must_be_here(recipe, plugins, tiny_folder, tmp_path, change, error, message):
    opening = Opening({**recipe, **change}, Files(tmp_path, tiny_folder, Limits(1, 64)))
    with pytest.raises(error, match=message):
        open_arm(opening, plugins, "arm")
