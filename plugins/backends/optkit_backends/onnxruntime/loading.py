"""Graphs as sessions of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import onnxruntime

from optkit import hardware
from optkit.errors import DamagedError, MissingError
from optkit_backends.onnxruntime import CPU
from optkit_backends.onnxruntime.signs import with_signed_weights

__all__ = ["Optimization", "load"]

Optimization = Literal["none", "basic", "extended", "all"]
LEVELS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
# On the CPU it makes an operator of a sum and the norm after it that adds number by number. Apart, both are vectorized:
# a row of 384 took 0.7 microseconds, not 2.5.
SLOWER = "SkipLayerNormFusion"
# Where the other weights of a graph lie that does not come from a file.
FOLDER = "session.model_external_initializers_file_folder_path"


def load(
    graph: Path,
    *,
    threads: int,
    spin: bool,
    arena: bool = True,
    optimization: Optimization = "all",
    provider: str = CPU,
    trace: Path | None = None,
) -> Any:
    """A session over a graph.

    Args:
        graph: the file, with its weights beside it.
        threads: that run one call.
        spin: whether threads that wait for their share keep their cores busy.
        arena: whether memory stays with the session between calls.
        optimization: what may happen to the graph, as the runtime names its levels.
        provider: runs every operator.
        trace: where the profiler writes what runs, a prefix of the file's name.

    Raises:
        DamagedError: the runtime cannot read it.
        MissingError: the provider cannot run some of its operators.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = arena
    options.graph_optimization_level = LEVELS[optimization]
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    # Other engines run between steps: idle threads must leave them the cores.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    slower = [SLOWER] if provider == CPU else []
    if provider != CPU:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if trace:
        options.enable_profiling, options.profile_file_prefix = True, str(trace)
    try:
        model: Path | bytes = graph
        if provider == CPU and hardware.exact_byte_products() and (changed := with_signed_weights(graph)):
            model, weights = changed
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
            options.add_external_initializers([*weights], values)
            options.add_session_config_entry(FOLDER, str(graph.parent))
        return onnxruntime.InferenceSession(model, options, providers=[provider], disabled_optimizers=slower)
    except Exception as error:  # the runtime's exceptions share no other base
        if "disable_cpu_ep_fallback" in str(error) or "fallback to CPU EP" in str(error):
            what = f"{provider} has no kernel for some of its operators"
            raise MissingError(what, where=str(graph), remedy=f"use execution_provider: {CPU}") from error
        raise DamagedError(f"onnxruntime cannot load it: {error}", where=str(graph)) from error
