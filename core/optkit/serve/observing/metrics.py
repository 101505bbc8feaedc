"""Metrics for Prometheus.

Names, the label `model_name` and the bounds of the histograms are those of vLLM's V1 engine
(https://github.com/vllm-project/vllm/blob/main/vllm/v1/metrics/loggers.py), with `optkit:` for `vllm:`, so that its
dashboards carry over. What differs: `prompt_tokens_total` has computed tokens only, without those from the prefix
cache; `inter_token_latency_seconds` has three more bounds below, because small models are faster than 10 ms;
`finished_reason` says `cancelled` or `deadline` where vLLM says `abort`; there is no label `engine`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from optkit import __version__
from optkit.engine.async_engine import Health
from optkit.engine.one_step import TensorStats
from optkit.engine.stats import Stats
from optkit.serve.observing.processes import usage

__all__ = ["Metrics", "Reason", "Refusal"]

Reason = Literal["stop", "length", "cancelled", "deadline", "error"]
Refusal = Literal["queue_full", "draining"]
F = TypeVar("F", Counter, Gauge, Histogram)
Worker = int | None

_FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_GAP = (
    *(0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_LATENCY = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}

_ENGINE = {
    "prompt_tokens": "Prompt tokens computed; those found in the prefix cache are not.",
    "generation_tokens": "Tokens generated.",
    "prefix_cache_queries": "Prompt tokens looked for in the prefix cache.",
    "prefix_cache_hits": "Prompt tokens found in the prefix cache.",
    "num_preemptions": "Requests evicted while they ran.",
    "spec_decode_num_draft_tokens": "Tokens guessed.",
    "spec_decode_num_accepted_tokens": "Guessed tokens that were right.",
    "engine_steps": "Calls of the model.",
    "engine_rows": "Rows of batches computed by models of one step; a sequence is one row.",
    "padding_tokens": "Tokens computed only because the sequences of a batch differ in length.",
    "engine_requests": "Requests accepted by the engine.",
    "worker_cpu_seconds": "CPU time of the worker processes.",
    "worker_restarts": "Worker processes that died and were replaced.",
}
"""Counters that follow one outside this process, which begins at 0 again."""


class Metrics:
    """Everything that is counted in one server process.

    What counts requests may be called from any thread; what follows engines at a scrape, in the event loop only.

    Args:
        registry: where it is registered; by default one of its own.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        # For the whole process; the series would double what is scraped and say nothing.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = registry or CollectorRegistry()
        self._families: list[_Children[Counter] | _Children[Gauge] | _Children[Histogram]] = []

        def counter(name: str, text: str, *labels: str) -> _Children[Counter]:
            return self._kept(Counter(f"optkit:{name}", text, ("model_name", *labels), registry=registry))

        def gauge(name: str, text: str) -> _Children[Gauge]:
            return self._kept(Gauge(f"optkit:{name}", text, ("model_name",), registry=registry))

        def histogram(name: str, text: str, bounds: Sequence[float]) -> _Children[Histogram]:
            family = Histogram(f"optkit:{name}", text, ("model_name",), registry=registry, buckets=bounds)
            return self._kept(family)

        self._first_token = histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN)
        self._gap = histogram("inter_token_latency_seconds", "From one token to the next.", _GAP)
        self._latency = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _LATENCY)
        self._prompt = histogram("request_prompt_tokens", "Length of a request's prompt.", _TOKENS)
        self._output = histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self._ended = counter("request_success", "Requests that ended.", "finished_reason")
        self._refused = counter("requests_rejected", "Requests turned away before any work.", "reason")
        self._running = gauge("num_requests_running", "Requests that take part in steps.")
        self._waiting = gauge("num_requests_waiting", "Requests that wait in the engine.")
        self._cache = gauge("kv_cache_usage_perc", "Share of the KV cache in use; 1 is all of it.")
        self._up = gauge("worker_up", "1 when the worker serves requests.")
        self._silent = gauge("worker_silent_seconds", "Age of the step under way.")
        self._memory = gauge("worker_resident_memory_bytes", "Memory of the worker process.")
        self._files = gauge("worker_open_fds", "Open file descriptors of the worker process.")
        self._engine = {name: counter(name, text) for name, text in _ENGINE.items()}
        self._seen: dict[tuple[str, str], _Seen] = {}
        answers = ("path", "method", "status")
        self._http = _Children(Counter("optkit:http_requests", "Answers.", answers, registry=registry))
        seconds = "From a request's arrival to its answer's end."
        self._http_seconds = _Children(
            Histogram("optkit:http_request_duration_seconds", seconds, answers[:2], registry=registry, buckets=_LATENCY)
        )
        # The names that every Prometheus client gives its own process.
        self._own_memory = Gauge("process_resident_memory_bytes", "Memory of the server process.", registry=registry)
        self._own_cpu = Counter("process_cpu_seconds", "CPU time of the server process.", registry=registry)
        self._own_files = Gauge("process_open_fds", "Open file descriptors of the server process.", registry=registry)
        self._own_cpu_seen = 0.0
        build = Gauge("optkit:build_info", "Always 1.", ("version", "python"), registry=registry)
        build.labels(__version__, platform.python_version()).set(1)

    def _kept(self, family: F) -> _Children[F]:
        children = _Children(family)
        self._families.append(children)
        return children

    # --- requests

    def first_token(self, model: str, seconds: float) -> None:
        """A request's first token came `seconds` after the request."""
        self._first_token[(model,)].observe(seconds)

    def token_gap(self, model: str, seconds: float) -> None:
        """A token came `seconds` after the one before it."""
        self._gap[(model,)].observe(seconds)

    def ended(self, model: str, seconds: float, prompt_tokens: int, output_tokens: int, reason: Reason) -> None:
        """A request ended `seconds` after it came."""
        self._latency[(model,)].observe(seconds)
        self._prompt[(model,)].observe(prompt_tokens)
        self._output[(model,)].observe(output_tokens)
        self._ended[(model, reason)].inc()

    def rejected(self, model: str, reason: Refusal) -> None:
        """A request was turned away."""
        self._refused[(model, reason)].inc()

    def responded(self, path: str, method: str, status: int, seconds: float) -> None:
        """An answer ended. `path` is a template of a route, and nothing else."""
        method = method if method in _METHODS else "other"
        self._http[(path, method, str(status))].inc()
        self._http_seconds[(path, method)].observe(seconds)

    # --- at each scrape

    def engine(self, model: str, stats: Stats, worker: Worker = None) -> None:
        """How an engine of a language model stands.

        Args:
            model: its name.
            stats: of the engine since it was made. What a worker did after its last scrape is lost with it.
            worker: the process that counted. Without it, a counter that fell tells that another one did.
        """
        if (model, "engine") not in self._seen:
            self._begin(model)
        self._running[(model,)].set(stats.running)
        self._waiting[(model,)].set(stats.waiting)
        self._cache[(model,)].set(stats.used_blocks / stats.blocks if stats.blocks else 0)
        counts = {
            "prompt_tokens": stats.prompt_tokens,
            "generation_tokens": stats.output_tokens,
            "prefix_cache_queries": stats.looked_up_tokens,
            "prefix_cache_hits": stats.cached_tokens,
            "num_preemptions": stats.recomputed + stats.swapped,
            "spec_decode_num_draft_tokens": stats.drafted,
            "spec_decode_num_accepted_tokens": stats.accepted,
            "engine_steps": stats.steps,
            "engine_requests": stats.requests,
        }
        self._rise(model, "engine", counts, worker)

    def tensors(self, model: str, stats: TensorStats, worker: Worker = None) -> None:
        """How an engine of a model of one step stands; arguments as of `engine`."""
        self._waiting[(model,)].set(stats.waiting)
        counts = {
            "prompt_tokens": stats.tokens,
            "padding_tokens": stats.padding,
            "engine_rows": stats.rows,
            "engine_steps": stats.steps,
            "engine_requests": stats.requests,
        }
        self._rise(model, "engine", counts, worker)

    def worker(self, model: str, health: Health) -> None:
        """How a model's worker is."""
        self._up[(model,)].set(health.ok)
        self._silent[(model,)].set(health.silent)
        self._rise(model, "restarts", {"worker_restarts": health.restarts}, None)
        if health.state != "ready":  # what ran in it has ended, and nobody can be asked
            for gauge in (self._running, self._waiting, self._cache):
                if (model,) in gauge:
                    gauge[(model,)].set(0)

    def processes(self, workers: Mapping[str, int]) -> None:
        """Look at the server's own process, and at those of the models' workers.

        Args:
            workers: process id by the model's name.
        """
        own = usage(os.getpid())
        if own is not None:
            self._own_memory.set(own.resident)
            self._own_files.set(own.files)
            self._own_cpu.inc(max(0.0, own.cpu - self._own_cpu_seen))
            self._own_cpu_seen = max(own.cpu, self._own_cpu_seen)
        for model, pid in workers.items():
            used = usage(pid)
            if used is not None:
                self._memory[(model,)].set(used.resident)
                self._files[(model,)].set(used.files)
                self._rise(model, "process", {"worker_cpu_seconds": used.cpu}, pid)

    def forget(self, model: str) -> None:
        """Drop all series of a model, for example when it was unloaded."""
        for children in self._families:
            children.forget(model)
        for key in [key for key in self._seen if key[0] == model]:
            del self._seen[key]

    def render(self) -> bytes:
        """All of it, in Prometheus' text format 0.0.4."""
        return generate_latest(self._registry)

    def _begin(self, model: str) -> None:
        """Show series at 0, as a rate misses what happened before a series was first seen."""
        for histogram in (self._first_token, self._gap, self._latency, self._prompt, self._output):
            histogram[(model,)]
        for counter, values in ((self._ended, get_args(Reason)), (self._refused, get_args(Refusal))):
            for value in values:
                counter[(model, value)]

    def _rise(self, model: str, group: str, counts: Mapping[str, float], worker: Worker) -> None:
        """Add to counters what was counted outside since the last time."""
        seen = self._seen.setdefault((model, group), _Seen({}, worker))
        fell = any(count < seen.counts.get(name, 0) for name, count in counts.items())
        # One process' counters never fall: what seems to is an older answer, overtaken by a newer one.
        if worker != seen.worker or (fell and worker is None):
            seen.counts, seen.worker = {}, worker
        for name, count in counts.items():
            before = seen.counts.get(name, 0)
            self._engine[name][(model,)].inc(max(0, count - before))
            seen.counts[name] = max(count, before)


@dataclass(slots=True)
class _Seen:
    counts: dict[str, float]
    worker: Worker


class _Children(dict[tuple[str, ...], F], Generic[F]):
    """Series of one metric by the values of its labels: `labels()` costs more than what it finds."""

    def __init__(self, family: F) -> None:
        super().__init__()
        self._family: F = family

    def __missing__(self, values: tuple[str, ...]) -> F:
        child: F = self._family.labels(*values)
        self[values] = child
        return child

    def forget(self, model: str) -> None:
        for values in [values for values in self if values[0] == model]:
            del self[values]
            self._family.remove(*values)
