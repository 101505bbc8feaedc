"""The engine with text at both ends: prompts are encoded, tokens become text, stop strings end it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from optkit.engine.loop import Engine
from optkit.engine.outputs import Delta
from optkit.engine.request import Event, FinishReason, PromptFacts, Request, SamplingParams, TokenLogprob
from optkit.engine.stats import Stats
from optkit.engine.streaming import StreamingEngine
from optkit.engine.text import Prompt, TextStream, encode, kept_tokens

__all__ = ["TextEngine"]


class TextEngine:
    """Drives an engine and gives text, in the caller's thread. What `LLM`, `AsyncLLM` and the worker process share.

    ```python
    request = engine.add("The capital of France is", SamplingParams(max_tokens=8))
    while engine.busy:
        for delta in engine.step():
            print(delta.text, end="")
    ```

    Args:
        engine: nobody else steps it.
        tokenizer: from `optkit.engine.text.load_tokenizer`.
        end_tokens: those of the engine; they give no text.
    """

    def __init__(self, engine: Engine | StreamingEngine, tokenizer: Any, end_tokens: tuple[int, ...]) -> None:
        self.tokenizer = tokenizer
        self._engine = engine
        self._end_tokens = end_tokens
        self._kept = kept_tokens(tokenizer)
        self._requests: dict[int, _Open] = {}

    @property
    def busy(self) -> bool:
        """Whether any request is alive, or a delta was not fetched yet."""
        return self._engine.busy

    @property
    def wait(self) -> float | None:
        """See `Engine.wait`."""
        return self._engine.wait

    @property
    def stats(self) -> Stats:
        """See `Engine.stats`."""
        return self._engine.stats

    def add(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        salt: str = "",
    ) -> int:
        """Accept a request and return its id. For the arguments see `Request`.

        Raises:
            RequestError: it could never be served, or the chat template refuses the messages.
        """
        params = params or SamplingParams()
        tokens = encode(self.tokenizer, prompt)
        identity = self._engine.add(Request(tokens, params, priority, timeout, salt))
        streams = [TextStream(self.tokenizer, params.stop, self._kept) for _ in range(params.samples)]
        silent = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(self._end_tokens))
        self._requests[identity] = _Open(params, [_Output(stream) for stream in streams], silent)
        return identity

    def cancel(self, request: int) -> None:
        """End a request; the delta that says so comes with the next step."""
        self._engine.cancel(request)

    def step(self) -> list[Delta]:
        """Run one step and return what it brought, one delta for each sample that it touched."""
        touched: dict[tuple[int, int], _Output] = {}
        for event in self._engine.step():
            request = self._requests[event.request]
            output = request.outputs[event.sample]
            if output.finished is None:  # after a stop string nothing counts, not even drafts of the same step
                request.touched += (event.request, event.sample) not in touched
                touched[event.request, event.sample] = output
                self._take(request, output, event)
        deltas = []
        for (identity, sample), output in touched.items():
            request = self._requests[identity]
            ended = all(one.finished is not None for one in request.outputs)
            request.touched -= 1
            last = ended and not request.touched
            deltas.append(output.delta(identity, sample, last=last))
            if last:
                del self._requests[identity]
        return deltas

    def _take(self, request: _Open, output: _Output, event: Event) -> None:
        output.prompt = event.prompt or output.prompt
        output.finished, output.error = event.finished, event.error
        if event.token is not None:
            output.count += 1
            output.tokens.append(event.token)
            if event.logprob is not None:
                output.logprobs.append(event.logprob)
            if event.token not in request.silent:
                output.text += output.stream.push(event.token, watch=output.count > request.params.min_tokens)
        if event.finished is not None:
            output.text += output.stream.flush()
        if output.stream.stopped and event.finished in (None, "length"):
            output.finished = "stop"
            self._engine.stop(event.request, event.sample)


@dataclass(slots=True)
class _Output:
    """One sample, and what the step brought to it so far."""

    stream: TextStream
    count: int = 0
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt: PromptFacts | None = None
    finished: FinishReason | None = None
    error: str = ""

    def delta(self, request: int, sample: int, *, last: bool) -> Delta:
        made = Delta(
            request,
            sample,
            self.text,
            tuple(self.tokens),
            tuple(self.logprobs),
            self.finished,
            last,
            self.prompt,
            self.error,
        )
        self.text, self.tokens, self.logprobs, self.prompt = "", [], [], None
        return made


@dataclass(slots=True)
class _Open:
    """A request that is alive."""

    params: SamplingParams
    outputs: list[_Output]
    silent: frozenset[int]
    """Tokens that end a sample and give no text."""
    touched: int = 0
    """Samples that the step under way touched and that have no delta yet."""
