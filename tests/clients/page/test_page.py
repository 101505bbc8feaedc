"""The server's page, in Chromium."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serving import Server

HERE = Path(__file__).parent
Browse = Callable[..., dict[str, Any]]


@pytest.fixture
def browse(client: Callable[..., str]) -> Browse:
    """`browse(scene, server, *words)`: what the scene saw. It fails where the page did what no scene may do."""

    def see(scene: str, server: Server, *words: str, refused: tuple[int, ...] = ()) -> dict[str, Any]:
        seen: dict[str, Any] = json.loads(client("page", HERE / "browse.py", scene, server.url, *words))
        # Chromium itself reports every status from 400 up.
        expected = tuple(f"the server responded with a status of {status} " for status in refused)
        assert [line for line in seen["console"] if not any(one in line for one in expected)] == []
        assert seen["violations"] == []
        assert seen["dialogs"] == []
        assert seen["origins"] == [server.url]
        return seen

    return see


@pytest.fixture
def slow(scripted: Callable[..., Path]) -> Path:
    """A language model that takes 50 ms for a token: there is time to stop it."""
    return scripted(0.05, name="slow")


def test_the_page_is_one_small_file_that_may_only_talk_to_its_server(serve: Callable[..., Server], slow: Path) -> None:
    answer = serve(slow).get("/")
    policy = dict(directive.split(" ", 1) for directive in answer.headers["content-security-policy"].split("; "))
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[directive] == f"'sha256-{digest}'"
    assert policy["connect-src"] == "'self'"
    for directive in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert policy[directive] == "'none'"
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"
    assert len(answer.content) < 60_000
    assert set(re.findall(r"https?://[^'\"\s]+", answer.text)) == {"http://www.w3.org/2000/svg"}  # a namespace


def test_a_chat_streams_with_its_figures_and_the_charts_follow(
    browse: Browse, serve: Callable[..., Server], slow: Path, scripted_tensors: Callable[..., Path]
) -> None:
    server = serve(slow, scripted_tensors())
    seen = browse("chat", server)
    assert seen["models"] == ["slow"]  # and not the one that takes arrays

    first, second = seen["answers"]
    for answer in (first, second):
        assert answer["text"]
        assert answer["wrong"] is None
        speed, wait, output, prompt, end = answer["figures"]
        assert re.fullmatch(r"[\d.]+ tokens/s", speed)
        assert re.fullmatch(r"[\d.]+ m?s to first token", wait)
        assert output == "12 out"
        assert re.fullmatch(r"\d+ in( \(\d+ cached\))?", prompt)
        assert end == "cut at the length limit"
    assert seen["said"] == f"slow answered: {second['text']}"
    assert seen["copied"] == second["text"]
    assert seen["cleared"] == 0

    asked = {"role": "user", "content": "One"}, {"role": "user", "content": "Two"}
    system = {"role": "system", "content": "Be brief."}
    assert seen["sent"][0]["messages"] == [system, asked[0]]
    answered = {"role": "assistant", "content": first["text"]}
    assert seen["sent"][1]["messages"] == [system, asked[0], answered, asked[1]]
    wishes = {name: seen["sent"][1][name] for name in ("temperature", "max_tokens", "top_p", "seed")}
    assert wishes == {"temperature": 0, "max_tokens": 12, "top_p": 0.9, "seed": 7}

    assert list(seen["charts"]) == ["Throughput", "Time to first token", "Requests", "KV cache"]
    assert all(len(rows) == 1 and rows[0].startswith("slow") for rows in seen["charts"].values())
    assert all(colours > 3 for colours in seen["ink"])  # more than the grid


@pytest.mark.parametrize("way", ["button", "escape"])
def test_a_stopped_answer_keeps_what_came_and_frees_its_blocks(
    browse: Browse, serve: Callable[..., Server], slow: Path, way: str
) -> None:
    server = serve(slow)
    seen = browse("stop", server, way)
    assert seen["stopped"]["text"]
    assert "stopped" in seen["stopped"]["figures"]
    assert seen["stopped"]["wrong"] is None
    assert "3 out" in seen["next"]["figures"]
    server.settled()
    assert server.metric("request_success_total", finished_reason="cancelled") == 1
    assert server.metric("generation_tokens_total") < 100


def test_two_models_answer_side_by_side(
    browse: Browse, serve: Callable[..., Server], slow: Path, scripted: Callable[..., Path]
) -> None:
    seen = browse("compare", serve(slow, scripted(0.02, name="quick")))
    assert seen["models"] == ["slow", "quick"]
    assert [answer["model"] for answer in seen["answers"]] == ["slow", "quick"]
    assert all("40 out" in answer["figures"] for answer in seen["answers"])
    # Which was faster is the machine's affair; that the line says what the figures say is the page's.
    speeds = {answer["model"]: answer["figures"][0].removesuffix(" tokens/s") for answer in seen["answers"]}
    slower, faster = sorted(speeds, key=lambda model: float(speeds[model]))
    assert seen["verdict"].startswith("On this one answer, ")
    assert f"({faster})" in seen["verdict"].split(" the tokens/s")[0]
    assert f"the tokens/s ({speeds[faster]} against {speeds[slower]})" in seen["verdict"]
    assert "time to first token" in seen["verdict"]


def test_a_keyboard_is_enough(browse: Browse, serve: Callable[..., Server], slow: Path) -> None:
    seen = browse("keyboard", serve(slow))
    assert seen["start"]["name"] == "Message"
    assert seen["draft"] == seen["said"] == "first line\nsecond line"
    names = [stop["name"].splitlines()[0] for stop in seen["stops"]]
    assert names == [
        *("Skip to the message", "Chat", "Side by side", "Theme: auto"),
        *("Settings", "System prompt", "Temperature", "Max tokens", "Top p", "Seed", "Raw: no chat template"),
        *("Live, last 3 minutes", "Model", "Conversation, model", "Message", "Send", "Clear"),
    ]
    assert all(stop["ring"] and stop["seen"] for stop in seen["stops"])
    assert seen["skipped"]["name"] == "Message"
    assert seen["on_stop"]["name"] == "Stop"
    assert seen["after"]["name"] == "Send"
    assert "stopped" in seen["answers"][0]["figures"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_in_light_and_dark_and_on_a_phone(
    browse: Browse, serve: Callable[..., Server], slow: Path, scheme: str
) -> None:
    seen = browse("looks", serve(slow), scheme)
    least, where = seen["contrasts"][0]
    assert least >= 4.5, where  # WCAG 2.2, 1.4.3
    themes = seen["themes"]
    assert themes["Theme: light"] != themes["Theme: dark"]
    assert seen["ground"] == themes["Theme: auto"] == themes[f"Theme: {scheme}"]
    assert set(seen["wider"]) == {0}


def test_markup_from_models_stays_text(browse: Browse, serve: Callable[..., Server], slow: Path) -> None:
    seen = browse("hostile", serve(slow))
    hostile = seen["hostile"]
    assert seen["options"] == [f"{hostile} ({hostile})"]
    assert seen["asked"] == seen["answers"][0]["model"] == hostile
    assert seen["answers"][0]["text"] == f"{hostile}\n```\n{hostile}\n```\n"
    assert seen["elements"] == 0


def test_errors_are_shown_plainly(browse: Browse, serve: Callable[..., Server], slow: Path) -> None:
    seen = browse("broken", serve(slow), refused=(429,))
    within, early, full = seen["answers"]
    assert (within["text"], within["wrong"]) == ("Some", "it brokeserver_error · worker_died · req_1")
    assert (early["text"], early["wrong"]) == ("Some", "The connection ended before the answer did.")
    assert "broken off" in within["figures"]
    assert "broken off" in early["figures"]
    assert full["wrong"] == (
        "too many wait. Try again in 3 s.HTTP 429 · rate_limit_error · queue_full · req_3Try again"
    )


def test_a_model_without_chat_template_continues_raw_text(
    browse: Browse,
    serve: Callable[..., Server],
    scripted_plugin: Path,
    published: Callable[..., Path],
    tiny_tokenizer: Any,
) -> None:
    def weights(folder: Path) -> None:
        tiny_tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").unlink()

    recipe = {"backend": {"scripted": {}}, "batching": {"continuous": {"max_batch_size": 4}}}
    limits = {"max_batch_size": 4, "max_length": 128}
    base = published("base", recipe, weights, tags=["task:causal-lm"], **limits)
    seen = browse("raw", serve(base), refused=(400,))
    assert "the model has no chat template" in seen["refused"][0]["wrong"]
    (answer,) = seen["answers"]
    assert answer["wrong"] is None
    assert answer["text"].startswith("Once upon a time")
    assert len(answer["text"]) > len("Once upon a time")
    assert "6 out" in answer["figures"]


def test_a_key_is_asked_for_only_after_401_and_kept_for_the_tab(
    browse: Browse, serve: Callable[..., Server], slow: Path
) -> None:
    seen = browse("key", serve(slow, keys=("sesame-open-0123456789",)), "sesame-open-0123456789", refused=(401,))
    assert seen["first"] == "This server wants an API key."
    assert seen["focus"].startswith("API key")
    assert seen["answers"][0]["wrong"] is None
    assert seen["kept"] == [["sesame-open-0123456789"], [], ""]
    assert seen["asked again"] is False
