"""What schemathesis does beside its own cases: see `test_schemathesis.py`."""

import os
import time

import requests
import schemathesis

URL, KEY = os.environ["SERVER_URL"], os.environ["SERVER_KEY"]
GOOD = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 1}
BUSY = ("optkit:num_requests_running", "optkit:num_requests_waiting", "optkit:kv_cache_usage_perc")
MOST = 16
"""Tokens and choices that a case may ask for, where it may ask for any number: it is not about the model."""
COUNTS = {"max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "n", "best_of"}

session = requests.Session()
session.headers["authorization"] = f"Bearer {KEY}"


@schemathesis.hook
def map_path_parameters(context, path_parameters):
    """Names of models are mostly those of models; others are not found, which tells little."""
    if isinstance(path_parameters, dict) and isinstance(path_parameters.get("name"), str):
        names = ("tiny", "encoder", path_parameters["name"])
        return {**path_parameters, "name": names[len(path_parameters["name"]) % len(names)]}
    return path_parameters


@schemathesis.hook
def map_body(context, body):
    """The same in bodies."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    if isinstance(body.get("model"), str):
        body["model"] = "encoder" if "embeddings" in context.operation.path else "tiny"
    for name in COUNTS & body.keys():
        if type(body[name]) is int and MOST < body[name] < 1 << 31:
            body[name] = MOST
    return body


@schemathesis.check
def key_is_needed(ctx, response, case):
    """The same request without a key, and with a wrong one, is refused, whatever it is."""
    for headers in ({}, {"authorization": "Bearer not-a-key-of-this-server"}):
        asked = requests.request(case.method, response.request.url, headers=headers, timeout=30)
        # What is no HTTP is refused before anybody looks for a key in it.
        refused = asked.status_code == 401 or asked.status_code == response.status_code == 400
        assert refused, f"{case.method} {case.path} without a key: {asked.status_code}"


@schemathesis.check
def server_is_well(ctx, response, case):
    """After each case a good request passes and all blocks are free."""
    answer = session.post(f"{URL}/v1/completions", json=GOOD, timeout=30)
    assert answer.status_code == 200, f"a good request after the case: {answer.status_code} {answer.text[:200]}"
    end = time.monotonic() + 30
    while busy := _busy():
        assert time.monotonic() < end, f"the server does not come to rest: {busy}"
        time.sleep(0.01)


def _busy():
    lines = session.get(f"{URL}/metrics", timeout=30).text.splitlines()
    return [line for line in lines if line.startswith(BUSY) and float(line.rsplit(" ", 1)[1])]
