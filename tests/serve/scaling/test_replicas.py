"""Numbers of replicas, and what is refused before Ray is asked for anything."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.errors import MissingError, RecipeError
from optkit.hardware import usable_cores
from optkit.serve.scaling.application import application
from optkit.serve.scaling.cluster import run
from optkit.serve.scaling.replicas import Replicas, cores_for_each, target
from optkit.serve.settings import Settings


@pytest.mark.parametrize(("text", "least", "most"), [("1", 1, 1), ("12", 12, 12), ("1:4", 1, 4), ("3:3", 3, 3)])
def test_a_number_or_a_range_of_replicas(text: str, least: int, most: int) -> None:
    assert Replicas.parse(text) == Replicas(least, most)
    assert Replicas.parse(text).fixed is (least == most)


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "01", "4:1", "1:", ":1", "1:2:3", "two", "1.5", "0:2", "99999", "\u0661", "1\n"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--replicas: is no number of replicas"):
        Replicas.parse(text)


@given(st.lists(st.integers(0, 64), min_size=1, max_size=5), st.integers(1, 20))
def test_replicas_that_get_their_cores_fit_and_could_not_have_one_more(nodes: list[int], replicas: int) -> None:
    each = cores_for_each(nodes, replicas)
    if each:
        assert sum(node // each for node in nodes) >= replicas
    assert sum(node // (each + 1) for node in nodes) < replicas


def test_another_replica_comes_before_the_queue_is_full() -> None:
    assert target(8, 256) == 12
    assert target(8, 2) == 10
    assert target(8, 0) == 8


def test_a_state_directory_is_not_shared(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--state: a state directory has one owner"):
        application({}, Settings(state=tmp_path), None, replicas=Replicas(1, 2))


def test_other_machines_need_a_key_here_too() -> None:
    with pytest.raises(RecipeError, match="--host: without API keys"):
        run({}, Settings(host="0.0.0.0"), None, print, replicas=Replicas(1, 1))


def test_replicas_do_not_outnumber_the_cores_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    many = usable_cores() + 1
    with pytest.raises(RecipeError, match="--replicas: more replicas than cores"):
        run({}, Settings(), None, print, replicas=Replicas(1, many))


def test_a_cluster_has_no_free_port_to_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.1:6379")
    with pytest.raises(RecipeError, match="--port: on a cluster"):
        run({}, Settings(port=0), None, print, replicas=Replicas(1, 1))


def test_without_ray_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingError, match=r"pip install 'optkit\[ray\]'"):
        application({}, Settings(), None, replicas=Replicas(1, 1))


def test_one_process_is_not_several_replicas(scripted: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "optkit.cli", "serve", str(scripted()), "--replicas", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (2, "optkit: --replicas: is for several replicas; add --engine ray\n")
