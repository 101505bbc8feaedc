"""The artifacts that a server knows by name, and those of them that are loaded."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from optkit.artifact import Artifact, open_artifact
from optkit.engine.client import WorkerEngine
from optkit.engine.encoder import EncoderText
from optkit.engine.opened import Speculation
from optkit.engine.tensor_client import WorkerTensors
from optkit.engine.text import load_tokenizer
from optkit.errors import OptkitError, RecipeError
from optkit.plugins import Plugins
from optkit.serve.errors import ApiError, unavailable
from optkit.serve.gate import Gate
from optkit.weights import CAUSAL_LM, FEATURE_EXTRACTION

__all__ = ["Encoder", "Known", "Language", "Models", "Served", "Tensors", "named"]

_log = logging.getLogger(__name__)

Kind = Literal["language", "encoder", "tensors"]
State = Literal["unloaded", "loading", "ready", "unloading"]
E = TypeVar("E", WorkerEngine, WorkerTensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served(Generic[E]):
    """A loaded artifact."""

    name: str
    artifact: Artifact
    engine: E
    gate: Gate
    created: int = field(default_factory=lambda: int(time.time()))
    """When it was loaded, in seconds since 1970."""

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: two answers with the same one come from the same weights and runtime."""
        return f"optkit-{self.artifact.manifest.digest[:12]}"

    @property
    def max_length(self) -> int:
        """Tokens of one sequence."""
        return self.engine.max_length


@dataclass(frozen=True, slots=True, kw_only=True)
class Language(Served[WorkerEngine]):
    """A causal language model."""

    tokenizer: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder(Served[WorkerTensors]):
    """A text encoder."""

    text: EncoderText


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors(Served[WorkerTensors]):
    """Any model that maps arrays to arrays."""


@dataclass(slots=True)
class Known:
    """An artifact that can be served."""

    name: str
    path: Path
    kind: Kind
    state: State = "unloaded"
    served: Language | Encoder | Tensors | None = None


