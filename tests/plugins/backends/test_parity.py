"""Every backend on real models in every weight format: what it gives is the transformed model's own output."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optkit.backends import EngineSession
from optkit.builtin.gguf import GGUF
from optkit.builtin.huggingface import HuggingFace
from optkit.builtin.texts import PythonReference
from optkit.calibration import Calibration
from optkit.engine.loop import Engine
from optkit.engine.request import Request, SamplingParams
from optkit.engine.streaming import StreamingEngine
from optkit.engine.tensors import padded
from optkit.evaluate import every_window
from optkit.model import Model
from optkit.plugins import Plugins
from optkit.steps import Limits, Row, StepPlan
from optkit.weights import save_folder
from optkit_batching.continuous import Continuous
from optkit_quantize.int8_dynamic import Int8Dynamic
from optkit_quantize.int8_static import Int8Static
from optkit_quantize.rtn import RTN
from tests.calibrating import context, texts
from tests.picturing import LEARNT, pixels, save, taught

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PLUGINS = Plugins.load(third_party=False)
BACKENDS = PLUGINS.names("backend")
GROUP = {"granularity": "group", "group_size": 32}
FORMATS = {
    "float": None,
    "int8 channel": RTN(bits=8),
    "int8 group": RTN(bits=8, **GROUP),
    "int4 group": RTN(bits=4, **GROUP),
    "int4 group asymmetric": RTN(bits=4, symmetric=False, **GROUP),
    "int8 dynamic": Int8Dynamic(),
    "int8 static": Int8Static(),
}
PROMPTS, NEW_TOKENS = 20, 12


@dataclass
class Prepared:
    """A transformed model, its weights folder, and token ids to judge by."""

    format: str
    model: Model
    weights: Path
    texts: list[tuple[int, ...]]


def prepared(load: Any, format: str, folder: Path, length: int, count: int) -> Prepared:
    model, transform = load(), FORMATS[format]
    windows = every_window(model.tokenizer, PythonReference(), length)
    judged = [tuple(next(windows)) for _ in range(count)]
    if transform is not None:
        learnt = [torch.tensor([next(windows)]) for _ in range(8)]
        data = texts()
        if transform.calibration:
            data = type(data)(tuple({"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in learnt))
        model = transform.apply(model, context(data))
    folder.mkdir(exist_ok=True)
    save_folder(model, folder)
    return Prepared(format, model, folder, judged)


@pytest.fixture(autouse=True)
def shared_kernels(isolation, tmp_path_factory, monkeypatch):
    """What `torch_compile` compiles is the same for all formats whose weights become floats."""
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


@pytest.fixture(scope="module", params=FORMATS)
def language_model(request, smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    yield prepared(GGUF(file=str(smollm2)).load, request.param, folder, 96, PROMPTS)
    shutil.rmtree(folder)


@pytest.fixture(scope="module", params=FORMATS)
def encoder(request, minilm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    return prepared(HuggingFace(model=str(minilm)).load, request.param, folder, 128, 6)


@pytest.fixture(scope="module")
def digits_classifier(tmp_path_factory):
    """The folder of a small ResNet that has learnt scikit-learn's digits."""
    folder = tmp_path_factory.mktemp("digits")
    save(taught(), folder)
    return folder


@pytest.fixture(scope="module", params=["float", "int8 channel", "int8 static convolutions"])
def classifier(request, digits_classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    model = HuggingFace(model=str(digits_classifier)).load()
    transform = FORMATS.get(request.param, Int8Static(targets=("Conv2d", "Linear")))
    if transform is not None:
        data = Calibration(tuple({"pixel_values": rows} for rows in pixels(0, 64).split(8)))
        model = transform.apply(model, context(data))
    save_folder(model, folder)
    return Prepared(request.param, model, folder, [])


def compiled(name: str, made: Prepared, folder: Path) -> tuple[Any, float]:
    """A backend that compiled a model, and the distance that it allows itself; skips what it says it cannot run."""
    backend = PLUGINS.get("backend", name)()
    if reason := backend.unavailable() or backend.uncompilable():
        pytest.skip(f"{name} {reason}")
    lowered = backend.lowering(made.model.tags)
    for tag, how in lowered.items():
        if not how.possible:
            pytest.skip(f"{name} cannot run {tag}: {how.reason}")
    folder.mkdir()
    backend.compile(made.model, folder)
    return backend, max(how.tolerance for how in lowered.values())


def distance(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@torch.inference_mode()
def logits_of(model: Model, text: tuple[int, ...]) -> Any:
    return model.module(torch.tensor([text]), use_cache=False).logits[0].float().numpy()


@torch.inference_mode()
def greedy(model: Model, prompt: tuple[int, ...]) -> list[int]:
    ids = model.module.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_language_model_gives_its_own_logits(language_model, name, tmp_path):
    backend, tolerance = compiled(name, language_model, tmp_path / "runtime")
    with backend.open(tmp_path / "runtime", language_model.weights, Limits(4, 128)) as session:
        for text in language_model.texts[:3]:
            if isinstance(session, EngineSession):
                found = session.scores(text)
            else:
                blocks = tuple(range(-(-len(text) // session.caps.block_size)))
                [found] = session.execute(StepPlan((Row(0, text, 0, blocks, "all"),))).logits
            assert distance(found, logits_of(language_model.model, text)) <= tolerance
        if language_model.format != "float" or tolerance > 1e-3:
            # Integer kernels, and llama.cpp's keys and values in float16, may choose the other of two tokens that are
            # nearly as likely.
            return
        with ExitStack() as stack:
            if isinstance(session, EngineSession):
                engine = StreamingEngine(session)
                stack.callback(engine.close)
            else:
                engine = Engine(session, Continuous(max_batch_size=4))
            asked = {}
            for place, text in enumerate(language_model.texts):
                params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
                asked[engine.add(Request(text[: 4 + 3 * place], params))] = text[: 4 + 3 * place]
            said: dict[int, list[int]] = {request: [] for request in asked}
            while engine.busy:
                for event in engine.step():
                    said[event.request].append(event.token)
        for request, prompt in asked.items():
            wanted = greedy(language_model.model, prompt)
            assert said[request][: len(wanted)] == wanted


@pytest.mark.parametrize("name", BACKENDS)
def test_an_encoder_gives_its_own_hidden_states(encoder, name, tmp_path):
    backend, tolerance = compiled(name, encoder, tmp_path / "runtime")
    sequences = [text[: 8 + 24 * place] for place, text in enumerate(encoder.texts)]
    with backend.open(tmp_path / "runtime", encoder.weights, Limits(8, 128)) as session:
        [found] = session.run(padded(sequences, session.inputs)).values()
    for row, ids in zip(found, sequences, strict=True):
        with torch.inference_mode():
            wanted = encoder.model.module(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
        assert distance(row[: len(ids)], wanted) <= tolerance


@pytest.mark.parametrize("name", BACKENDS)
def test_an_image_classifier_gives_its_own_logits(classifier, name, tmp_path):
    backend, tolerance = compiled(name, classifier, tmp_path / "runtime")
    with backend.open(tmp_path / "runtime", classifier.weights, Limits(8, 1)) as session:
        for rows in (1, 5):
            given = pixels(LEARNT, LEARNT + rows)
            with torch.inference_mode():
                wanted = classifier.model.module(pixel_values=given).logits.numpy()
            assert distance(session.run({"pixel_values": given.numpy()})["logits"], wanted) <= tolerance
