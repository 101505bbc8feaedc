"""The native kernels, built in other ways: with sanitizers, and with AVX-512 emulated where a processor has none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from optkit_backends.torch.native import building
from optkit_backends.torch.native.layout import Instructions

HERE = Path(__file__).parent
TESTS = HERE / "test_native.py"
CHILD = """
import sys
from pathlib import Path

import pytest

from optkit_backends.torch.native import building

tests, wanted, sources, *flags = sys.argv[1:]
building._SOURCES = Path(sources)
building._FLAGS += flags
building._LINKING += [flag for flag in flags if "sanitize" in flag]
sys.exit(pytest.main(["-q", "-n0", "-p", "no:cacheprovider", "--timeout=0", "-k", wanted, tests]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(building.missing() is not None, reason=str(building.missing())),
]


def passes(cache, wanted, sources, *flags, **environment):
    """What the tests of the kernels say, of those `wanted`, of another build of `sources`."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(TESTS), wanted, str(sources), *flags],
        env=os.environ | environment | {"OPTKIT_CACHE": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_sanitizers_find_nothing(tmp_path):
    preloaded = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    passes(
        tmp_path,
        "products or schedule or architectures or conforms",
        building._SOURCES,
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-g",
        LD_PRELOAD=preloaded.stdout.strip(),
        ASAN_OPTIONS="detect_leaks=0",  # Python's own
    )


def test_avx512_kernels_pass_where_they_are_emulated(tmp_path):
    if building.best_instructions() != Instructions.AVX2:
        pytest.skip("AVX-512 is emulated for processors that have AVX2 and no more")
    sources = tmp_path / "csrc"
    shutil.copytree(building._SOURCES, sources)
    shutil.copy(HERE / "avx512_emulated.h", sources)

    def change(name, before, after):
        text = (sources / name).read_text()
        assert before in text
        (sources / name).write_text(text.replace(before, after))

    change("step_avx512.cpp", 'target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")', 'target("avx2,fma")')
    change("step_avx512.cpp", "#include <immintrin.h>", '#include "avx512_emulated.h"')
    change("vectors.inc", '#define IN_ORDER(a) __asm__ volatile("" : "+v"(a))', "#define IN_ORDER(a)")
    change(
        "api.cpp", "Instructions optkit_instructions() {", "Instructions optkit_instructions() {\n  return AVX512_VNNI;"
    )
    said = passes(tmp_path / "cache", "not refused and not one_line", sources)
    assert "no AVX-512" not in said
