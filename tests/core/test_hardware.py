"""Facts of the machine, against files as kernels write them, and ceilings that are measured for real but briefly."""

import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optkit import hardware
from optkit.errors import MachineError
from optkit.hardware import ceilings, cgroups, facts
from optkit.locations import cache_root

XEON = """processor\t: 0
model name\t: Some Xeon
flags\t\t: fpu avx2 avx512f amx_tile amx_int8 avx512_vnni

processor\t: 1
model name\t: another
flags\t\t: fpu
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm sve\n"


@pytest.fixture
def control_groups(tmp_path):
    """Writes a /proc/self and a mounted hierarchy, and returns that /proc/self."""

    def make(cgroup: str, mounts: list[tuple[str, str, str]], files: dict[str, str]) -> Path:
        proc = tmp_path / "proc"
        proc.mkdir()
        (proc / "cgroup").write_text(cgroup)
        lines = ["22 1 0:20 / /proc rw,nosuid - proc proc rw"]
        for number, (root, kind, options) in enumerate(mounts):
            lines.append(
                f"3{number} 22 0:3{number} {root} {tmp_path}/mount{number} rw shared:1 - {kind} cgroup {options}"
            )
        (proc / "mountinfo").write_text("\n".join(lines) + "\n")
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return proc

    return make


def test_version_2_takes_the_tightest_group_on_the_way_up(control_groups):
    proc = control_groups(
        "0::/machine/job\n",
        [("/", "cgroup2", "rw")],
        {
            "mount0/machine/job/cpu.max": "max 100000\n",
            "mount0/machine/cpu.max": "150000 100000\n",
            "mount0/machine/job/memory.max": "1000\n",
            "mount0/machine/job/memory.current": "700\n",
            "mount0/machine/job/memory.stat": "anon 400\ninactive_file 200\n",
            "mount0/machine/memory.max": "max\n",
            "mount0/machine/memory.current": "900\n",
        },
    )
    assert cgroups.cpu_quota(proc) == 1.5
    assert list(cgroups.memory_limits(proc)) == [cgroups.MemoryLimit(limit=1000, used=500)]


def test_version_1_in_a_container_that_sees_the_path_of_its_host(control_groups):
    proc = control_groups(
        "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
        [("/docker/abc", "cgroup", "rw,cpu,cpuacct"), ("/docker/abc", "cgroup", "rw,memory")],
        {
            "mount0/cpu.cfs_quota_us": "50000\n",
            "mount0/cpu.cfs_period_us": "100000\n",
            "mount1/memory.limit_in_bytes": "2000\n",
            "mount1/memory.usage_in_bytes": "1500\n",
            "mount1/memory.stat": "cache 300\ninactive_file 1\ntotal_inactive_file 300\n",
        },
    )
    assert cgroups.cpu_quota(proc) == 0.5
    assert list(cgroups.memory_limits(proc)) == [cgroups.MemoryLimit(limit=2000, used=1200)]


def test_no_quota_is_infinite(control_groups):
    unlimited = {"mount0/job/cpu.cfs_quota_us": "-1\n", "mount0/job/cpu.cfs_period_us": "100000\n"}
    assert cgroups.cpu_quota(control_groups("2:cpu:/job\n", [("/", "cgroup", "rw,cpu")], unlimited)) == math.inf


def test_a_system_without_control_groups_limits_nothing(tmp_path):
    assert cgroups.cpu_quota(tmp_path / "absent") == math.inf
    assert list(cgroups.memory_limits(tmp_path / "absent")) == []


@pytest.mark.parametrize(("quota", "cores"), [(0.2, 1), (1.0, 1), (1.5, 2), (3.0, 3), (64.0, 4), (math.inf, 4)])
def test_usable_cores_are_the_allowed_ones_cut_by_the_quota(monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(facts, "cpu_quota", lambda: quota)
    assert hardware.usable_cores() == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no processor affinity")
def test_usable_cores_follow_the_real_affinity():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "from optkit.hardware import usable_cores; print(usable_cores())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_memory_is_cut_by_the_tightest_group_and_never_negative(monkeypatch):
    groups = [cgroups.MemoryLimit(limit=2**30, used=2**29), cgroups.MemoryLimit(limit=2**31, used=2**32)]
    monkeypatch.setattr(facts, "memory_limits", lambda: iter(groups))
    assert hardware.memory() == hardware.Memory(total=2**30, available=0)


def test_memory_without_limits_is_the_machines(monkeypatch):
    monkeypatch.setattr(facts, "memory_limits", lambda: iter(()))
    assert hardware.memory().total == psutil.virtual_memory().total
    assert 0 < hardware.memory().available < hardware.memory().total


@pytest.mark.parametrize(
    ("text", "extensions", "name"),
    [
        (XEON, ("avx2", "avx512f", "avx512_vnni", "amx_tile", "amx_int8"), "Some Xeon"),
        (ARM, ("neon", "dotprod", "i8mm", "sve"), None),
    ],
)
def test_vector_extensions_and_name_come_from_the_first_processor(tmp_path, text, extensions, name):
    (tmp_path / "cpuinfo").write_text(text)
    assert hardware.isa(tmp_path / "cpuinfo") == extensions
    assert hardware.cpu_name(tmp_path / "cpuinfo") == (name or hardware.cpu_name(tmp_path / "absent"))


def test_torch_agrees_about_the_vector_extensions():
    capability = torch.backends.cpu.get_cpu_capability()
    assert (capability == "AVX512") <= ("avx512f" in hardware.isa())
    assert (capability == "AVX2") <= ("avx2" in hardware.isa())


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program of that name on the path, with the given script."""

    def install(script: str) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
        hardware.devices.cache_clear()

    yield install
    hardware.devices.cache_clear()


