"""The example of a third-party plugin, installed for real and used as its users would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "optkit-bfloat16"

RECIPE = """
name: {backend}
model:
  hf: {{model: {model}}}
transforms:
  - cast.bfloat16
backend: {backend}
batching:
  static: {{max_batch_size: 1}}
evaluation: {{tokens: 512, context_length: 64}}
benchmark: {{prompt_tokens: 8, output_tokens: 8, blocks: 3}}
gates:
  - {{metric: total_variation, at_most: 0.05}}
  - {{metric: perplexity, at_most: +2%}}
"""
WRONG_ORDER = """
model:
  hf: {{model: {model}}}
transforms:
  - quantize.rtn
  - cast.bfloat16
max_length: 256
evaluation: {{context_length: 64}}
"""
CUT_OFF = """
from optkit.hookspecs import hookimpl
@hookimpl
def register_commands(app):
    app.command("half")(lambda: None)
    raise LookupError("cut\\noff")
"""
SHADOW = """
from optkit.hookspecs import hookimpl
@hookimpl
def register_commands(app):
    app.command("plan")(lambda: None)
    app.command("steps")(lambda: None)
    app.command("shadow")(lambda: print("here"))
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the example is installed into."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "--target", folder, EXAMPLE], check=True)
    return folder


@pytest.fixture(scope="module")
def run(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`run("plan", ...)` runs `optkit` with the example installed; keywords are environment variables."""
    cache = tmp_path_factory.mktemp("cache")

    def call(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {"PYTHONPATH": str(site), "OPTKIT_CACHE": str(cache), "COLUMNS": "120", **environment}
        command = [sys.executable, "-m", "optkit.cli", *map(str, arguments)]
        return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)

    return call


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def applied(request: Any, run: Run, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, the artifact `made` that an apply of it gave, and the log `steps.jsonl`."""
    if request.param == "onnxruntime":
        pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "recipe.yaml").write_text(RECIPE.format(model=tiny_folder, backend=request.param))
    steps = str(folder / "steps.jsonl")
    done = run("apply", folder / "recipe.yaml", "--output", folder / "made", OPTKIT_STEPS_FILE=steps)
    assert done.returncode == 0, done.stderr
    return folder


