"""Memory that is moved into huge pages: the kernel says where it lies, and the bytes are the same."""

from __future__ import annotations

import ctypes
import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from optkit_backends.onnxruntime import pages
from optkit_backends.onnxruntime.pages import huge_pages

SIZE = 16 << 20


def allocated() -> tuple[mmap.mmap, bytes]:
    """New memory of this process, all of it written, and what was written."""
    memory, written = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.random.default_rng(0).bytes(SIZE)
    memory[:] = written
    return memory, written


def in_huge_pages(memory: mmap.mmap) -> int:
    """Bytes of it that Linux keeps in huge pages."""
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(one, 16) for one in part.split(" ", 1)[0].split("-"))
        if start <= place < end:
            return int(part.split("AnonHugePages:")[1].split()[0]) * 1024
    raise AssertionError("the kernel does not know the mapping")


@pytest.fixture
def ready() -> None:
    try:
        setting = pages.SETTING.read_text()
    except OSError:
        pytest.skip("needs Linux with transparent huge pages")
    if "[madvise]" not in setting:
        pytest.skip(f"needs huge pages on request alone, and {pages.SETTING} says {setting.strip()}")


@pytest.mark.usefixtures("ready")
def test_memory_moves_and_keeps_its_bytes() -> None:
    with huge_pages():
        memory, written = allocated()
        assert in_huge_pages(memory) == 0
    if in_huge_pages(memory) == 0:
        pytest.skip("this kernel gives no huge pages: too old, or none is free")
    assert in_huge_pages(memory) >= SIZE // 2
    assert memory[:] == written


@pytest.mark.usefixtures("ready")
def test_what_was_there_before_stays_where_it_is() -> None:
    memory, written = allocated()
    with huge_pages():
        pass
    assert in_huge_pages(memory) == 0
    assert memory[:] == written


@pytest.mark.parametrize("setting", ["always madvise [never]\n", None])
def test_nothing_is_asked_for_where_there_are_none(
    setting: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "SETTING", tmp_path / "enabled")
    if setting is not None:
        pages.SETTING.write_text(setting)
    with huge_pages():
        memory, written = allocated()
    assert memory[:] == written
    if Path("/proc/self/smaps").exists() and not _always():
        assert in_huge_pages(memory) == 0


def _always() -> bool:
    there = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return there.exists() and "[always]" in there.read_text()
