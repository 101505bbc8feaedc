"""A compiled model of one step as a session: encoders, vision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino

from optkit.backends import TensorSession
from optkit.errors import DamagedError
from optkit.steps import KernelTime, TensorSpec
from optkit_backends.openvino.files import GRAPH, TensorFacts

__all__ = ["OpenVINOTensorSession"]

# The kernels whose first constant is a matrix that they multiply with.
PRODUCTS = frozenset({"FullyConnected", "Convolution", "MatMul"})


class OpenVINOTensorSession(TensorSession):
    """Runs what `compile_model` or `compile_tensors` wrote; see `optkit.backends.TensorSession`.

    Args:
        directory: holds the files.
        threads: of all calls together.
        streams: calls at the same time.
        integer_products: whether layers of static int8 activations multiply integers. Otherwise their inputs are
            rounded in float32.

    Raises:
        DamagedError: a file is missing, cut short, or not what was written.
    """

    def __init__(self, directory: Path, *, threads: int, integer_products: bool, streams: int = 1) -> None:
        self._facts, self._graph = TensorFacts.read(directory), directory / GRAPH
        self._settings: dict[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": streams,
            # Sessions of several processes would all be tied to the same cores.
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": "f32",
            # By default the inputs of integer weights are rounded to int8, which the artifact does not say.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "LP_TRANSFORMS_MODE": "YES" if integer_products else "NO",
        }
        compiled = self._compiled()
        self.streams = streams
        self._idle: Any = SimpleQueue()
        for _ in range(streams):
            self._idle.put(compiled.create_infer_request())
        self.inputs = {port.get_any_name(): _spec(port) for port in compiled.inputs}
        self.outputs = {port.get_any_name(): _spec(port) for port in compiled.outputs}
        found = [list(self.inputs), list(self.outputs)]
        if found != [self._facts.inputs, self._facts.outputs]:
            raise DamagedError("has other inputs and outputs than were written", where=str(self._graph), found=found)

    def run(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, npt.NDArray[np.generic]]:
        idle = self._idle  # also of a call that outlives the session
        request = idle.get()
        try:
            # Outputs are copied, since the next call overwrites the request's own; inputs are not.
            found = request.infer([inputs[name] for name in self.inputs], share_inputs=True)
        finally:
            idle.put(request)
        return dict(zip(self.outputs, found.values(), strict=True))

    def profile(self, inputs: Mapping[str, npt.NDArray[np.generic]]) -> list[KernelTime]:
        compiled = self._compiled(PERF_COUNT=True)
        request = compiled.create_infer_request()
        for _ in range(2):  # the first call makes kernels for these sizes
            request.infer([inputs[name] for name in self.inputs])
        nodes = {node.get_friendly_name(): node for node in compiled.get_runtime_model().get_ops()}
        return [
            self._time(entry, nodes.get(entry.node_name))
            for entry in request.get_profiling_info()
            if entry.status == entry.Status.EXECUTED
        ]

    def close(self) -> None:
        self._idle = None

    def _compiled(self, **settings: Any) -> Any:
        try:
            core = openvino.Core()
            return core.compile_model(core.read_model(self._graph), "CPU", self._settings | settings)
        except RuntimeError as error:
            reason = str(error).strip().rpartition("\n")[2]
            raise DamagedError(
                f"openvino {openvino.__version__} cannot load it: {reason}",
                where=str(self._graph),
                remedy=f"compile it again, or use openvino {self._facts.openvino}, which wrote it",
            ) from error

    def _time(self, entry: Any, node: Any) -> KernelTime:
        # What is fused may go by a name of the runtime's own.
        names = [entry.node_name, *(_told(node, "originalLayersNames").split(",") if node is not None else ())]
        path = next((name for name in names if name.startswith(self._facts.root)), entry.node_name)
        path = path.removeprefix(self._facts.root)
        layer = path.removeprefix(".").partition("/")[0] if path.startswith(".") else path.removeprefix("/")
        kernel, seconds = f"{entry.node_type} ({entry.exec_type})", entry.real_time.total_seconds()
        if node is None or _kind(node) not in PRODUCTS:
            return KernelTime(layer, kernel, seconds)
        sources = [port.get_source_output() for port in node.inputs()]
        constants = [source for source in sources if _kind(source.get_node()) == "Const"]
        if not constants:
            return KernelTime(layer, kernel, seconds)
        weight, size = constants[0].get_shape(), sum(map(_bytes, constants))
        operations = 2 * math.prod(node.output(0).get_shape()) * math.prod(weight) // weight[0]
        return KernelTime(layer, kernel, seconds, size, operations, entry.exec_type.lower().endswith("_i8"))


def _spec(port: Any) -> TensorSpec:
    shape = tuple(size.get_length() if size.is_static else None for size in port.get_partial_shape())
    return TensorSpec(port.get_element_type().to_dtype().name, shape)


def _kind(node: Any) -> str:
    """What the runtime calls a node of its own graph."""
    return _told(node, "layerType")


def _told(node: Any, key: str) -> str:
    """What the runtime tells of a node, or nothing."""
    info = node.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""


def _bytes(constant: Any) -> int:
    kind = constant.get_element_type()
    return 0 if kind.is_dynamic() else math.prod(constant.get_shape()) * kind.bitwidth // 8
