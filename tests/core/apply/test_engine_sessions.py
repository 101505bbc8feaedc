"""Recipes for a runtime that batches by itself: planned without a batching strategy, applied like any other."""

from __future__ import annotations

import json

import pytest

from optkit.apply import make_plan
from optkit.bench import arm_of_session
from optkit.errors import RecipeError
from optkit.hookspecs import hookimpl
from optkit.measure import task_of
from optkit.opening import Files
from optkit.plugins import Plugins
from optkit.recipe import load_recipe
from optkit.steps import Limits
from optkit.testing import check_backend
from optkit.weights import save_folder
from optkit_backends.torch import Torch
from optkit_batching.static import Static
from tests.batching_runtime import BatchingTorch


class Offers:
    @hookimpl
    def register_backends(self):
        return {"batching": BatchingTorch}


@pytest.fixture
def plugins():
    loaded = Plugins.load(third_party=False)
    loaded.register(Offers(), "a runtime that batches by itself")
    return loaded


BACKEND = {"batching": {"max_batch_size": 3}}


def test_the_backend_says_how_many_run_at_once(desk, plugins, tmp_path):
    plan = make_plan(load_recipe(desk.recipe(backend=BACKEND), plugins), plugins)
    assert plan.limits.max_batch_size == 3
    (tmp_path / "again.yaml").write_text(json.dumps(plan.recipe.resolved()))
    again = make_plan(load_recipe(tmp_path / "again.yaml", plugins), plugins)
    assert (again.recipe, again.limits) == (plan.recipe, plan.limits)


@pytest.mark.parametrize("strategy", ["continuous", {"static": {"max_batch_size": 2}}])
def test_a_batching_strategy_is_refused(strategy, desk, plugins):
    recipe = load_recipe(desk.recipe(backend=BACKEND, batching=strategy), plugins)
    words = r"recipe\.yaml:\d+:\d+: batching: batching batches by itself and takes no batching strategy"
    with pytest.raises(RecipeError, match=words):
        make_plan(recipe, plugins)


def test_it_is_judged_and_timed_like_any_other(tiny_llama, tmp_path):
    model = tiny_llama()
    save_folder(model, tmp_path)
    files = Files(tmp_path, tmp_path, Limits(3, 64))
    task, text = task_of(model.tags), [tuple(range(10, 50)), tuple(range(60, 90))]
    arm = arm_of_session(BatchingTorch().open(tmp_path, tmp_path, files.limits), Static(), files, "ours")
    other = arm_of_session(Torch().open(tmp_path, tmp_path, files.limits), Static(), files, "others")
    assert task.parity(task.scorer(model), task.scorer_of_arm(arm), text) < 1e-5
    apart = [task.scorer_of_session(one.session, tmp_path) for one in (other, arm)]
    assert task.parity(*apart, text) == 0
    ours, others = arm.run(text[0], 8), other.run(text[0], 8)
    assert (ours.output, ours.prompt_tokens) == (others.output, 40)
    assert list(ours.token_seconds) == sorted(ours.token_seconds)
    arm.close()
    other.close()


def test_a_backend_of_that_shape_is_checked(tiny_llama):
    check_backend(BatchingTorch(), tiny_llama())


def test_what_is_wrong_with_it_is_caught(tiny_llama):
    class Wrong(BatchingTorch):
        def open(self, runtime, weights, limits):
            session = super().open(runtime, weights, limits)
            submit = session.submit

            async def other(request):
                async for token in submit(request):
                    yield (token + 1) % session.caps.vocab_size

            session.submit = other
            return session

    with pytest.raises(AssertionError, match=r"a greedy token that is .* below the best one"):
        check_backend(Wrong(), tiny_llama())
