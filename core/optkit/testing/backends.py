"""What every backend must do, as one check that its author runs on any model."""

from __future__ import annotations

import asyncio
import gc
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from optkit.backends import Backend, EngineRequest, EngineSession, Sampling, TensorSession, TokenSession
from optkit.engine.tensors import encodes_text, padded
from optkit.model import Model
from optkit.steps import Limits, Row, StepPlan
from optkit.weights import save_folder

__all__ = ["check_backend"]

Floats = npt.NDArray[np.float32]
_LIMITS = Limits(max_batch_size=3, max_length=48)
_FORMATS = ("weights:", "activations:", "kv:")


def check_backend(backend: Backend, model: Model, *, tolerance: float | None = None, seed: int = 0) -> None:
    """Compile a model, open it, and check all that optkit relies on: its own logits or hidden states above all.

    ```python
    def test_my_backend(tiny_model):
        reason = MyBackend().unavailable()
        if reason:
            pytest.skip(reason)
        check_backend(MyBackend(), tiny_model)
    ```

    A causal language model must give the logits of the whole text whatever the steps are: at once, in chunks, token by
    token, in other blocks, beside other rows, after a step was run twice, and over whatever blocks held before. An
    encoder must give each sequence what it gives it alone. A runtime that batches by itself must decode greedily what
    the model would, and score whole texts as it does. Compiling leaves the model as it is. Closing gives files and
    threads back, and closing twice does nothing.

    Args:
        backend: with its options.
        model: a transformers decoder or encoder, small, with the tags of what was done to it; its reference is its own
            forward, in float32.
        tolerance: largest distance from the reference as a fraction of its norm; by default the largest that
            `lowering` states for the model's tags.
        seed: of the tokens.

    Raises:
        AssertionError: what is wrong, in one line.
    """
    missing = backend.unavailable() or backend.uncompilable()
    assert missing is None, f"it is not available: {missing}"
    allowed = _check_lowering(backend, model)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    with tempfile.TemporaryDirectory() as scratch:
        runtime, weights = Path(scratch) / "runtime", Path(scratch) / "weights"
        runtime.mkdir()
        weights.mkdir()
        save_folder(model, weights)
        backend.compile(model, runtime)
        after = model.module.state_dict()
        same = {name for name, tensor in before.items() if name in after and after[name].equal(tensor)}
        changed = sorted((before.keys() | after.keys()) - same)
        assert not changed, f"compiling changed the model: {', '.join(changed)}"
        threads = []
        for _ in range(2):  # what was opened and closed can be opened again
            session = backend.open(runtime, weights, _LIMITS)
            try:
                if isinstance(session, TokenSession):
                    _Decoder(session, model, allowed if tolerance is None else tolerance, seed).check()
                elif isinstance(session, EngineSession):
                    _check_engine(session, model, allowed if tolerance is None else tolerance, seed)
                else:
                    _check_encoder(session, model, allowed if tolerance is None else tolerance, seed)
            finally:
                session.close()
                session.close()
            kept = weakref.ref(session)
            del session
            gc.collect()
            assert kept() is None, "something keeps a session that was closed"
            held = _held(Path(scratch))
            assert not held, f"a session that was closed keeps a file open or mapped: {held[0]}"
            threads.append(psutil.Process().num_threads())
        # The first time may start threads that all sessions share.
        assert threads[1] <= threads[0], f"each session leaves threads behind: {threads[0]}, then {threads[1]}"


def _held(directory: Path) -> list[str]:
    """Files below a directory that this process has open or mapped, by their paths in it."""
    process = psutil.Process()
    found = {file.path for file in process.open_files()}
    if hasattr(process, "memory_maps"):  # not on macOS
        found |= {region.path for region in process.memory_maps()}
    return sorted(str(Path(name).relative_to(directory)) for name in found if name.startswith(f"{directory}/"))


def _check_lowering(backend: Backend, model: Model) -> float:
    """The largest tolerance of the model's formats."""
    lowered = backend.lowering(model.tags)
    for tag in sorted(model.tags):
        if tag.startswith(_FORMATS):
            assert tag in lowered, f"lowering() says nothing of {tag}"
    for tag, how in lowered.items():
        assert how.possible, f"lowering() says that it cannot run {tag}: {how.reason}"
        assert how.native or how.reason, f"lowering() does not say why {tag} is not native"
    return max(how.tolerance for how in lowered.values())


def _config(model: Model) -> Any:
    return model.module.config


def _distance(found: npt.NDArray[Any], wanted: Floats) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


