"""Datasets: the same text every time, or a plain refusal."""

from __future__ import annotations

import pytest

from optkit.builtin.texts import PythonReference, TextFile
from optkit.errors import DamagedError, MissingError


def test_the_python_reference_is_english_text_in_a_fixed_order():
    texts = list(PythonReference().texts())
    assert texts == list(PythonReference().texts())
    assert sum(map(len, texts)) > 400_000
    assert any('The "while" statement' in text for text in texts)


def test_paragraphs_are_documents(tmp_path):
    (tmp_path / "t.txt").write_text("one\nstill one\n\n\n\ntwo é\n\n  \n\n", encoding="utf-8")
    assert [text.strip() for text in TextFile(path=str(tmp_path / "t.txt")).texts()] == ["one\nstill one", "two é"]


def test_what_is_no_text_is_refused(tmp_path):
    with pytest.raises(MissingError, match="no such file"):
        list(TextFile(path=str(tmp_path / "none")).texts())
    (tmp_path / "b").write_bytes(b"\xff\x00")
    for path in (tmp_path / "b", tmp_path):
        with pytest.raises(DamagedError, match="not a readable UTF-8 text file"):
            list(TextFile(path=str(path)).texts())
