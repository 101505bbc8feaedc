"""What an engine's client and its worker process say to each other: length-prefixed msgpack over a socket pair.

Every message is a list whose first entry says what it is.

| client to worker | |
|---|---|
| `open` | path, plugins to leave out, speculation or nil: a causal language model |
| `open_tensors` | path, plugins to leave out: a model of one step |
| `submit` | request, prompt, params as JSON, priority, timeout, salt |
| `cancel` | request, or question of `embed` and `infer` |
| `encode` | question, prompt |
| `embed` | question, sequences of token ids, normalize or nil |
| `infer` | question, arrays by name |
| `status` | question |

| worker to client | |
|---|---|
| `ready` | name, max_length; of a model of one step also `encoder`, inputs and outputs: dtype and shape by name |
| `broken` | the error that opening met |
| `accepted` | request, prompt tokens |
| `refused` | request, error |
| `deltas` | all deltas of one step |
| `begun` | question of `embed` and `infer` |
| `answer` | question, and token ids, an array, arrays by name, or stats, seconds of the step under way and failure |
| `unanswered` | question, error |

An array is its dtype, as numpy writes it with the order of bytes, its shape, and its bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, cast

import msgpack
import numpy as np
import numpy.typing as npt

from optkit import errors
from optkit.engine.outputs import Delta
from optkit.engine.request import PromptFacts, TokenLogprob
from optkit.engine.text import Chat
from optkit.errors import OptkitError, RequestError

__all__ = [
    "HEADER",
    "LARGEST",
    "answer_frame",
    "delta_frames",
    "fits",
    "length",
    "pack",
    "pack_error",
    "unpack",
    "unpack_array",
    "unpack_deltas",
    "unpack_error",
]

HEADER = 4
"""Bytes before each message, which say how many follow."""
LARGEST = 64 << 20
"""Bytes of one message at most."""
_LOGPROB = 20
"""Bytes of one token and its log probability, and a little more."""
_CHAT = 1
"""Kind of the extension that a `Chat` is."""


def pack(*message: Any) -> bytes:
    """One message, its length first.

    Raises:
        ValueError: it holds what msgpack cannot, or it is longer than `LARGEST`.
    """
    try:
        # JSON lets halves of surrogate pairs through, and refusing them is the tokenizer's.
        body: bytes = msgpack.packb(message, unicode_errors="surrogatepass", default=_other)
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from error
    if len(body) > LARGEST:
        raise ValueError(f"{len(body)} bytes are more than {LARGEST}")
    return struct.pack(">I", len(body)) + body


def length(header: bytes) -> int:
    """Bytes that follow a header.

    Raises:
        ValueError: more than `LARGEST`: this is no message.
    """
    size: int = struct.unpack(">I", header)[0]
    if size > LARGEST:
        raise ValueError(f"a message of {size} bytes, more than {LARGEST}")
    return size


def unpack(body: bytes) -> list[Any]:
    """The message without its header."""
    found = msgpack.unpackb(body, ext_hook=_extension, unicode_errors="surrogatepass", strict_map_key=False)
    return cast("list[Any]", found)


def _other(value: object) -> Any:
    """What msgpack does not know."""
    if not isinstance(value, Chat):
        return _array(value)
    fields = (list(value.messages), list(value.tools), value.continue_final, value.add_generation_prompt)
    return msgpack.ExtType(_CHAT, msgpack.packb(fields, unicode_errors="surrogatepass"))


def _extension(kind: int, body: bytes) -> Any:
    if kind != _CHAT:
        raise ValueError(f"an unknown kind of value, {kind}")
    return Chat(*msgpack.unpackb(body, unicode_errors="surrogatepass", strict_map_key=False))


def _array(value: object) -> tuple[Any, ...]:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} is not sent")
    if value.dtype.kind not in "biufc":
        raise TypeError(f"arrays of {value.dtype} are not sent")
    if value.nbytes > LARGEST:  # before it is copied
        raise ValueError(f"{value.nbytes} bytes are more than {LARGEST}")
    return value.dtype.str, value.shape, value.tobytes()


def unpack_array(packed: list[Any]) -> npt.NDArray[np.generic]:
    """An array of a message; read-only."""
    dtype, shape, data = packed
    array: npt.NDArray[np.generic] = np.frombuffer(data, dtype).reshape(shape)
    return array


def answer_frame(question: int, answer: Any) -> bytes:
    """An `answer` message, or `unanswered` where that would be too large."""
    try:
        return pack("answer", question, answer)
    except ValueError as error:
        refusal = RequestError(f"the answer cannot be sent ({error})", remedy="ask for less at once")
        return pack("unanswered", question, pack_error(refusal))


def delta_frames(deltas: Sequence[Delta]) -> list[bytes]:
    """`deltas` messages: one, or more where one would be too large.

    Raises:
        ValueError: a single delta is too large.
    """
    try:
        return [pack("deltas", [_delta(delta) for delta in deltas])]
    except ValueError:
        if len(deltas) == 1:
            raise
        half = len(deltas) // 2
        return delta_frames(deltas[:half]) + delta_frames(deltas[half:])


def fits(prompt_tokens: int, prompt_logprobs: int | None) -> bool:
    """Whether a prompt's log probabilities can be sent. All else that a delta holds is small."""
    return prompt_logprobs is None or prompt_tokens * (prompt_logprobs + 1) * _LOGPROB < LARGEST