def test_gpus_are_those_that_the_driver_lists(nvidia_smi):
    nvidia_smi('echo "NVIDIA H100 80GB HBM3, 81559"; echo "GB10, Grace, [N/A]"')
    assert hardware.devices() == (
        hardware.Device("NVIDIA H100 80GB HBM3", 81559 * 2**20),
        hardware.Device("GB10, Grace", None),
    )


def test_a_broken_driver_tool_falls_back_to_the_kernels_own_list(nvidia_smi):
    nvidia_smi("echo 'driver mismatch' >&2; exit 9")
    listed = list(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    assert len(hardware.devices()) == len(listed)


def test_the_fingerprint_names_the_hardware_and_no_software():
    here = hardware.machine()
    same = replace(here, libraries={}, system="another", python="3.99", memory=replace(here.memory, available=1))
    assert same.fingerprint() == here.fingerprint() == hardware.machine().fingerprint()
    for other in ({"cores": here.cores + 1}, {"cpu": "another"}, {"devices": (hardware.Device("H100", None),)}):
        assert replace(here, **other).fingerprint() != here.fingerprint()


def test_the_facts_are_plain_data():
    here = hardware.machine()
    facts_of_it = json.loads(json.dumps(here.facts()))
    assert facts_of_it["cpu"] == hardware.cpu_name()
    assert facts_of_it["memory"]["total"] == here.memory.total
    assert "libraries" not in facts_of_it


def test_libraries_are_the_installed_ones_and_their_versions():
    found = hardware.libraries()
    assert found["torch"] == torch.__version__
    assert set(found) <= set(facts.LIBRARIES)


def test_facts_and_cached_ceilings_import_neither_torch_nor_numpy():
    code = (
        "import sys; from optkit import hardware; hardware.machine(); hardware.peaks();"
        "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(ceilings, "SECONDS", 0.02)


@pytest.fixture
def kept(brief):
    """The file of ceilings that were measured just now, and the ceilings."""
    result = hardware.measure(lambda *_: None)
    (file,) = (cache_root() / "peaks").iterdir()
    return file, result


def test_measured_ceilings_are_kept_and_found_again(kept):
    file, result = kept
    assert hardware.peaks() == result
    assert file.suffix == ".json"
    assert result.cores == hardware.usable_cores()
    assert result.torch == torch.__version__


def test_measured_ceilings_are_possible(kept):
    _, result = kept
    # From any phone to any server; a wrong unit is off by a thousand.
    assert 0.5 < result.read_gb_per_s < 5000
    assert 0.5 < result.copy_gb_per_s < 5000
    for name in ("fp32_gflops", "bf16_gflops", "int8_gops"):
        figure = getattr(result, name)
        assert (figure is None) == (name in result.unsupported)
        assert figure is None or 0.1 < figure < 1e6
    assert result.fp32_gflops is not None


def test_work_takes_the_longer_of_reading_and_computing():
    found = {"read_gb_per_s": 10, "copy_gb_per_s": 10, "fp32_gflops": 100, "bf16_gflops": None, "int8_gops": 400}
    peaks = hardware.Peaks(**found, unsupported={"bf16_gflops": "no kernel"}, cores=2, torch="2")
    assert peaks.least_seconds(20e9, 100e9) == pytest.approx(2)
    assert peaks.least_seconds(20e9, 300e9) == pytest.approx(3)
    assert peaks.least_seconds(20e9, 200e9, 800e9) == pytest.approx(4)
    unmeasured = peaks.model_copy(update={"int8_gops": None})
    assert unmeasured.least_seconds(0, 200e9, 800e9) == pytest.approx(2)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b'{"read_gb_per_s": "fast"}', b"null"])
