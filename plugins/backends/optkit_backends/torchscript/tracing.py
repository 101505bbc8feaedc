"""Traces models into archives, and checks that what was traced does not depend on the example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optkit.errors import RecipeError
from optkit.model import Model
from optkit_backends.graphs.checking import check_sizes
from optkit_backends.graphs.decoder import OTHER_SIZES, DecoderGraph
from optkit_backends.graphs.tensors import TensorGraph
from optkit_backends.torchscript.files import ARCHIVE, ArchivedDecoder, ArchivedTensors, quiet

__all__ = ["compile_decoder", "compile_model", "compile_tensors"]


def compile_decoder(module: Any, directory: Path) -> None:
    """Write the archive of one step of a causal language model, and its facts.

    Args:
        module: of transformers. It stays as it is.
        directory: exists and is empty.

    Raises:
        RecipeError: its attention is none that can be paged, or something of it cannot be traced.
    """
    graph = DecoderGraph.of(module)
    others = (graph.inputs(sizes) for sizes in OTHER_SIZES)
    _archive(graph.step, graph.inputs(), others, graph.name, directory)
    ArchivedDecoder(**graph.facts()).write(directory)


def compile_model(model: Model, directory: Path) -> None:
    """Write the archive of a transformers model that answers in one call, and its facts.

    Args:
        model: see `optkit_backends.positional.call_of`. It stays as it is.
        directory: exists and is empty.

    Raises:
        RecipeError: something of it cannot be traced.
    """
    _compile(TensorGraph.of_model(model), directory)


def compile_tensors(
    module: nn.Module,
    example: Mapping[str, Tensor],
    directory: Path,
    *,
    dynamic: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Write the archive of a module that maps tensors to tensors, and its facts.

    Args:
        module, example, dynamic: see `TensorGraph.of`.
        directory: exists and is empty.

    Raises:
        RecipeError: something of it cannot be traced.
    """
    _compile(TensorGraph.of(module, example, dynamic), directory)


def _compile(graph: TensorGraph, directory: Path) -> None:
    _archive(graph.module, graph.inputs(), [graph.inputs(2)], graph.name, directory)
    ArchivedTensors(**graph.facts()).write(directory)


def _archive(
    module: nn.Module, example: tuple[Tensor, ...], others: Iterable[tuple[Tensor, ...]], name: str, directory: Path
) -> None:
    try:
        with torch.inference_mode(), quiet():
            traced = torch.jit.trace(module, example, check_trace=False)  # type: ignore[no-untyped-call]  # torch's own
            archive: Any = torch.jit.freeze(traced)
    except Exception as error:  # whatever the module's own code raises where it meets what is traced
        reason = str(error).strip().partition("\n")[0]
        raise RecipeError(
            f"torch.jit cannot trace it ({reason})", where=name, remedy="choose another backend"
        ) from error
    check_sizes(module, archive, others, name, "what torch.jit traced")
    archive.save(str(directory / ARCHIVE))
