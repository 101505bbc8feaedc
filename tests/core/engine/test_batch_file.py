"""A batch answers each line once, in OpenAI's words, whatever interrupts it."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time

import pytest

from optkit.engine import batch_file
from optkit.engine.batch_file import run_batch
from optkit.engine.llm import LLM
from optkit.engine.request import SamplingParams
from optkit.errors import MachineError, RecipeError, RequestError

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def line(custom_id, body, url=TEXT):
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def answers(file):
    return [json.loads(one) for one in file.read_text().splitlines()]


@pytest.fixture
def batch(scripted, tmp_path):
    """`batch(lines)` answers them and gives the outcome and the answers."""
    artifact = scripted()

    def run(lines, **options):
        source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("\n".join(lines))
        outcome = run_batch(artifact, source, output, **options)
        assert not (tmp_path / "out.jsonl.partial").exists()
        return outcome, answers(output)

    run.artifact = artifact
    return run


def test_every_answer_is_what_the_offline_api_says(batch):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "What is the "}, {"type": "text", "text": "fox?"}]}
    ]
    outcome, [chat, text, ids] = batch(
        [
            line("a chat", {"model": "any", "messages": messages, "temperature": 0, "max_completion_tokens": 9}, CHAT),
            line("a text", {"prompt": "The quick", "temperature": 0, "n": 2, "seed": 3}),
            "",
            line("two prompts", {"prompt": [[7, 42, 99], [8]], "temperature": 0, "max_tokens": 5, "user": "me"}),
        ]
    )
    with LLM(batch.artifact) as llm:
        whole = [{"role": "user", "content": "What is the fox?"}]
        [one] = llm.generate([whole], SamplingParams(max_tokens=9))
        [two] = llm.generate("The quick", SamplingParams(max_tokens=16, n=2))
        three, four = llm.generate([(7, 42, 99), (8,)], SamplingParams(max_tokens=5))
    assert [answer["custom_id"] for answer in (chat, text, ids)] == ["a chat", "a text", "two prompts"]
    assert len({answer["id"] for answer in (chat, text, ids)}) == 3
    assert chat["error"] is None
    assert chat["response"]["status_code"] == 200
    body = chat["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "any")
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": one.text, "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert body["usage"]["prompt_tokens"] == one.prompt_tokens
    assert body["usage"]["total_tokens"] == one.prompt_tokens + 9
    body = text["response"]["body"]
    assert (body["object"], body["model"]) == ("text_completion", "scripted")
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, two.samples[0].text),
        (1, two.samples[1].text),
    ]
    body = ids["response"]["body"]
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [(0, three.text), (1, four.text)]
    assert body["usage"]["prompt_tokens"] == 4
    assert (outcome.lines, outcome.resumed, outcome.counts.succeeded, outcome.counts.failed) == (3, 0, 3, 0)
    assert outcome.counts.output_tokens == 9 + 32 + 10


def test_log_probabilities_in_openai_s_words(batch):
    _, [chat, text] = batch(
        [
            line(
                "a",
                {
                    "messages": [{"role": "user", "content": "a"}],
                    "max_tokens": 3,
                    "temperature": 0,
                    "logprobs": True,
                    "top_logprobs": 2,
                },
                CHAT,
            ),
            line("b", {"prompt": "fox", "max_tokens": 2, "logprobs": 1, "echo": True, "temperature": 0}),
        ]
    )
    [choice] = chat["response"]["body"]["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 3
    assert all(len(one["top_logprobs"]) == 2 and one["logprob"] <= 0 for one in content)
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]
    [choice] = text["response"]["body"]["choices"]
    logprobs = choice["logprobs"]
    prompt = text["response"]["body"]["usage"]["prompt_tokens"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["top_logprobs"]) == prompt + 2
    assert logprobs["token_logprobs"][0] is None
    assert all(one < 0 for one in logprobs["token_logprobs"][1:])
    assert choice["text"].startswith("fox")
    assert logprobs["text_offset"][0] == 0


def test_structures_and_stops_reach_the_engine(batch):
    schema = {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    ask = {"messages": [{"role": "user", "content": "a"}], "temperature": 0, "max_tokens": 100}
    _, [structured, banned] = batch(
        [
            line("a", {**ask, "response_format": form}, CHAT),
            line("b", {"prompt": "fox", "logit_bias": {"70": 100}, "stop_token_ids": [70]}),
        ]
    )
    [choice] = structured["response"]["body"]["choices"]
    assert json.loads(choice["message"]["content"]) == {"a": 1}
    assert choice["finish_reason"] == "stop"
    assert banned["response"]["body"]["usage"]["completion_tokens"] == 1


WRONG = [
    ({"prompt": "a", "max_token": 3}, "max_token: unknown field", "max_token"),
    ({"prompt": "a", "temperature": "hot"}, "temperature: Input should be a valid number", "temperature"),
    ({"prompt": "a", "stream": True}, "stream: a batch file has nobody to stream to", None),
    ({"prompt": "a", "max_tokens": 1000}, "a sequence can have 128", None),
    ({"prompt": [400]}, "token ids outside 0 to 319", None),
    ({"prompt": ["good", "x" * 200]}, "a sequence can have 128", None),
    ({"prompt": []}, "the prompt is empty", None),
    ({"prompt": "a", "best_of": 1, "n": 2}, "best_of draws 1 samples", None),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias: keys are token ids", None),
    ({"prompt": "half \ud800"}, "surrogate", "prompt"),
    ({}, "prompt: Field required", "prompt"),
]


def test_a_wrong_body_is_the_answer_of_its_line_alone(batch):
    lines = [line(f"wrong {number}", body) for number, (body, _, _) in enumerate(WRONG)]
    broken = line("broken", {"prompt": [7, 312]})
    outcome, found = batch([*lines, broken, line("good", {"prompt": "a"})])
    for answer, (_, message, param) in zip(found, WRONG, strict=False):
        response = answer["response"]
        assert response["status_code"] == 400
        assert message in response["body"]["error"]["message"]
        assert response["body"]["error"]["param"] == param
        assert response["body"]["error"]["type"] == "invalid_request_error"
    failed = found[-2]["response"]
    assert (failed["status_code"], failed["body"]["error"]["type"]) == (500, "server_error")
    assert failed["body"]["error"]["message"] == "RuntimeError: this token cannot be computed"
    assert found[-1]["response"]["status_code"] == 200
    assert (outcome.counts.succeeded, outcome.counts.failed) == (1, len(WRONG) + 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{", r"in.jsonl:2:2: is no JSON \("),
        ("[1]", r"in.jsonl:2: is no JSON object, found \[1\]; give custom_id, method, url, body"),
        ('{"custom_id": "b", "url": "/v1/completions", "body": {}}', "in.jsonl:2: method is missing"),
        (line("b", {}).replace("POST", "GET"), "in.jsonl:2: method is not POST, found 'GET'"),
        (line("b", {}, "/v1/embeddings"), "unknown url, found '/v1/embeddings'; there are /v1/chat/completions and"),
        (line("b", []), "in.jsonl:2: body is no JSON object"),
        (line("", {}), "in.jsonl:2: custom_id is no text"),
        (line(3, {}), "in.jsonl:2: custom_id is no text"),
        (line("a", {}), "in.jsonl:2: has the custom_id of line 1, found 'a'; give each its own"),
        (line("b", {}).replace("body", "bodi", 1), "body is missing"),
        (line("b", {})[:-1] + ', "bodi": 1}', "unknown key, found 'bodi'; did you mean body"),
        (line("b", {"temperature": float("nan")}), "NaN is no number there"),
        ("[" * 100_000, "nested too deeply"),
        (line("b", {}).encode()[:-1] + b"\xff", "in.jsonl:2:.*: is not UTF-8; save it as UTF-8"),
    ],
)
def test_a_file_with_a_wrong_line_is_refused_whole(scripted, tmp_path, wrong, message):
    source = tmp_path / "in.jsonl"
    wrong = wrong if isinstance(wrong, bytes) else wrong.encode()
    source.write_bytes(line("a", {"prompt": "a"}).encode() + b"\n" + wrong + b"\n")
    with pytest.raises(RequestError, match=message):
        run_batch(scripted(), source, tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out.jsonl*"))


def test_no_more_lines_are_in_the_engine_than_a_window(scripted, tmp_path, monkeypatch):
    seen = []
    step = batch_file._Run._take

    def watched(run, delta):
        stats = run._engine.stats
        seen.append(stats.waiting + stats.running)
        step(run, delta)

    monkeypatch.setattr(batch_file._Run, "_take", watched)
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(line(str(n), {"prompt": [n + 6], "max_tokens": 3}) for n in range(100)))
    run_batch(scripted(), source, tmp_path / "out.jsonl")
    assert max(seen) <= 16


def test_what_is_answered_stays_answered(scripted, tmp_path):
    source, output, partial = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "out.jsonl.partial"))
    lines = [line(str(n), {"prompt": [n + 6], "temperature": 0}) for n in range(6)]
    source.write_text("\n".join(lines))
    artifact = scripted()
    first = run_batch(artifact, source, output)
    whole = output.read_bytes()
    again = run_batch(artifact, source, output)
    assert (again.resumed, again.counts) == (6, first.counts)
    assert output.read_bytes() == whole

    # A run that was broken off, in the middle of its fourth answer, which had not come in order.
    kept = whole.splitlines(keepends=True)
    marked = [one.replace(b'"created":', b'"created":7') for one in (kept[4], kept[0], kept[2])]
    output.unlink()
    partial.write_bytes(b"".join(marked) + kept[1][:40])
    told = []
    outcome = run_batch(artifact, source, output, progress=lambda *state: told.append(state))
    assert (outcome.resumed, outcome.counts) == (3, first.counts)
    assert told == [("batch", done, 6, "") for done in (3, 4, 5, 6)]
    assert [answer["custom_id"] for answer in answers(output)] == list("012345")
    found = output.read_bytes().splitlines(keepends=True)
    assert [found[4], found[0], found[2]] == marked

    # Other requests, or another artifact.
    source.write_text("\n".join([*lines[:5], line("5", {"prompt": "x"})]))
    with pytest.raises(RecipeError, match=r"out.jsonl: holds something else than answers to .*in.jsonl .*--overwrite"):
        run_batch(artifact, source, output)
    output.rename(partial)
    with pytest.raises(RecipeError, match=r"partial: holds answers to other requests than .*in.jsonl"):
        run_batch(artifact, source, output)
    source.write_text("\n".join(lines))
    with pytest.raises(RecipeError, match=r"or of another artifact; choose another output, or add --overwrite"):
        run_batch(scripted(name="other"), source, output)
    assert run_batch(scripted(name="third"), source, output, overwrite=True).resumed == 0
    assert run_batch(artifact, source, output, overwrite=True).resumed == 0


def test_two_runs_do_not_mix(scripted, tmp_path):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(line("a", {"prompt": "a"}))
    with batch_file._alone(output), pytest.raises(MachineError, match="another optkit batch is writing it"):
        run_batch(scripted(), source, output)


def start(artifact, source, output, **options):
    command = [sys.executable, "-m", "optkit.cli", "batch", str(artifact), str(source), str(output), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def contents(file):
    """Answers without what differs from run to run."""
    found = answers(file)
    for answer in found:
        del answer["response"]["body"]["created"]
    return found


def test_killed_again_and_again_it_answers_every_line_once(scripted, tmp_path):
    dice = random.Random(7)
    source, output, partial = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "out.jsonl.partial"))
    bodies = [
        {"prompt": [dice.randint(6, 200)], "max_tokens": dice.randint(1, 30), "temperature": 1} for _ in range(120)
    ]
    source.write_text("\n".join(line(f"{n}", body | {"seed": n}) for n, body in enumerate(bodies)))
    artifact = scripted(0.004)
    run_batch(artifact, source, tmp_path / "at once.jsonl")

    kept = b""
    for more, blow in ((1, signal.SIGKILL), (20, signal.SIGKILL), (40, signal.SIGINT)):
        process = start(artifact, source, output)
        wanted = kept.count(b"\n") + more
        while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < wanted):
            time.sleep(0.001)
        process.send_signal(blow)
        _, err = process.communicate()
        found = partial.read_bytes()
        # What was there is there, byte for byte: nothing was answered again.
        assert found.startswith(kept)
        assert not output.exists()
        kept = found[: found.rindex(b"\n") + 1]
        ids = [json.loads(one)["custom_id"] for one in kept.splitlines()]
        assert wanted <= len(ids) == len(set(ids)) < 120
    assert process.returncode == 130
    said = f"interrupted; answers are kept in {partial}, the same command goes on from there"
    assert err.splitlines()[-1] == f"optkit: {said}"

    process = start(artifact, source, output)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert json.loads(out)["resumed"] == len(ids)
    assert contents(output) == contents(tmp_path / "at once.jsonl")
    assert set(kept.splitlines()) <= set(output.read_bytes().splitlines())
    assert sorted(file.name for file in tmp_path.glob("out*")) == ["out.jsonl"]
