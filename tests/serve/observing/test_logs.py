"""Everything is one JSON object a line, and nobody outside can write a line."""

from __future__ import annotations

import logging
import re
import warnings


def test_a_line_says_when_how_grave_who_and_what(logged):
    logging.getLogger("optkit.anything").warning("disk %s", "full", extra={"free": 3})
    [line] = logged()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {"level": "warning", "logger": "optkit.anything", "event": "disk full", "free": 3}


def test_uvicorn_writes_the_same_lines_and_no_access_log(logged):
    logging.getLogger("uvicorn.error").info("Started", extra={"color_message": "\x1b[36mStarted"})
    logging.getLogger("uvicorn.access").info("GET /secret?key=1")
    [line] = logged()
    assert (line["logger"], line["event"]) == ("uvicorn.error", "Started")
    assert "color_message" not in line


def test_a_traceback_is_a_field(logged):
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        logging.getLogger("optkit.x").exception("failed")
    [line] = logged()
    assert line["traceback"].startswith("Traceback")
    assert line["traceback"].endswith("ValueError: first\nsecond")


def test_what_a_client_sends_cannot_begin_a_line_or_reach_a_terminal(logged):
    forged = 'x"}\n{"event": "forged"}\r\x85\u2028\x1b[2J\x00\x7f'
    # Half of a surrogate pair not in the message: pytest keeps that, and its workers cannot send it.
    logging.getLogger("optkit.x").info("from %s", forged, extra={"client_request_id": f"{forged}\ud800"})
    [line] = logged()
    assert line["client_request_id"] == f"{forged}\ud800"
    assert line["event"] == f"from {forged}"


def test_the_bytes_of_a_line_are_plain_ascii(logged, capsys):
    from optkit.serve.observing.logs import configure

    configure()
    logging.getLogger("optkit.x").info("é\n\x1b\x7f")
    written = capsys.readouterr().err
    assert written.isascii()
    assert written.count("\n") == 1
    assert written.rstrip("\n").isprintable()


def test_a_warning_is_a_line(logged):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("soon gone", stacklevel=1)
    [line] = logged()
    assert line["logger"] == "py.warnings"
    assert "soon gone" in line["event"]


def test_handlers_from_before_say_nothing_twice(logged, capsys):
    from optkit.serve.observing.logs import configure

    logger = logging.getLogger("optkit.before")
    logger.addHandler(logging.StreamHandler())
    configure()
    logger.error("once")
    assert capsys.readouterr().err.count("once") == 1