class Models:
    """Loads, finds and unloads artifacts by the names that the operator gave them; requests name nothing else.

    Args:
        places: directory of each artifact, by name.
        queue: requests of one model that may wait beyond those that run.
        plugins: that hold backends and batching strategies; by default all that are installed.
        speculation: for all language models.

    Raises:
        MissingError: there is no artifact in a directory.
        DamagedError: its manifest is not readable.
    """

    def __init__(
        self,
        places: Mapping[str, Path],
        *,
        queue: int = 256,
        plugins: Plugins | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        self._queue, self._plugins, self._speculation = queue, plugins, speculation
        self._known = {name: Known(name, path, _kind(path)) for name, path in places.items()}
        self._loading = asyncio.Lock()

    def known(self) -> Iterator[Known]:
        """All of them, in the operator's order."""
        return iter(self._known.values())

    def loaded(self) -> Iterator[Language | Encoder | Tensors]:
        """Those that are loaded."""
        return (one.served for one in self._known.values() if one.served is not None)

    def language(self, name: str | None) -> Language:
        """A loaded language model; without a name the only one.

        Raises:
            ApiError: 404, there is none of that name and kind.
            Refused: 503, it is not loaded.
        """
        return self._found(name, Language, "language model")

    def encoder(self, name: str | None) -> Encoder:
        """A loaded encoder, as `language`."""
        return self._found(name, Encoder, "encoder")

    def tensors(self, name: str) -> Encoder | Tensors:
        """A loaded model that maps arrays to arrays, as `language`. Encoders do too."""
        found = self._one(name)
        if not isinstance(found, Encoder | Tensors):
            raise _missing("this model takes text, not tensors")
        return found

    def window(self, name: str | None) -> int:
        """How many requests keep a model busy without filling its queue; 0 if it is not loaded."""
        found = [one for one in self.loaded() if name in (None, one.name)]
        return min((2 * one.gate.seats for one in found), default=0)

    def one(self, name: str) -> Known:
        """An artifact that can be served, loaded or not.

        Raises:
            ApiError: 404, there is none of that name.
        """
        if name not in self._known:
            raise _missing("there is no model of that name here")
        return self._known[name]

    async def load(self, name: str) -> None:
        """Load an artifact; one that is loaded stays as it is. One at a time, as each looks how much memory is free.

        Raises:
            ApiError: 404, there is none of that name.
            OptkitError: it cannot be opened.
        """
        known = self.one(name)
        async with self._loading:
            if known.served is not None:
                return
            known.state = "loading"
            try:
                known.served = await self._open(known)
            finally:
                known.state = "unloaded" if known.served is None else "ready"
        _log.info("loaded %s", name)

    async def unload(self, name: str) -> None:
        """Unload an artifact. Its open requests end with an error. One that is not loaded stays as it is.

        Raises:
            ApiError: 404, there is none of that name.
        """
        known = self.one(name)
        async with self._loading:
            served, known.served = known.served, None
            if served is None:
                return
            known.state = "unloading"
            try:
                await served.engine.close()
            finally:
                known.state = "unloaded"
        _log.info("unloaded %s", name)

    async def close(self) -> None:
        """Unload all."""
        for known in self._known.values():
            await self.unload(known.name)

    async def _open(self, known: Known) -> Language | Encoder | Tensors:
        artifact = await asyncio.to_thread(partial(open_artifact, known.path, verify=False))
        gate = Gate(artifact.manifest.max_batch_size, self._queue)
        facts: dict[str, Any] = {"name": known.name, "artifact": artifact, "gate": gate}
        if known.kind == "language":
            engine = WorkerEngine(known.path, plugins=self._plugins, speculation=self._speculation)
            await _started(engine)
            tokenizer = await asyncio.to_thread(load_tokenizer, artifact.weights)
            return Language(**facts, engine=engine, tokenizer=tokenizer)
        tensors = WorkerTensors(known.path, plugins=self._plugins)
        await _started(tensors)
        if known.kind == "tensors":
            return Tensors(**facts, engine=tensors)
        text = await asyncio.to_thread(EncoderText, artifact.weights, artifact.manifest.max_length)
        return Encoder(**facts, engine=tensors, text=text)

    def _found(self, name: str | None, kind: type[K], words: str) -> K:
        if name is None:
            found = [one for one in self.loaded() if isinstance(one, kind)]
            if len(found) == 1:
                return found[0]
            if found:
                raise ApiError(400, f"model: this server has more than one {words}; name one", param="model")
            raise _missing(f"no {words} is loaded here")
        one = self._one(name)
        if not isinstance(one, kind):
            raise _missing(f"the model of that name is no {words}")
        return one

    def _one(self, name: str) -> Language | Encoder | Tensors:
        known = self.one(name)
        if known.served is None:
            raise unavailable(f"the model is {'not loaded' if known.state == 'unloaded' else known.state}")
        return known.served


K = TypeVar("K", Language, Encoder)


def named(artifacts: list[str]) -> dict[str, Path]:
    """Directories by name, from `PATH` and `NAME=PATH`. Without a name an artifact has its recipe's.

    Raises:
        RecipeError: a name stands for two artifacts, or is none that a URL can hold.
        MissingError, DamagedError: as `optkit.artifact.open_artifact`.
    """
    places: dict[str, Path] = {}
    for given in artifacts:
        name, equals, path = given.partition("=")
        if not equals:
            path, name = given, open_artifact(Path(given), verify=False).manifest.name
        if name in places:
            raise RecipeError("two artifacts have this name", where="serve", found=name, remedy="give NAME=ARTIFACT")
        if not name or not all(sign.isascii() and (sign.isalnum() or sign in "._-") for sign in name):
            raise RecipeError(
                "a served name has only letters, digits, '.', '_' and '-'",
                where="serve",
                found=name,
                remedy="give NAME=ARTIFACT",
            )
        places[name] = Path(path)
    return places


async def _started(engine: WorkerEngine | WorkerTensors) -> None:
    try:
        await engine.start()
    except BaseException:
        with suppress(OptkitError):
            await engine.close()
        raise


def _kind(path: Path) -> Kind:
    tags = open_artifact(path, verify=False).manifest.tags
    if FEATURE_EXTRACTION in tags:
        return "encoder"
    return "language" if CAUSAL_LM in tags else "tensors"


def _missing(message: str) -> ApiError:
    return ApiError(404, message, param="model", code="model_not_found")
