"""schemathesis finds no request that the server does not survive, and none that passes without a key."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.serving import Server, folder_artifact

_HOOKS = Path(__file__).parent / "hooks.py"
_KEY = "a-key-for-schemathesis"
_CHECKS = ("not_a_server_error", "ignored_auth", "key_is_needed", "server_is_well")


def test_no_case_breaks_the_server_or_passes_without_a_key(
    serve: Callable[..., Server],
    client: Callable[..., str],
    tiny_artifact: Path,
    tiny_encoder: Path,
    tmp_path: Path,
) -> None:
    tags = ["task:feature-extraction", "arch:bert", "weights:float"]
    encoder = folder_artifact(tmp_path, "encoder", tiny_encoder, max_batch_size=8, max_length=64, tags=tags)
    # Not an admin's key: what unloads the models ends the test.
    server = serve(tiny_artifact, encoder, keys=(_KEY,), state=tmp_path / "state")
    report = tmp_path / "report.json"
    client(
        *("schemathesis", "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
        *("--mode", "all", "--checks", ",".join(_CHECKS), "--max-examples", "20", "--seed", "1"),
        *("--header", f"Authorization: Bearer {_KEY}", "--request-timeout", "60", "--no-color"),
        *("--continue-on-failure", "--report", "json", "--report-json-path", report),
        SCHEMATHESIS_HOOKS=str(_HOOKS),
        SERVER_URL=server.url,
        SERVER_KEY=_KEY,
    )
    found = json.loads(report.read_text())
    print(json.dumps({name: found[name] for name in ("operations", "test_cases", "phases")}))
    assert (found["complete"], found["failures"], found["errors"]) == (True, [], [])
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    statuses = Counter(line["status"] for line in lines if "status" in line)
    print(statuses)
    assert not [status for status in statuses if status >= 500]
    assert server.metric("worker_restarts_total") == 0
    server.settled()
