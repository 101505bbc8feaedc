"""Counters rise only, add up over the lives of workers, and read as Prometheus reads them."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.engine.async_engine import Health
from optkit.engine.one_step import TensorStats
from optkit.engine.stats import Stats
from optkit.serve.observing.metrics import Metrics

COUNTERS = {
    "prompt_tokens": "prompt_tokens",
    "output_tokens": "generation_tokens",
    "looked_up_tokens": "prefix_cache_queries",
    "cached_tokens": "prefix_cache_hits",
    "drafted": "spec_decode_num_draft_tokens",
    "accepted": "spec_decode_num_accepted_tokens",
    "steps": "engine_steps",
    "requests": "engine_requests",
}


def test_requests_are_counted_under_the_names_of_vllm(samples):
    metrics = Metrics()
    metrics.first_token("m", 0.03)
    metrics.token_gap("m", 0.002)
    metrics.token_gap("m", 0.2)
    metrics.ended("m", 1.2, 100, 20, "length")
    metrics.rejected("m", "queue_full")
    found = samples(metrics)
    assert found["optkit:time_to_first_token_seconds_count", "m"] == 1
    assert found["optkit:time_to_first_token_seconds_bucket", "m", "0.02"] == 0
    assert found["optkit:time_to_first_token_seconds_bucket", "m", "0.04"] == 1
    assert found["optkit:inter_token_latency_seconds_sum", "m"] == pytest.approx(0.202)
    assert found["optkit:inter_token_latency_seconds_bucket", "m", "0.0025"] == 1
    assert found["optkit:e2e_request_latency_seconds_count", "m"] == 1
    assert found["optkit:request_prompt_tokens_sum", "m"] == 100
    assert found["optkit:request_generation_tokens_bucket", "m", "20.0"] == 1
    assert found["optkit:request_success_total", "m", "length"] == 1
    assert found["optkit:requests_rejected_total", "m", "queue_full"] == 1


def test_an_engine_is_shown_as_it_stands(samples):
    metrics = Metrics()
    stats = Stats(running=3, waiting=2, blocks=8, used_blocks=2, recomputed=1, swapped=4, output_tokens=7)
    metrics.engine("m", stats, 10)
    found = samples(metrics)
    assert found["optkit:num_requests_running", "m"] == 3
    assert found["optkit:num_requests_waiting", "m"] == 2
    assert found["optkit:kv_cache_usage_perc", "m"] == 0.25
    assert found["optkit:num_preemptions_total", "m"] == 5
    assert found["optkit:generation_tokens_total", "m"] == 7
    # Rates need to have seen a series before its first event.
    assert found["optkit:request_success_total", "m", "error"] == 0
    assert found["optkit:requests_rejected_total", "m", "draining"] == 0
    assert found["optkit:inter_token_latency_seconds_count", "m"] == 0


def test_an_engine_of_arrays_has_its_own_counters_and_no_cache(samples):
    metrics = Metrics()
    metrics.tensors("e", TensorStats(steps=2, requests=3, rows=4, tokens=40, padding=5, waiting=6), 10)
    metrics.tensors("e", TensorStats(steps=1, requests=1, tokens=4, padding=1), 11)
    found = samples(metrics)
    assert found["optkit:prompt_tokens_total", "e"] == 44
    assert found["optkit:padding_tokens_total", "e"] == 6
    assert found["optkit:engine_steps_total", "e"] == 3
    assert found["optkit:engine_rows_total", "e"] == 4
    assert found["optkit:num_requests_waiting", "e"] == 0
    assert not any(name == "optkit:kv_cache_usage_perc" for name, *_ in found)


counts = st.fixed_dictionaries({field: st.integers(0, 5) for field in COUNTERS})
lives = st.lists(st.lists(counts, max_size=4), min_size=1, max_size=5)


def follow(samples, metrics: Metrics, lives: list[list[dict[str, int]]], named: bool) -> dict[str, int]:
    """Scrape workers that live one after the other; what they have done in all. No counter may fall."""
    total = dict.fromkeys(COUNTERS, 0)
    before: dict[tuple[str, ...], float] = {}
    for worker, life in enumerate(lives):
        stats = Stats()
        for step in life:
            for field, count in step.items():
                setattr(stats, field, getattr(stats, field) + count)
                total[field] += count
            metrics.engine("m", stats, worker if named else None)
        if life:
            now = {key: value for key, value in samples(metrics).items() if key[0].endswith("_total")}
            assert all(now[key] >= value for key, value in before.items())
            before = now
    return total


@settings(max_examples=20, deadline=None)
@given(lives)
def test_counters_add_up_over_the_lives_of_workers(samples, lives):
    metrics = Metrics()
    total = follow(samples, metrics, lives, named=True)
    found = samples(metrics)
    for field, name in COUNTERS.items():
        assert found.get((f"optkit:{name}_total", "m"), 0) == total[field]


@settings(max_examples=20, deadline=None)
@given(lives)
def test_counters_of_nobody_by_name_never_fall_and_never_exceed_the_truth(samples, lives):
    metrics = Metrics()
    total = follow(samples, metrics, lives, named=False)
    found = samples(metrics)
    for field, name in COUNTERS.items():
        assert found.get((f"optkit:{name}_total", "m"), 0) <= total[field]


def test_without_a_name_a_counter_that_fell_tells_of_another_worker(samples):
    metrics = Metrics()
    metrics.engine("m", Stats(output_tokens=10, prompt_tokens=1))
    metrics.engine("m", Stats(output_tokens=3, prompt_tokens=4))
    found = samples(metrics)
    assert found["optkit:generation_tokens_total", "m"] == 13
    assert found["optkit:prompt_tokens_total", "m"] == 5


def test_an_answer_that_was_overtaken_by_a_newer_one_counts_nothing(samples):
    metrics = Metrics()
    for tokens in (10, 7, 10, 12):
        metrics.engine("m", Stats(output_tokens=tokens), 10)
    assert samples(metrics)["optkit:generation_tokens_total", "m"] == 12


def test_what_ran_in_a_worker_that_died_is_not_shown_as_running(samples):
    metrics = Metrics()
    metrics.engine("m", Stats(running=3, waiting=2, blocks=8, used_blocks=2), 10)
    metrics.worker("m", Health("ready", 0.5, False, 0))
    assert samples(metrics)["optkit:worker_up", "m"] == 1
    metrics.worker("m", Health("starting", 0.0, False, 2, "it died"))
    found = samples(metrics)
    assert [found[f"optkit:{name}", "m"] for name in ("worker_up", "num_requests_running", "kv_cache_usage_perc")] == [
        0.0,
        0.0,
        0.0,
    ]
    assert found["optkit:worker_restarts_total", "m"] == 2


def test_a_model_that_is_forgotten_leaves_nothing_and_begins_at_0_again(samples):
    metrics = Metrics()
    for model in ("m", "other"):
        metrics.engine(model, Stats(output_tokens=5), 10)
        metrics.ended(model, 1.0, 2, 3, "stop")
        metrics.worker(model, Health("ready", 0.0, False, 1))
        metrics.processes({model: os.getpid()})
    metrics.forget("m")
    found = samples(metrics)
    assert not [key for key in found if "m" in key]
    assert found["optkit:generation_tokens_total", "other"] == 5
    metrics.engine("m", Stats(output_tokens=2), 10)
    assert samples(metrics)["optkit:generation_tokens_total", "m"] == 2


def test_processes_are_looked_at(samples):
    metrics = Metrics()
    metrics.processes({"m": os.getpid(), "gone": 2**22 + 1})
    first = samples(metrics)
    metrics.processes({"m": os.getpid()})
    second = samples(metrics)
    assert second["process_resident_memory_bytes",] > 1e6
    assert second["optkit:worker_open_fds", "m"] > 2
    assert second["process_cpu_seconds_total",] >= first["process_cpu_seconds_total",] > 0
    assert second["optkit:worker_cpu_seconds_total", "m"] >= first["optkit:worker_cpu_seconds_total", "m"] > 0
    assert ("optkit:worker_open_fds", "gone") not in second


def test_answers_are_counted_and_made_up_methods_share_one_series(samples):
    metrics = Metrics()
    for method in ("GET", "BREW", "PROPFIND"):
        metrics.responded("/v1/models", method, 405, 0.1)
    found = samples(metrics)
    assert found["optkit:http_requests_total", "/v1/models", "GET", "405"] == 1
    assert found["optkit:http_requests_total", "/v1/models", "other", "405"] == 2
    assert found["optkit:http_request_duration_seconds_count", "/v1/models", "other"] == 2


def test_two_servers_in_one_process_count_apart_and_there_are_no_created_series(samples):
    one, other = Metrics(), Metrics()
    one.rejected("m", "draining")
    assert ("optkit:requests_rejected_total", "m", "draining") not in samples(other)
    assert b"_created" not in one.render()
    assert any(name == "optkit:build_info" for name, *_ in samples(other))
