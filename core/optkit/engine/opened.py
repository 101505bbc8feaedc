"""An artifact of a causal language model, opened as an engine with text at both ends."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import Field

from optkit.artifact import open_artifact
from optkit.backends import EngineSession, TokenSession
from optkit.batching import Batcher
from optkit.engine.loop import Engine
from optkit.engine.speculation import Drafter, DraftModel, PromptLookup
from optkit.engine.streaming import StreamingEngine
from optkit.engine.structure import Structures
from optkit.engine.text import end_tokens, load_tokenizer
from optkit.engine.text_engine import TextEngine
from optkit.errors import RecipeError
from optkit.opening import files_of, open_files, token_session
from optkit.options import Options
from optkit.plugins import Plugins

__all__ = ["OpenedEngine", "Speculation", "engine_over", "open_engine"]


class Speculation(Options):
    """Guess several tokens and check them in one step. The model still decides every token: only the speed changes.

    Requests with penalties or a structure decode without guesses.
    """

    draft: str | None = None
    """Directory of a smaller artifact with the same vocabulary, which guesses. None: what followed the same tokens
    earlier in the prompt or output (prompt lookup)."""
    tokens: int = Field(default=4, ge=1, le=32)
    """Of one guess, at most."""


@dataclass(slots=True)
class OpenedEngine:
    """An engine, and what must be closed with it. Used as a context manager, or closed."""

    engine: TextEngine
    name: str
    """Of the artifact."""
    max_length: int
    """Tokens of one sequence, prompt and output together."""
    _stack: ExitStack

    def close(self) -> None:
        """Close the sessions. Closing twice does nothing."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_engine(path: Path, plugins: Plugins | None = None, speculation: Speculation | None = None) -> OpenedEngine:
    """Verify an artifact and open it.

    Args:
        path: the artifact's directory.
        plugins: that hold its backend and batching strategy; by default all that are installed.
        speculation: how tokens are guessed; None guesses none.

    Raises:
        MissingError: there is no artifact, or its backend, batching strategy or tokenizer is not on this machine.
        DamagedError: a file is not what the manifest says.
        RecipeError: it is no causal language model, the draft has another vocabulary, or the runtime takes no guesses.
        MachineError: too little memory.
    """
    plugins = plugins or Plugins.load()
    artifact = open_artifact(path)
    with ExitStack() as stack:
        session, batcher = open_files(artifact.manifest.recipe, files_of(artifact), plugins)
        if isinstance(session, EngineSession):
            engine = _streaming(stack.enter_context(session), artifact.weights, speculation, stack)
            return OpenedEngine(engine, artifact.manifest.name, session.caps.max_length, stack.pop_all())
        session = stack.enter_context(token_session(session, artifact))
        drafter = None if speculation is None else _drafter(speculation, session, plugins, stack)
        engine = engine_over(session, batcher, artifact.weights, drafter)
        return OpenedEngine(engine, artifact.manifest.name, session.caps.max_length, stack.pop_all())


def engine_over(session: TokenSession, batcher: Batcher, weights: Path, drafter: Drafter | None = None) -> TextEngine:
    """An engine with text at both ends over an open session.

    Args:
        session: of a causal language model; the caller closes it.
        batcher: decides what each step holds.
        weights: the folder with its tokenizer.
        drafter: guesses tokens, or None.
    """
    tokenizer: Any = load_tokenizer(weights)
    ends = end_tokens(weights, tokenizer)
    structures = Structures(tokenizer, session.caps.vocab_size, ends)
    engine = Engine(session, batcher, end_tokens=ends, structures=structures, drafter=drafter)
    return TextEngine(engine, tokenizer, ends)


def _streaming(session: EngineSession, weights: Path, speculation: Speculation | None, stack: ExitStack) -> TextEngine:
    """An engine over a runtime that batches by itself, closed with the stack."""
    if speculation is not None:
        raise RecipeError(
            "its runtime batches by itself and takes no guesses", where=str(weights.parent), remedy="leave out --draft"
        )
    tokenizer: Any = load_tokenizer(weights)
    ends = end_tokens(weights, tokenizer)
    engine = StreamingEngine(session, end_tokens=ends)
    stack.callback(engine.close)
    return TextEngine(engine, tokenizer, ends)


def _drafter(speculation: Speculation, session: TokenSession, plugins: Plugins, stack: ExitStack) -> Drafter:
    if speculation.draft is None:
        return PromptLookup(speculation.tokens)
    draft = open_artifact(Path(speculation.draft))
    opened, _ = open_files(draft.manifest.recipe, files_of(draft), plugins)
    smaller = stack.enter_context(token_session(opened, draft))
    if smaller.caps.vocab_size != session.caps.vocab_size:
        raise RecipeError(
            f"the draft has a vocabulary of {smaller.caps.vocab_size} tokens, the model one of "
            f"{session.caps.vocab_size}",
            where=speculation.draft,
            remedy="draft with a model of the same family",
        )
    return DraftModel(smaller, speculation.tokens)
