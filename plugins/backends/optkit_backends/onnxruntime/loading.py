"""Graphs as sessions of ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime

from optkit.errors import DamagedError

__all__ = ["load"]


def load(graph: Path, *, threads: int, spin: bool, trace: Path | None = None) -> Any:
    """A session over a graph.

    Args:
        graph: the file, with its weights beside it.
        threads: that run one call.
        spin: whether threads that wait for their share keep their cores busy.
        trace: where the profiler writes what runs, a prefix of the file's name.

    Raises:
        DamagedError: the runtime cannot read it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    # Other engines run between steps: idle threads must leave them the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if trace:
        options.enable_profiling, options.profile_file_prefix = True, str(trace)
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no other base
        raise DamagedError(f"onnxruntime cannot load it: {error}", where=str(graph)) from error
