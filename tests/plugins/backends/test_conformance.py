"""`optkit.testing.check_backend` on every backend, and that it catches backends that are wrong."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from optkit.steps import StepPlan, StepResult
from optkit.testing import check_backend
from optkit_backends.onnxruntime import OnnxRuntime
from optkit_backends.torch import Torch
from optkit_backends.torch.session import TorchSession
from optkit_backends.torch.tensors import TorchTensorSession
from optkit_backends.torchscript import TorchScript
from optkit_quantize.rtn import RTN
from tests.calibrating import context, texts

BACKENDS = [Torch(), TorchScript(), OnnxRuntime(threads=1), OnnxRuntime(threads=1, accuracy_level=1)]


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_openvino_conforms(bits, tiny_bert):
    pytest.importorskip("openvino")
    from optkit_backends.openvino import OpenVINO

    model = tiny_bert()
    if bits is not None:
        model = RTN(bits=bits, granularity="group", group_size=32).apply(model, context(texts()))
    check_backend(OpenVINO(threads=2, streams=2) if bits == 8 else OpenVINO(threads=1), model)


def test_onnxruntime_conforms_in_several_streams(tiny_bert):
    check_backend(OnnxRuntime(threads=2, streams=2), tiny_bert())


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: type(backend).__name__)
def test_backends_conform(backend, kind, bits, tiny_llama, tiny_bert):
    model = tiny_llama() if kind == "decoder" else tiny_bert()
    if bits is not None:
        model = RTN(bits=bits, granularity="group", group_size=32).apply(model, context(texts()))
    check_backend(backend, model)


class Wrong(Torch):
    """The torch backend with a session that something is done to."""

    def open(self, runtime, weights, limits):
        session = super().open(runtime, weights, limits)
        session.weights = weights
        HARMS[self.__class__.__name__](session)
        return session


def every_other(session):
    """Wrong logits for rows that are not alone."""
    execute = TorchSession.execute

    def wrong(plan):
        found = execute(session, plan)
        if len(plan.rows) == 1:
            return found
        return StepResult(tuple(logits[::-1] if len(logits) > 1 else logits + 1 for logits in found.logits))

    session.execute = wrong


def forgets(session):
    """Loses what is copied."""
    session.copy_blocks = lambda pairs: None


def reuses(session):
    """Gives every step's logits in one array."""
    execute, buffer = TorchSession.execute, np.empty((64, session.caps.vocab_size), np.float32)

    def wrong(plan):
        found = [logits.copy() for logits in execute(session, plan).logits]
        given, start = [], 0
        for logits in found:
            buffer[start : start + len(logits)] = logits
            given.append(buffer[start : start + len(logits)])
            start += len(logits)
        return StepResult(tuple(given))

    session.execute = wrong


def all_rows(session):
    """Gives logits that nobody asked for."""
    execute = TorchSession.execute

    def wrong(plan):
        return execute(session, StepPlan(tuple(row._replace(logits="all") for row in plan.rows)))

    session.execute = wrong


def halves(session):
    session.execute = lambda plan: StepResult(
        tuple(logits.astype(np.float16) for logits in TorchSession.execute(session, plan).logits)
    )


def no_mask(session):
    """An encoder that sees padding."""

    def wrong(inputs):
        return TorchTensorSession.run(session, {**inputs, "attention_mask": np.ones_like(inputs["attention_mask"])})

    session.run = wrong


def mixes_calls_up(session):
    """Promises calls at the same time, and gives what another one computed."""
    session.streams, last = 2, []

    def wrong(inputs):
        last.append(TorchTensorSession.run(session, inputs))
        return last[-2] if threading.current_thread() is not threading.main_thread() and len(last) > 1 else last[-1]

    session.run = wrong


def keeps_itself(session):
    """Is never given back."""
    KEPT.append(session)


def keeps_a_file(session):
    """Leaves the weights open."""
    KEPT.append((session.weights / "model.safetensors").open("rb"))


def keeps_threads(session):
    """Starts one that outlives it."""
    threading.Thread(target=ENDED.wait, daemon=True).start()


KEPT = []
ENDED = threading.Event()


@pytest.fixture(autouse=True)
def _nothing_is_kept_after_a_test():
    ENDED.clear()
    yield
    ENDED.set()
    for kept in KEPT:
        kept.close()
    KEPT.clear()


HARMS = {}
CASES = [
    (every_other, "decoder", r"^a chunk beside other rows: .* from the model's own logits"),
    (forgets, "decoder", r"^a text in copied blocks: "),
    (reuses, "decoder", r"^the next step overwrites logits"),
    (all_rows, "decoder", r"^logits of the shape \(\d+, \d+\) where \(\d+, \d+\) were asked for"),
    (halves, "decoder", r"^logits are float16, not float32"),
    (keeps_itself, "decoder", r"^something keeps a session that was closed"),
    (keeps_a_file, "decoder", r"^a session that was closed keeps a file open or mapped: weights/model\.safetensors"),
    (keeps_threads, "decoder", r"^each session leaves threads behind: \d+, then \d+"),
    (mixes_calls_up, "encoder", r"^calls in 2 threads: one gives something else than alone"),
    (no_mask, "encoder", r"^a sequence of 9 tokens in a batch of 7: .* from what the model gives it"),
]


@pytest.mark.parametrize(("harm", "kind", "words"), CASES, ids=[case[0].__name__ for case in CASES])
def test_what_is_wrong_is_caught_and_said_in_one_line(harm, kind, words, tiny_llama, tiny_bert):
    HARMS["Wrong"] = harm
    model = tiny_llama() if kind == "decoder" else tiny_bert()
    with pytest.raises(AssertionError, match=words) as caught:
        check_backend(Wrong(), model)
    assert "\n" not in str(caught.value).partition("\nassert")[0]


def test_what_a_backend_says_of_itself_is_checked(tiny_llama):
    class Missing(Torch):
        def unavailable(self):
            return "needs a moon; wait for one"

    class Silent(Torch):
        def lowering(self, tags):
            return {}

    class Unable(Torch):
        def lowering(self, tags):
            return {"weights:float": SimpleNamespace(possible=False, reason="no kernel", native=False, tolerance=0)}

    class Greedy(Torch):
        def compile(self, model, directory):
            model.module.lm_head.weight.data += 1

    for backend, words in [
        (Missing(), "it is not available: needs a moon"),
        (Silent(), r"lowering\(\) says nothing of weights:float"),
        (Unable(), r"lowering\(\) says that it cannot run weights:float: no kernel"),
        (Greedy(), r"compiling changed the model: (model\.embed_tokens\.weight, )?lm_head\.weight"),
    ]:
        with pytest.raises(AssertionError, match=words):
            check_backend(backend, tiny_llama())
