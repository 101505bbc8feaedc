"""guidellm's sweep over a served model ends without an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.serving import Server

_KEY = "a-key-for-guidellm"
_REQUESTS = 12
"""At each rate."""
_RATES = 4
_OUTPUT = 16


def test_a_sweep_ends_without_an_error(
    serve: Callable[..., Server], client: Callable[..., str], smollm2_artifact: Path, tmp_path: Path
) -> None:
    server = serve(smollm2_artifact, keys=(_KEY,))
    report = tmp_path / "report.json"
    backend = f"kind=openai_http,target={server.url},model=smollm2,api_key={_KEY},request_format=/v1/chat/completions"
    client(
        *("guidellm", "-m", "guidellm", "run", "--disable-console-interactive"),
        *("--backend", backend),
        *("--profile", f"kind=sweep,sweep_size={_RATES},max_concurrency=32"),
        *("--constraint", f"kind=max_requests,count={_REQUESTS}"),
        *("--tokenizer", f"kind=huggingface_auto,model={smollm2_artifact / 'weights'}"),
        *("--data", f"kind=synthetic_text,prompt_tokens=32,output_tokens={_OUTPUT}"),
        *("--output", f"kind=json,path={report}"),
    )
    points = [_point(one) for one in json.loads(report.read_text())["benchmarks"]]
    print(json.dumps(points, indent=1))
    assert [one["strategy"] for one in points] == ["synchronous", "throughput", *["constant"] * (_RATES - 2)]
    for one in points:
        assert (one["errored"], one["incomplete"]) == (0, 0)
        # It stops listening once it has begun the last one, and may miss that one's end.
        assert one["successful"] in (_REQUESTS - 1, _REQUESTS)
        assert one["output tokens"] == _OUTPUT
    assert server.metric("request_success_total", finished_reason="length") == _RATES * _REQUESTS
    assert server.metric("request_success_total") == _RATES * _REQUESTS
    assert server.metric("requests_rejected_total") == 0
    server.settled()


def _point(benchmark: dict[str, Any]) -> dict[str, Any]:
    metrics = benchmark["metrics"]
    mean: Callable[[str], float] = lambda name: round(metrics[name]["successful"]["mean"], 3)  # noqa: E731
    return {
        "strategy": benchmark["config"]["strategy"]["type_"],
        **{name: metrics["request_totals"][name] for name in ("successful", "errored", "incomplete")},
        "requests/s": mean("requests_per_second"),
        "output tokens": mean("output_token_count"),
        "output tokens/s": mean("output_tokens_per_second"),
        "time to first token, ms": mean("time_to_first_token_ms"),
        "inter-token latency, ms": mean("inter_token_latency_ms"),
    }