def _delta(delta: Delta) -> tuple[Any, ...]:
    prompt = delta.prompt
    facts = prompt and (prompt.tokens, prompt.cached, prompt.logprobs and [_packed(one) for one in prompt.logprobs])
    logprobs = [_packed(one) for one in delta.logprobs]
    return (
        delta.request,
        delta.sample,
        delta.text,
        delta.tokens,
        logprobs,
        delta.finished,
        delta.last,
        facts,
        delta.error,
    )


def _packed(one: TokenLogprob) -> tuple[Any, ...]:
    return one.token, one.logprob, one.top


def unpack_deltas(packed: list[list[Any]]) -> list[Delta]:
    """The deltas of one message."""
    return [
        Delta(
            request,
            sample,
            text,
            tuple(tokens),
            tuple(map(_logprob, logprobs)),
            finished,
            last,
            None if prompt is None else _facts(*prompt),
            error,
        )
        for request, sample, text, tokens, logprobs, finished, last, prompt, error in packed
    ]


def _logprob(packed: list[Any]) -> TokenLogprob:
    token, logprob, top = packed
    return TokenLogprob(token, logprob, tuple((other, value) for other, value in top))


def _facts(tokens: int, cached: int, logprobs: list[Any] | None) -> PromptFacts:
    return PromptFacts(tokens, cached, None if logprobs is None else tuple(map(_logprob, logprobs)))


def pack_error(error: Exception) -> dict[str, Any]:
    """An error as the other side raises it again."""
    if not isinstance(error, OptkitError):
        return {"kind": "OptkitError", "what": f"{type(error).__name__}: {error}"}
    fields = {"kind": _tree_name(type(error)), "what": error.what, "where": error.where, "remedy": error.remedy}
    try:
        pack(error.found)
    except ValueError:
        return {**fields, "found": str(error.found)}
    return {**fields, "found": error.found}


def unpack_error(packed: dict[str, Any]) -> OptkitError:
    """The error that `pack_error` packed."""
    fields = dict(packed)
    kind: type[OptkitError] = getattr(errors, fields.pop("kind"))
    return kind(**fields)


def _tree_name(kind: type[OptkitError]) -> str:
    """The name of the error, or of its nearest ancestor in `optkit.errors` if a plugin made its own."""
    return next(k.__name__ for k in kind.__mro__ if k.__module__ == OptkitError.__module__)
