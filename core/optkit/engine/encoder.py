"""Texts in, embeddings out: an artifact of an encoder in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from optkit.artifact import Artifact, open_artifact
from optkit.backends import TensorSession
from optkit.engine.one_step import run_all
from optkit.engine.pooling import Pooling, pooling_of, preparation_of
from optkit.engine.tensors import TensorEngine
from optkit.engine.text import load_tokenizer
from optkit.errors import DamagedError, RecipeError, RequestError
from optkit.opening import files_of, open_files
from optkit.plugins import Plugins
from optkit.weights import FEATURE_EXTRACTION, sentence_files

__all__ = ["Encoder", "EncoderText", "check_encoder", "embed", "vocabulary_of"]

Floats = npt.NDArray[np.float32]
Told = Callable[[int], object]


class EncoderText:
    """From texts to what an encoder gets, as the files of sentence-transformers say. Needs no model.

    Args:
        weights: the folder with the model's tokenizer.
        max_length: tokens of one text at most, those that the tokenizer adds included.

    Raises:
        MissingError: there is no tokenizer.
        DamagedError: a file is not what sentence-transformers writes.
    """

    def __init__(self, weights: Path, max_length: int) -> None:
        self._prepared = preparation_of(sentence_files(weights))
        self._tokenizer: Any = load_tokenizer(weights)
        self._max_length = max_length
        self.truncated = 0
        """Texts that were longer, and were cut."""

    def tokenize(self, texts: Sequence[str], *, cut: bool) -> list[tuple[int, ...]]:
        """The token ids that the model gets for each text.

        Args:
            texts: any number of them.
            cut: whether a text that is too long is cut, and counted.

        Raises:
            RequestError: a text has no tokens, or it is too long and is not to be cut.
        """
        prepared = [self._prepared(text) for text in texts]
        found = [tuple(ids) for ids in self._tokenizer(prepared, verbose=False)["input_ids"]] if prepared else []
        for index, ids in enumerate(found):
            if not ids:
                raise RequestError("has no tokens", where=f"text {index}", remedy="leave it out")
            if len(ids) > self._max_length:
                if not cut:
                    raise RequestError(
                        f"has {len(ids)} tokens, the model takes {self._max_length}",
                        where=f"text {index}",
                        remedy="shorten it",
                    )
                # Again, and not just cut: the token that ends a text must stay at its end.
                whole = self._tokenizer(prepared[index], truncation=True, max_length=self._max_length)["input_ids"]
                found[index] = tuple(whole)
                self.truncated += 1
        return found


class Encoder:
    """An artifact of a sentence encoder, in this process.

    ```python
    with optkit.Encoder("artifacts/encoder") as encoder:
        one, other = encoder.encode(["How old are you?", "What is your age?"])
        print(one @ other)
    ```

    Texts are prepared, cut, pooled and normalized as the model's sentence-transformers files say (see
    `optkit.engine.pooling`). A model without them gets the mean over its tokens, not normalized.

    Args:
        path: the artifact's directory.
        plugins: that hold its backend and batching strategy; by default all that are installed.

    Raises:
        MissingError: there is no artifact, or its backend, batching strategy or tokenizer is not on this machine.
        DamagedError: a file is not what the manifest says.
        RecipeError: it is no encoder.
        MachineError: too little memory.
    """

    def __init__(self, path: str | Path, *, plugins: Plugins | None = None) -> None:
        artifact = open_artifact(Path(path))
        check_encoder(artifact)
        limits = files_of(artifact).limits
        self._pooling = pooling_of(sentence_files(artifact.weights))
        self._text = EncoderText(artifact.weights, limits.max_length)
        session, batcher = open_files(artifact.manifest.recipe, files_of(artifact), plugins or Plugins.load())
        assert isinstance(session, TensorSession)
        self._session: TensorSession = session
        self._engine = TensorEngine(session, batcher, limits, vocabulary_of(artifact.weights))
        self.max_length: int = limits.max_length
        """Tokens of one text at most, those that the tokenizer adds included."""

    @property
    def truncated(self) -> int:
        """Texts that were longer, and were cut."""
        return self._text.truncated

    def encode(self, texts: Sequence[str], *, normalize: bool | None = None, progress: bool = False) -> Floats:
        """Embed texts; the batching strategy of the artifact's recipe decides which run together.

        Args:
            texts: any number of them. One that is longer than `max_length` tokens is cut there, and counted.
            normalize: whether embeddings have length 1; by default what the model's files say.
            progress: show a bar on standard error.

        Returns:
            `[texts, hidden]` float32, in the order of the texts.

        Raises:
            MachineError: the model failed on a text, which is named.
            RequestError: a text has no tokens.
        """
        if isinstance(texts, str):
            raise TypeError("texts is one string; give a list of strings")
        if not texts:
            return self.encode(["a"])[:0]  # with the model's width
        sequences = self.tokenize(texts)
        with _bar(len(texts), shown=progress) as told:
            return embed(self._engine, sequences, self._pooling, normalize=normalize, told=told)

    def tokenize(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """The token ids that the model gets for each text; what is too long is cut, and counted."""
        return self._text.tokenize(texts, cut=True)

    def close(self) -> None:
        """Give back memory and files. Closing twice does nothing."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_encoder(artifact: Artifact) -> None:
    """Refuse what is no encoder, before it is opened.

    Raises:
        RecipeError: the artifact is another kind of model.
    """
    if FEATURE_EXTRACTION not in artifact.manifest.tags:
        raise RecipeError("is no encoder", where=str(artifact.path), remedy="optkit.LLM runs a causal language model")


def vocabulary_of(weights: Path) -> int:
    """Token ids that the model in a weights folder knows.

    Raises:
        DamagedError: its `config.json` does not say.
    """
    try:
        return int(json.loads((weights / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError("says no vocab_size", where=str(weights / "config.json")) from error


def embed(
    engine: TensorEngine,
    sequences: Sequence[tuple[int, ...]],
    pooling: Pooling,
    *,
    normalize: bool | None = None,
    told: Told | None = None,
) -> Floats:
    """Run token sequences through an engine that does nothing else meanwhile, and pool what comes out.

    Args:
        engine: that has no request.
        sequences: at least one.
        pooling: of the model.
        normalize: in the place of the model's own.
        told: called with the number of new embeddings after each step.

    Returns:
        `[sequences, hidden]` float32, in their order.

    Raises:
        MachineError: the model failed on a sequence, which is named; nothing goes on.
    """
    return np.stack(run_all(engine, sequences, "text", partial(pooling, normalize=normalize), told))


def _bar(total: int, *, shown: bool) -> AbstractContextManager[Told | None]:
    return _Bar(total) if shown else nullcontext()


class _Bar:
    """A progress bar on standard error, where that is a terminal."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("texts", total=total)

    def __call__(self, new: int) -> None:
        self._bar.advance(self._task, new)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