def test_a_damaged_cache_is_measured_again(kept, damage):
    file, _ = kept
    file.write_bytes(damage)
    assert hardware.peaks() is None
    again = hardware.peaks(cached_only=False)
    assert again is not None
    assert hardware.peaks() == again


def test_another_torch_measures_for_itself(kept, monkeypatch):
    monkeypatch.setattr(ceilings, "_torch_version", lambda: "2.99.0")
    assert hardware.peaks() is None


def test_a_product_that_torch_cannot_do_is_none_with_the_reason(brief, monkeypatch):
    def refuse(*_):
        raise RuntimeError("_int_mm is not implemented\nfor this processor")

    monkeypatch.setattr(torch, "_int_mm", refuse)
    monkeypatch.setattr(ceilings, "_integer_linear", refuse)
    result = hardware.measure(lambda *_: None)
    assert result.int8_gops is None
    assert result.unsupported == {"int8_gops": "_int_mm is not implemented for this processor"}
    assert hardware.peaks() == result


@pytest.mark.parametrize("refusing", ["_integer_product", "_integer_linear"])
def test_one_product_of_integers_is_enough(brief, monkeypatch, refusing):
    def refuse(side):
        raise RuntimeError("not for this processor")

    monkeypatch.setattr(ceilings, "_integer_product", lambda side: lambda: None)
    monkeypatch.setattr(ceilings, "_integer_linear", lambda side: lambda: None)
    monkeypatch.setattr(ceilings, refusing, refuse)
    result = hardware.measure(lambda *_: None)
    assert result.int8_gops is not None
    assert result.unsupported == {}


def test_a_linear_layer_of_integers_multiplies_them():
    try:
        found = ceilings._integer_linear(16)()
    except RuntimeError as error:
        pytest.skip(str(error))
    assert found.dtype == torch.uint8
    assert found.tolist() == [[16] * 16] * 16


def test_measuring_tells_its_progress_and_gives_the_threads_back(brief):
    before, told = torch.get_num_threads(), []
    hardware.measure(lambda done, total, what: told.append((done, total, what)))
    assert [(done, total) for done, total, _ in told] == [(step, 4) for step in range(5)]
    assert torch.get_num_threads() == before


def test_an_unwritable_cache_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(MachineError, match=r"cannot write the cache folder \(Not a directory\); set OPTKIT_CACHE"):
        hardware.measure(lambda *_: pytest.fail("measured first"))


def test_too_little_memory_is_refused(brief, monkeypatch):
    monkeypatch.setattr(ceilings, "memory", lambda: hardware.Memory(total=2**30, available=2**28))
    with pytest.raises(MachineError, match="needs 768 MiB of free memory, found '256 MiB'"):
        hardware.measure(lambda *_: None)


def test_the_quick_probe_gives_a_possible_figure():
    assert 0.1 < hardware.quick_gflops() < 1e6


@given(st.text(st.characters(exclude_characters="\r\n", codec="utf-8")), st.integers(1, 10**7) | st.just("[N/A]"))
def test_any_name_that_a_driver_may_print_survives(name, size):
    device = facts.parse_smi(f"{name}, {size}")
    assert device == hardware.Device(name.strip(), size * 2**20 if isinstance(size, int) else None)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap has these settings")
def test_freed_memory_is_kept_and_not_faulted_in_again():
    code = """
import resource, torch
from optkit import hardware
assert hardware.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(16 << 20).mul_(2)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(5)))  # something small may take a block's place once
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4 * (64 << 20) / 4096 / 100  # each of the four blocks has 64 MiB of pages
