"""The offline API: many prompts in, as many completions out, in the same order."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self, cast

from optkit.engine.opened import OpenedEngine, Speculation, open_engine
from optkit.engine.outputs import Collector, Completion
from optkit.engine.request import SamplingParams
from optkit.engine.stats import Stats
from optkit.engine.text import Chat, Prompt
from optkit.engine.text_engine import TextEngine
from optkit.errors import RequestError
from optkit.plugins import Plugins

__all__ = ["LLM"]

Progress = Callable[[int, int], None]


class LLM:
    """An artifact of a causal language model, in this process.

    ```python
    with optkit.LLM("artifacts/quickstart") as llm:
        for completion in llm.generate(["Once upon a time", "The sky is"], SamplingParams(max_tokens=32)):
            print(completion.text)
    ```

    Args:
        path: the artifact's directory.
        plugins: that hold its backend and batching strategy; by default all that are installed.
        speculation: guess several tokens and check them in one step; the output stays the same.

    Raises:
        OptkitError: as `optkit.engine.opened.open_engine`.
    """

    def __init__(
        self, path: str | Path, *, plugins: Plugins | None = None, speculation: Speculation | None = None
    ) -> None:
        self._opened: OpenedEngine = open_engine(Path(path), plugins, speculation)
        self._engine: TextEngine = self._opened.engine

    @property
    def stats(self) -> Stats:
        """What the engine has done so far."""
        return self._engine.stats

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | Progress = False,
    ) -> list[Completion]:
        """Complete prompts; the batching strategy of the artifact's recipe decides which run together.

        Args:
            prompts: one prompt or many; each is text, token ids, or chat messages.
            params: for all of them, or one for each.
            progress: show a bar on standard error, or call `progress(done, total)` after each completion.

        Returns:
            One completion for each prompt, in their order. One that failed on its way says so in its `error`.

        Raises:
            RequestError: a prompt could never be served; it is named, and nothing was started.
            ValueError: not as many params as prompts.
        """
        many = _listed(prompts)
        each = list(params) if isinstance(params, Sequence) else [params or SamplingParams()] * len(many)
        if len(each) != len(many):
            raise ValueError(f"{len(each)} params for {len(many)} prompts; give one for each, or one for all")
        collectors: dict[int, tuple[int, Collector]] = {}
        done: dict[int, Completion] = {}
        with ExitStack() as stack:
            tell = stack.enter_context(_Bar(len(many))) if progress is True else progress or None
            # Also after Ctrl-C or an error: what was accepted and not completed must not go on.
            stack.callback(self._abandon, collectors)
            for index, (prompt, wish) in enumerate(zip(many, each, strict=True)):
                collectors[self._add(index, prompt, wish)] = index, Collector(wish, 0)
            while collectors:
                for delta in self._engine.step():
                    index, collector = collectors[delta.request]
                    completion = collector.add(delta)
                    if completion is not None:
                        done[index] = completion
                        del collectors[delta.request]
                        if tell is not None:
                            tell(len(done), len(many))
                if self._engine.wait:
                    time.sleep(self._engine.wait)
        return [done[index] for index in range(len(many))]

    def close(self) -> None:
        """Give back memory and files. Closing twice does nothing."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add(self, index: int, prompt: Prompt, params: SamplingParams) -> int:
        try:
            return self._engine.add(prompt, params)
        except RequestError as error:
            raise RequestError(error.what, where=f"prompt {index}", found=error.found, remedy=error.remedy) from error

    def _abandon(self, requests: dict[int, tuple[int, Collector]]) -> None:
        for request in requests:
            self._engine.cancel(request)
        if requests:
            self._engine.step()


class _Bar:
    """A progress bar on standard error, where that is a terminal."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("requests"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Chat):
        return [prompts]
    if prompts and (isinstance(prompts[0], int) or _is_message(prompts[0])):
        return [cast("Prompt", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def _is_message(one: object) -> bool:
    return isinstance(one, dict) and "role" in one
