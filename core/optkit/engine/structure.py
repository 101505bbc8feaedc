"""Output that must fit a structure: which tokens may come next, by https://github.com/guidance-ai/llguidance.

A grammar is compiled once for each structure and each tokenizer; every sample follows it with a matcher of its own.
"""

from __future__ import annotations

import functools
import json
import re
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from optkit.engine.request import Structure
from optkit.errors import RequestError

__all__ = ["WHITESPACE", "Matcher", "Structures", "allowed_tokens"]

_CACHED = 256
"""Compiled structures that are kept, the latest used ones."""

WHITESPACE = r"[ \n\t]{1,64}"
"""Between the parts of JSON, where the model may indent as it likes, but not go on with spaces for ever."""


class Matcher:
    """Where one sample stands in its structure."""

    __slots__ = ("_matcher", "_vocab_size")

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def accept(self, token: int) -> None:
        """The output goes on with `token`."""
        self._matcher.consume_token(token)

    @property
    def finished(self) -> bool:
        """Whether nothing but an end token may follow. Also after an error."""
        return bool(self._matcher.is_stopped())

    @property
    def error(self) -> str:
        """Why the structure cannot be followed any further, such as llguidance's limits; empty if all is well."""
        return _reason(self._matcher.get_error()) if self._matcher.is_error() else ""


class Structures:
    """Compiles structures for one model.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocab_size: of the model's logits; it may differ from the tokenizer's.
        end_tokens: allowed wherever the structure can end. None given: the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, end_tokens: Collection[int] = ()) -> None:
        self._tokenizer, self._vocab_size, self._end_tokens = tokenizer, vocab_size, sorted(end_tokens)
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def matcher(self, structure: Structure) -> Matcher:
        """A new matcher at the beginning of `structure`.

        Raises:
            RequestError: the structure is invalid or not supported, or the tokenizer cannot be used.
        """
        key = structure.model_dump_json()
        if key not in self._compiled:
            self._compiled[key] = self._compile(structure)
            if len(self._compiled) > _CACHED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return Matcher(self._compiled[key].deep_copy(), self._vocabulary.vocab_size)

    def _compile(self, structure: Structure) -> Any:
        from llguidance import LLMatcher

        kind, given = next((name, value) for name, value in structure if value or isinstance(value, str | dict))
        try:
            grammar = _grammar(structure)
        except ValueError as error:
            raise RequestError(f"this {kind} cannot be followed: {_reason(str(error))}", where="structure") from None
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(
                f"this {kind} cannot be followed: {_reason(matcher.get_error())}",
                where="structure",
                found=given,
                remedy="see https://github.com/guidance-ai/llguidance for what is supported",
            )
        return matcher

    @functools.cached_property
    def _vocabulary(self) -> Any:
        from llguidance.hf import from_tokenizer

        size = max(self._vocab_size, len(self._tokenizer))
        try:
            return from_tokenizer(self._tokenizer, n_vocab=size, eos_token=self._end_tokens or None)
        except ValueError as error:
            raise RequestError(
                f"this model's tokenizer cannot follow a structure: {_reason(str(error))}", where="structure"
            ) from None


def allowed_tokens(matchers: Sequence[Matcher], vocab_size: int) -> npt.NDArray[np.bool_]:
    """Which tokens may come next, `[matchers, vocab_size]`. Matchers of one model, each there once."""
    from llguidance.numpy import fill_next_token_bitmask_par

    words = np.zeros((len(matchers), -(-matchers[0]._vocab_size // 32)), dtype=np.int32)
    fill_next_token_bitmask_par(_executor(), [(one._matcher, row) for row, one in enumerate(matchers)], words)
    bits = np.unpackbits(words.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
    return bits.view(np.bool_)


@functools.cache
def _executor() -> Any:
    from llguidance import LLExecutor

    return LLExecutor()


def _grammar(structure: Structure) -> str:
    from llguidance import LLMatcher

    if structure.json_schema is not None:
        defaults = {"whitespace_pattern": WHITESPACE}
        return str(LLMatcher.grammar_from_json_schema(structure.json_schema, defaults=defaults))
    if structure.regex is not None:
        return str(LLMatcher.grammar_from_regex(structure.regex))
    if structure.grammar is not None:
        return str(LLMatcher.grammar_from_lark(structure.grammar))
    choices = " | ".join(json.dumps(text, ensure_ascii=False) for text in structure.choice)
    return str(LLMatcher.grammar_from_lark(f"start: {choices}"))


def _reason(message: str) -> str:
    """The line that says it, of the several that llguidance and its regex parser write."""
    found = re.search(r"^error: (.+)$", message, re.MULTILINE)
    return found[1] if found else message.strip().partition("\n")[0]
