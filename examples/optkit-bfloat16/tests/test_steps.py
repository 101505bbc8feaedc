"""The log of steps: written as told, shown as written."""

import json

import pytest
import typer
from optkit_bfloat16 import step_finished
from optkit_bfloat16.steps import VARIABLE, show_steps

from optkit.errors import DamagedError, MachineError, MissingError


def test_a_line_for_each_step(tmp_path, monkeypatch, capsys):
    file = tmp_path / "steps.jsonl"
    step_finished("1 cast.bfloat16", {"key": "k", "seconds": 1.0, "cached": False})
    assert not file.exists()
    monkeypatch.setenv(VARIABLE, str(file))
    step_finished("1 cast.bfloat16", {"key": "k", "seconds": 1.25, "cached": False, "weight_bytes": 3})
    step_finished("benchmark", {"key": "l", "seconds": 20.0, "cached": True, "samples": ["{}"] * 999})
    first, second = map(json.loads, file.read_text().splitlines())
    assert (first["step"], first["weight_bytes"]) == ("1 cast.bfloat16", 3)
    assert second.keys() == {"time", "step", "key", "seconds", "cached"}
    show_steps(file)
    assert [line[10:] for line in capsys.readouterr().out.splitlines()] == [
        "   1.2 s  1 cast.bfloat16",
        "  cached  benchmark",
    ]


def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere" / "steps.jsonl"))
    with pytest.raises(MachineError, match=r"steps.jsonl: cannot be written \(No such file or directory\); unset"):
        step_finished("compile", {"seconds": 1.0, "cached": False})


@pytest.mark.parametrize("text", ["no json\n", "[]\n", '{"step": "compile"}\n'])
def test_another_file_is_refused(tmp_path, text):
    file = tmp_path / "steps.jsonl"
    with pytest.raises(MissingError, match="no such file"):
        show_steps(file)
    file.write_text(text)
    with pytest.raises(DamagedError, match="no log of steps"):
        show_steps(file)


def test_it_is_a_command():
    from optkit_bfloat16 import register_commands

    app = typer.Typer()
    register_commands(app)
    assert [command.name for command in app.registered_commands] == ["steps"]
