"""Exports models with sizes of any kind, compiles them into packages, and checks these for other sizes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optkit.model import Model
from optkit_backends.aot_inductor.files import PACKAGE, PackagedDecoder, PackagedTensors, load, made_here
from optkit_backends.graphs.checking import check_sizes
from optkit_backends.graphs.decoder import OTHER_SIZES, DecoderGraph
from optkit_backends.graphs.exporting import exported, impossible
from optkit_backends.graphs.inductor import OPTIONS, keeping_in, quiet
from optkit_backends.graphs.tensors import TensorGraph

__all__ = ["compile_decoder", "compile_model", "compile_tensors"]


def compile_decoder(module: Any, directory: Path) -> None:
    """Write the package of one step of a causal language model, and its facts.

    Args:
        module: of transformers. It stays as it is.
        directory: exists and is empty.

    Raises:
        RecipeError: its attention is none that can be paged, or something of it cannot be exported or compiled.
    """
    graph = DecoderGraph.of(module)
    _package(graph.step, graph.inputs(), graph.dynamic(), graph.name, directory)
    facts = PackagedDecoder(**graph.facts(), **made_here())
    _check(graph.step, facts, (graph.inputs(sizes) for sizes in OTHER_SIZES), graph.name, directory)


def compile_model(model: Model, directory: Path) -> None:
    """Write the package of a transformers model that answers in one call, and its facts.

    Args:
        model: see `optkit_backends.positional.call_of`. It stays as it is.
        directory: exists and is empty.

    Raises:
        RecipeError: something of it cannot be exported or compiled.
    """
    _compile(TensorGraph.of_model(model), directory)


def compile_tensors(
    module: nn.Module,
    example: Mapping[str, Tensor],
    directory: Path,
    *,
    dynamic: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Write the package of a module that maps tensors to tensors, and its facts.

    Args:
        module, example, dynamic: see `TensorGraph.of`.
        directory: exists and is empty.

    Raises:
        RecipeError: something of it cannot be exported or compiled.
    """
    _compile(TensorGraph.of(module, example, dynamic), directory)


def _compile(graph: TensorGraph, directory: Path) -> None:
    _package(graph.module, graph.inputs(), graph.dynamic(), graph.name, directory)
    facts = PackagedTensors(**graph.facts(), **made_here())
    _check(graph.module, facts, [graph.inputs(2), graph.least()], graph.name, directory)


def _package(
    module: nn.Module, example: tuple[Tensor, ...], dynamic: Sequence[Sequence[int]], name: str, directory: Path
) -> None:
    program = exported(module, example, dynamic, name)
    try:
        # Inductor's own directory would keep a copy of the weights.
        with tempfile.TemporaryDirectory(dir=directory) as scratch, keeping_in(Path(scratch)), quiet():
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(directory / PACKAGE), inductor_configs=dict(OPTIONS)
            )
    except Exception as error:  # of many kinds, by what inductor or the C++ compiler cannot do
        raise impossible("inductor cannot compile it", name, error) from error


def _check(
    module: nn.Module,
    facts: PackagedDecoder | PackagedTensors,
    others: Iterable[tuple[Tensor, ...]],
    name: str,
    directory: Path,
) -> None:
    check_sizes(module, load(directory, facts), others, name, "what inductor compiled")
    facts.write(directory)