def report_of(applied: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((applied / "made/report.json").read_text())
    return report


def test_its_own_tests_pass(site: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLE]
    done = subprocess.run(
        command, cwd=site, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def test_it_is_listed_with_its_distribution(run: Run) -> None:
    listed = json.loads(run("plugins", "list", "--json").stdout)
    theirs = [offer for offer in listed["plugins"] if offer["distribution"] != "optkit"]
    owner = {"plugin": "bfloat16", "state": "ready", "distribution": "optkit-bfloat16", "version": "0.1.0"}
    assert theirs == [
        {"kind": "metric", "name": "total_variation"} | owner,
        {"kind": "transform", "name": "cast.bfloat16"} | owner,
    ]
    assert listed["broken"] == []


def test_plan_knows_what_it_does(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_folder, backend="torch"))
    done = run("plan", tmp_path / "recipe.yaml", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    plan = json.loads(done.stdout)
    (step,) = plan["steps"]
    assert step["name"] == "cast.bfloat16"
    assert {"stored:bfloat16", "weights:float"} <= set(step["tags"])
    assert plan["estimate"]["weight_bytes"] == 2 * plan["model"]["parameters"]


def test_after_a_quantizer_it_is_refused_before_the_work(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(WRONG_ORDER.format(model=tiny_folder))
    done = run("plan", recipe)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"optkit: {recipe}:6:5: transforms[1].cast.bfloat16: cannot come after quantize.rtn, which leaves the model "
        "with weights:int8-channel"
    )
    assert done.stderr.count("\n") == 1


def test_the_weights_folder_is_half_the_size_and_plain_transformers_loads_it(applied: Path, tiny_folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before, after = (folder / "model.safetensors" for folder in (tiny_folder, applied / "made/weights"))
    assert after.stat().st_size < 0.52 * before.stat().st_size
    original = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).state_dict()
    module = AutoModelForCausalLM.from_pretrained(applied / "made/weights")
    assert module.dtype == torch.bfloat16
    assert module.state_dict().keys() == original.keys()
    assert all(torch.equal(tensor, original[name].bfloat16()) for name, tensor in module.state_dict().items())
    prompt = AutoTokenizer.from_pretrained(applied / "made/weights")("The quick brown", return_tensors="pt")
    assert torch.isfinite(module(**prompt).logits).all()


def test_the_report_shows_what_the_rounding_changed(applied: Path) -> None:
    report = report_of(applied)
    figures = report["metrics"]
    distance = figures["total_variation"]
    assert 0 < distance["value"] < 0.05
    assert distance["baseline"] == 0
    # Pinsker's inequality, with Jensen's for the mean over positions.
    assert 0 < distance["value"] <= (figures["kl"]["value"] / 2) ** 0.5
    assert figures["perplexity"]["ratio"]["value"] == pytest.approx(1, abs=0.02)
    assert figures["perplexity"]["ratio"]["value"] != 1
    assert [gate["passed"] for gate in report["gates"]] == [True, True, True]
    # The transform's effect is measured in eager float32, and the runtime adds nothing to it but its own rounding.
    effect = report["steps"][0]["effect"]
    assert effect["metrics"]["total_variation"]["value"] == pytest.approx(distance["value"], rel=0.02)
    assert effect["weight_bytes"] < report["metrics"]["size_bytes"]["baseline"]


def test_the_artifact_says_who_made_the_step(applied: Path) -> None:
    manifest = json.loads((applied / "made/manifest.json").read_text())
    made_by = [(step["step"], step["distribution"], step["version"]) for step in manifest["steps"]]
    assert made_by[0] == ("1 cast.bfloat16", "optkit-bfloat16", "0.1.0")
    assert "stored:bfloat16" in manifest["tags"]


def test_the_observer_saw_every_step_and_the_command_shows_them(applied: Path, run: Run) -> None:
    entries = [json.loads(line) for line in (applied / "steps.jsonl").read_text().splitlines()]
    names = ["1 cast.bfloat16", "1 cast.bfloat16: quality", "compile", "quality", "benchmark"]
    assert [entry["step"] for entry in entries] == names
    assert [entry["time"] for entry in entries] == sorted(entry["time"] for entry in entries)
    recorded = {step["step"]: step["key"] for step in report_of(applied)["steps"]}
    assert entries[0]["key"] == recorded["1 cast.bfloat16"]
    shown = run("steps", applied / "steps.jsonl")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert [line.split("  ")[-1] for line in shown.stdout.splitlines()] == names


def test_a_second_apply_needs_no_step_again(applied: Path, run: Run) -> None:
    again = str(applied / "again.jsonl")
    done = run("apply", applied / "recipe.yaml", "--output", applied / "twin", OPTKIT_STEPS_FILE=again)
    assert done.returncode == 0, done.stderr
    assert all(json.loads(line)["cached"] for line in Path(again).read_text().splitlines())
    assert report_of(applied)["metrics"] == json.loads((applied / "twin/report.json").read_text())["metrics"]


def test_a_log_that_cannot_be_written_stops_nothing(applied: Path, run: Run) -> None:
    nowhere = str(applied / "nowhere" / "steps.jsonl")
    done = run("apply", applied / "recipe.yaml", "--output", applied / "third", OPTKIT_STEPS_FILE=nowhere)
    assert done.returncode == 0
    warnings = [line for line in done.stderr.splitlines() if "cannot be written (No such file or directory)" in line]
    assert [line.startswith("plugin 'bfloat16' failed") for line in warnings] == [True] * 5


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        (["--no-plugins"], {}),
        (["--block", "bfloat16"], {}),
        (["--block", "optkit-bfloat16"], {}),
        ([], {"OPTKIT_PLUGINS": ""}),
    ],
    ids=["--no-plugins", "--block plugin", "--block distribution", "OPTKIT_PLUGINS"],
)
def test_it_can_be_left_out(
    options: list[str], environment: dict[str, str], run: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    listed = json.loads(run(*options, "plugins", "list", "--json", **environment).stdout)
    assert {offer["distribution"] for offer in listed["plugins"]} == {"optkit"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_folder, backend="torch"))
    done = run(*options, "plan", recipe, **environment)
    assert done.returncode == 2
    assert "unknown transform, found 'cast.bfloat16'" in done.stderr
    assert done.stderr.count("\n") == 1
    for arguments in ([*options, "--help"], ["--help", *options]):
        assert "  steps  " not in run(*arguments, **environment).stdout
    done = run(*options, "steps", "file", **environment)
    assert done.returncode == 2
    assert done.stderr.startswith("optkit: no such command 'steps'")


def test_help_shows_its_command_and_imports_no_runtime(run: Run, site: Path) -> None:
    shown = run("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "  steps  " in shown.stdout
    code = (
        "import sys; sys.argv = ['optkit', '--help']; from optkit.cli import main\ntry: main()\n"
        "except SystemExit: print([m for m in ('torch', 'transformers', 'onnxruntime') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("name", "text", "complaints"),
    [
        ("optkit_cut", CUT_OFF, ["the commands of plugin 'optkit_cut' are left out: LookupError: cut off"]),
        (
            "optkit_shadow",
            SHADOW,
            [
                "the command 'plan' of plugin 'optkit_shadow' is left out: there is another of that name",
                "the command 'steps' of plugin 'optkit_shadow' is left out: there is another of that name",
            ],
        ),
        (
            "optkit_bad",
            "raise ImportError('no luck')",
            ["plugin 'optkit_bad' of optkit_bad 1 is left out: ImportError: no luck"],
        ),
    ],
)
def test_another_plugin_s_commands_take_nothing_down(
    name: str, text: str, complaints: list[str], run: Run, site: Path, tmp_path: Path
) -> None:
    (tmp_path / f"{name}.py").write_text(text)
    info = tmp_path / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[optkit]\n{name} = {name}\n")
    path = f"{site}{os.pathsep}{tmp_path}"
    shown = run("--help", PYTHONPATH=path)
    assert shown.returncode == 0
    assert shown.stderr.splitlines() == [f"optkit: {line}" for line in complaints]
    assert "  steps  " in shown.stdout
    assert "  half  " not in shown.stdout
    assert ("  shadow" in shown.stdout) == (name == "optkit_shadow")
    # A command of optkit's own asks no plugin.
    assert run("plan", "--help", PYTHONPATH=path).stderr == ""
    if name == "optkit_shadow":
        assert run("shadow", PYTHONPATH=path).stdout == "here\n"
        assert "show a log of steps" in run("steps", "--help", PYTHONPATH=path).stdout.lower()
