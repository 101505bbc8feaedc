"""The command line as a process: real exit codes, signals and pipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = """\
model:
  hf: {model: model}
evaluation: {dataset: {text_file: {path: text.txt}}, tokens: 256, context_length: 64}
benchmark: {prompt_tokens: 16, output_tokens: 8, blocks: 3}
gates: []
"""


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "optkit.cli", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("recipe", "code", "words"),
    [
        (RECIPE.replace("model:\n", "modell:\n", 1), 2, "modell: unknown key; did you mean 'model'?"),
        (RECIPE.replace("{model: model}", "{model: nowhere}"), 4, "nowhere: neither a folder nor available"),
        (RECIPE + "backend: onnxruntime\n", 4, "backend 'onnxruntime' needs onnxruntime; pip install"),
    ],
)
def test_a_mistake_is_one_line(desk, tmp_path, recipe, code, words):
    # An interpreter in which the runtime cannot be found, as where the extra was not installed.
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide/sitecustomize.py").write_text("import sys; sys.modules['onnxruntime'] = None")
    Path("recipe.yaml").write_text(recipe)
    process = start("apply", "recipe.yaml", PYTHONPATH=str(tmp_path / "hide"))
    out, err = process.communicate()
    assert (process.returncode, out) == (code, "")
    assert err.count("\n") == 1
    assert err.startswith("optkit: recipe.yaml:")
    assert words in err


def test_a_missing_artifact_is_one_line(desk):
    process = start("inspect", "nowhere")
    out, err = process.communicate()
    remedy = "optkit apply RECIPE --output DIRECTORY makes one"
    assert (process.returncode, out, err) == (4, "", f"optkit: nowhere: no artifact here; {remedy}\n")


def test_an_interrupted_apply_says_so_and_leaves_nothing_half_made(desk, site):
    # The step waits for the signal, so that it comes in the middle of the work and not before or after.
    folder = site(
        "optkit_slow",
        """
        import time
        from optkit.hookspecs import hookimpl
        from optkit.transforms import Transform

        class Wait(Transform):
            def provides(self):
                return frozenset({"waited"})

            def apply(self, model, context):
                print("waiting", flush=True)
                time.sleep(600)

        @hookimpl
        def register_transforms():
            return {"wait": Wait}
        """,
    )
    Path("recipe.yaml").write_text(RECIPE + "transforms:\n  - wait\n")
    process = start("apply", "recipe.yaml", "--output", "made/one", PYTHONPATH=str(folder))
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert err == "optkit: interrupted; finished steps are kept, the same command goes on from there\n"
    assert list(Path("made").iterdir()) == []
    kept = [path for path in Path("cache").rglob("*") if path.is_file() and path.parent.name != "locks"]
    assert kept == []


def test_an_interrupted_command_without_steps_promises_nothing(desk, site):
    folder = site(
        "optkit_slow",
        """
        import time
        from optkit.hookspecs import hookimpl

        @hookimpl
        def register_commands(app):
            @app.command("wait")
            def wait():
                "Wait."
                print("waiting", flush=True)
                time.sleep(600)
        """,
    )
    process = start("wait", PYTHONPATH=str(folder))
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, "", "optkit: interrupted\n")


def test_a_reader_that_goes_away_is_no_error(desk):
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "optkit.cli", "schema"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    os.close(read)
    _, err = process.communicate()
    assert (process.returncode, err) == (0, "")


def test_colours_and_bars_are_for_terminals(desk):
    process = start("plugins", "list")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "\x1b" not in out