class _Decoder:
    """The checks of one session over a causal language model."""

    def __init__(self, session: TokenSession, model: Model, tolerance: float, seed: int) -> None:
        self._session, self._model, self._tolerance = session, model, tolerance
        self._random = np.random.default_rng(seed)
        caps = session.caps
        self._each = -(-_LIMITS.max_length // caps.block_size)
        self._next = 0

    def check(self) -> None:
        self._check_caps()
        self._check_texts()
        self._check_steps()
        self._check_blocks()

    def _check_caps(self) -> None:
        caps = self._session.caps
        assert caps.kv in ("paged", "slot"), f"caps.kv is {caps.kv}, and a decoder keeps keys and values"
        assert caps.max_length == _LIMITS.max_length, f"caps.max_length is {caps.max_length}, not {_LIMITS.max_length}"
        assert caps.kv == "paged" or caps.block_size >= caps.max_length, "a slot holds a sequence of max_length"
        fit = caps.blocks // self._each
        assert fit >= _LIMITS.max_batch_size, f"its blocks hold {fit} sequences, not {_LIMITS.max_batch_size}"
        vocabulary = _config(self._model).vocab_size
        assert caps.vocab_size == vocabulary, f"caps.vocab_size is {caps.vocab_size}, not {vocabulary}"

    def _check_texts(self) -> None:
        """Texts at once, in chunks and token by token."""
        for length in (1, 2, 17, _LIMITS.max_length):
            text = self._text(length)
            found = self._run(Row(1, text, 0, self._blocks(), "all"))[0]
            self._close(found, self._wanted(text), f"a text of {length} tokens at once")
        text, blocks = self._text(40), self._blocks()
        parts = [text[:16], text[16:21], *((token,) for token in text[21:])]
        computed, logits = 0, []
        for part in parts:
            logits.append(self._run(Row(2, part, computed, blocks, "all"))[0].copy())
            computed += len(part)
        self._close(np.concatenate(logits), self._wanted(text), "a text in chunks, then token by token")

    def _check_steps(self) -> None:
        """Rows of all kinds beside each other, and the same step again."""
        texts = [self._text(length) for length in (30, 12, 7)]
        blocks = [self._blocks() for _ in texts]
        self._run(Row(1, texts[0][:20], 0, blocks[0], "none"))
        self._run(Row(2, texts[1][:11], 0, blocks[1], "none"))
        rows = [
            Row(1, texts[0][20:], 20, blocks[0], "all"),
            Row(2, texts[1][11:], 11, blocks[1]),
            Row(3, texts[2], 0, blocks[2], "none"),
        ]
        steps = [rows] if self._session.caps.mixed else [[row] for row in rows]
        for again in ("", ", run again"):
            first, second, third = (logits for step in steps for logits in self._run(*step))
            self._close(first, self._wanted(texts[0])[20:], f"a chunk beside other rows{again}")
            self._close(second, self._wanted(texts[1])[11:], f"a single token beside other rows{again}")
            assert len(third) == 0, "it gives logits that nobody asked for"
        kept = first.copy()
        self._run(Row(3, self._text(1), 7, blocks[2]))
        assert np.array_equal(first, kept), "the next step overwrites logits that were given back"

    def _check_blocks(self) -> None:
        """Blocks that are copied, moved, and used again."""
        text, first, second = self._text(36), self._blocks(), self._blocks()
        self._run(Row(1, text[:30], 0, first, "none"))
        saved = self._session.read_blocks(first)
        assert len(saved) == len(first), f"read_blocks gives {len(saved)} entries for {len(first)} blocks"
        self._session.copy_blocks(list(zip(first, second, strict=True)))
        wanted = self._wanted(text)[30:]
        self._close(self._run(Row(2, text[30:], 30, second, "all"))[0], wanted, "a text in copied blocks")
        self._run(Row(1, self._text(48), 0, first, "none"))
        self._session.write_blocks(first, saved)
        self._close(
            self._run(Row(3, text[30:], 30, first, "all"))[0], wanted, "a text in blocks that were written back"
        )
        if np.issubdtype(saved.dtype, np.floating):
            self._session.write_blocks(first, np.full_like(saved, np.nan))
            fresh = self._text(20)
            found = self._run(Row(4, fresh, 0, first, "all"))[0]
            self._close(found, self._wanted(fresh), "a text over blocks that held NaN")
            self._session.write_blocks(first, np.zeros_like(saved))

    def _run(self, *rows: Row) -> Sequence[Floats]:
        found = self._session.execute(StepPlan(rows)).logits
        assert len(found) == len(rows), f"{len(found)} arrays of logits for {len(rows)} rows"
        for row, logits in zip(rows, found, strict=True):
            shape = len(row.wanted), self._session.caps.vocab_size
            assert logits.shape == shape, f"logits of the shape {logits.shape} where {shape} were asked for"
            assert logits.dtype == np.float32, f"logits are {logits.dtype}, not float32"
        return found

    def _close(self, found: Floats, wanted: Floats, what: str) -> None:
        distance = _distance(found, wanted)
        # Not above also where it is NaN.
        told = f"{what}: {distance:.2g} from the model's own logits, not {self._tolerance:.2g}"
        assert distance <= self._tolerance, told

    def _text(self, length: int) -> tuple[int, ...]:
        return tuple(self._random.integers(1, self._session.caps.vocab_size, length).tolist())

    def _blocks(self) -> tuple[int, ...]:
        """Those of one sequence, scattered; the sequences before the last two may have had them."""
        start = self._next * self._each
        self._next = (self._next + 1) % _LIMITS.max_batch_size
        return tuple(range(start + self._each - 1, start - 1, -1))

    def _wanted(self, text: tuple[int, ...]) -> Floats:
        return _logits(self._model, text)


def _check_engine(session: EngineSession, model: Model, tolerance: float, seed: int) -> None:
    """Logits of whole texts, and greedy outputs of more requests than run at once, one of which is left early."""
    random = np.random.default_rng(seed)
    texts = [tuple(random.integers(1, session.caps.vocab_size, length).tolist()) for length in (9, 1, 30, 17, 2)]
    for text in texts:
        away = _distance(session.scores(text), _logits(model, text))
        told = f"the scores of {len(text)} tokens: {away:.2g} from the model's own logits, not {tolerance:.2g}"
        assert away <= tolerance, told
    lengths = [min(12, session.caps.max_length - len(text)) for text in texts]

    async def output(text: tuple[int, ...], length: int, leave_after: int) -> list[int]:
        found: list[int] = []
        async with aclosing(session.submit(EngineRequest(text, length, frozenset(), Sampling()))) as tokens:
            async for token in tokens:
                found.append(token)
                if len(found) == leave_after:
                    break
        return found

    async def outputs() -> list[list[int]]:
        leaving = [1, *lengths[1:]]
        return await asyncio.gather(*map(output, texts, lengths, leaving))

    for text, length, found in zip(texts[1:], lengths[1:], asyncio.run(outputs())[1:], strict=True):
        assert len(found) == length, f"{len(found)} tokens of output where {length} were asked for"
        for logits, token in zip(_logits(model, (*text, *found))[len(text) - 1 : -1], found, strict=True):
            short = float(logits.max() - logits[token])
            assert short <= tolerance * np.linalg.norm(logits), f"a greedy token that is {short:.2g} below the best one"


def _logits(model: Model, text: tuple[int, ...]) -> Floats:
    import torch

    with torch.inference_mode():
        logits: Any = model.module(torch.tensor([text]), use_cache=False).logits
    array: Floats = logits[0].float().numpy()
    return array


def _check_encoder(session: TensorSession, model: Model, tolerance: float, seed: int) -> None:
    """Padded batches of several sizes."""
    import torch

    assert encodes_text(session), f"no text encoder: it maps {sorted(session.inputs)} to {sorted(session.outputs)}"
    random = np.random.default_rng(seed)
    vocabulary = _config(model).vocab_size
    texts = [tuple(random.integers(1, vocabulary, length).tolist()) for length in (9, 1, 48, 17, 30, 2, 5)]
    for batch in (texts[:1], texts[1:2], texts, [texts[2]] * 3):
        inputs = padded(batch, session.inputs)
        [(name, found)] = session.run(inputs).items()
        shape = (*inputs["input_ids"].shape, _config(model).hidden_size)
        assert found.shape == shape, f"{name} has the shape {found.shape} where {shape} was asked for"
        assert found.dtype == np.float32, f"{name} is {found.dtype}, not float32"
        for row, text in zip(found, batch, strict=True):
            with torch.inference_mode():
                alone = model.module(input_ids=torch.tensor([text]))[0][0].float().numpy()
            distance = _distance(row[: len(text)], alone)
            what = f"a sequence of {len(text)} tokens in a batch of {len(batch)}"
            assert distance <= tolerance, f"{what}: {distance:.2g} from what the model gives it, not {tolerance:.2g}"
    if session.streams > 1:
        _check_streams(session, [padded([text], session.inputs) for text in texts])


def _check_streams(session: TensorSession, calls: list[dict[str, npt.NDArray[np.generic]]]) -> None:
    """Calls at the same time."""
    with ThreadPoolExecutor(session.streams) as threads:
        together = list(threads.map(session.run, calls * 3))
    for place, found in enumerate(together):
        alone = session.run(calls[place % len(calls)])
        equal = all(np.array_equal(found[name], alone[name]) for name in alone)
        assert equal, f"calls in {session.streams} threads: one gives something else than alone"
