"""How many requests a model takes at once."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from optkit.serve.errors import ApiError, Refused
from optkit.serve.gate import Gate


def test_it_lets_in_as_many_as_run_and_wait():
    gate = Gate(2, 3)
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(gate.passing())
        stack.enter_context(gate.passing(2))
        with pytest.raises(Refused) as refused, gate.passing():
            pass
        assert refused.value.status == 429
        assert 1 <= int(refused.value.headers["retry-after"]) <= 60
    assert gate.open == 0
    with gate.passing(5):
        assert gate.open == 5


def test_more_than_could_ever_pass_is_wrong_and_not_early():
    with pytest.raises(ApiError, match="6 prompts, this server takes 5") as wrong, Gate(2, 3).passing(6):
        pass
    assert wrong.value.status == 400


def test_what_fails_leaves_too():
    gate = Gate(1, 0)
    with pytest.raises(RuntimeError), gate.passing():
        raise RuntimeError
    assert gate.open == 0
