"""The openvino_genai backend against the torch backend: text, logits, ends of every kind, its files, and a recipe."""

from __future__ import annotations

import asyncio
import json
import shutil
import time

import numpy as np
import pytest
import torch
import transformers

from optkit import LLM, SamplingParams, WorkerEngine
from optkit.apply import apply, make_plan
from optkit.backends import EngineRequest, Sampling
from optkit.bench import EngineArm
from optkit.engine import Engine, Request
from optkit.engine.streaming import StreamingEngine
from optkit.errors import DamagedError, MachineError, RecipeError, RequestError
from optkit.plugins import Plugins
from optkit.recipe import load_recipe
from optkit.steps import Limits
from optkit.testing import check_backend
from optkit.weights import save_folder
from optkit_backends.openvino_genai import OpenVINOGenAI
from optkit_backends.torch import Torch
from optkit_batching.continuous import Continuous
from optkit_quantize.rtn import RTN
from tests.architectures import SHAPE
from tests.calibrating import context, texts

BACKEND = OpenVINOGenAI(threads=1)
if BACKEND.unavailable():
    pytest.skip(BACKEND.unavailable(), allow_module_level=True)

PROMPTS = [(10, 11, 12, 13), (7,), tuple(range(20, 90)), (99, 5, 42), (200, 201)]
LIMITS = Limits(max_batch_size=3, max_length=128)
LONG = SamplingParams(max_tokens=30, ignore_eos=True)


def compiled(model, directory):
    directory.mkdir(exist_ok=True)
    BACKEND.compile(model, directory)
    return directory


@pytest.fixture(scope="module")
def llama(tiny_llama, tmp_path_factory):
    model = tiny_llama()
    return model, compiled(model, tmp_path_factory.mktemp("llama"))


@pytest.fixture
def session(llama):
    with BACKEND.open(llama[1], llama[1], LIMITS) as opened:
        yield opened


@pytest.fixture
def engine(session):
    made = StreamingEngine(session)
    yield made
    made.close()


def outputs(engine, requests):
    """Tokens of each request, all handed in at once."""
    ids = [engine.add(request) for request in requests]
    found = {identity: [] for identity in ids}
    while engine.busy:
        for event in engine.step():
            assert not event.error
            if event.token is not None:
                found[event.request].append(event.token)
    return list(found.values())


def torch_outputs(model, requests, directory):
    save_folder(model, directory)
    with Torch().open(directory, directory, LIMITS) as session:
        return outputs(Engine(session, Continuous(max_batch_size=3)), requests)


def scored(model, ids):
    with torch.inference_mode():
        return model.module(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def distance(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("bits", "symmetric"),
    [(None, True), (4, False), pytest.param(4, True, marks=SLOW), pytest.param(8, True, marks=SLOW)],
)
def test_text_and_logits_are_those_of_the_torch_backend(bits, symmetric, tiny_llama, tmp_path):
    model = tiny_llama()
    if bits is not None:
        quantizer = RTN(bits=bits, granularity="group", group_size=32, symmetric=symmetric)
        model = quantizer.apply(model, context(texts()))
    files = compiled(model, tmp_path / "runtime")
    requests = [Request(prompt, LONG) for prompt in PROMPTS]
    with BACKEND.open(files, files, LIMITS) as session:
        ids = tuple(range(5, 105))
        tolerance = max(how.tolerance for how in BACKEND.lowering(model.tags).values())
        assert distance(session.scores(ids), scored(model, ids)) <= tolerance
        engine = StreamingEngine(session)
        found = outputs(engine, requests)
        engine.close()
    assert found == torch_outputs(model, requests, tmp_path / "weights")


@pytest.mark.parametrize("bits", [pytest.param(None, marks=SLOW), 4])
def test_it_conforms(bits, tiny_llama):
    model = tiny_llama()
    if bits is not None:
        model = RTN(bits=bits, granularity="group", group_size=32).apply(model, context(texts()))
    check_backend(BACKEND, model)


def test_integers_are_stored_as_they_are(tiny_llama, tmp_path):
    import openvino

    model = RTN(bits=4, granularity="group", group_size=32).apply(tiny_llama(), context(texts()))
    graph = openvino.Core().read_model(compiled(model, tmp_path) / "openvino_model.xml")
    stored = [one.get_element_type() for one in graph.get_ops() if one.get_type_name() == "Constant"]
    assert stored.count(openvino.Type.i4) == 14  # seven layers in each of two blocks


def test_heads_of_their_own_and_ties_and_biases(tmp_path):
    config = transformers.Qwen2Config(**SHAPE | {"num_key_value_heads": 4}, tie_word_embeddings=True)
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.1)
    from optkit.model import Model

    model = Model(module, None, frozenset({"task:causal-lm", "weights:float"}))
    files = compiled(model, tmp_path)
    with BACKEND.open(files, files, LIMITS) as session:
        ids = tuple(range(5, 45))
        assert distance(session.scores(ids), scored(model, ids)) < 1e-4
        engine = StreamingEngine(session)
        (found,) = outputs(engine, [Request(ids, LONG)])
        engine.close()
    with torch.inference_mode():
        given = torch.tensor([ids])
        whole = module.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=30, do_sample=False, eos_token_id=None
        )
    assert found == whole[0, len(ids) :].tolist()


def test_a_sequence_may_be_as_long_as_was_said(llama, engine, session):
    longest = session.caps.max_length
    prompt = tuple(range(1, 101))
    requests = [Request(prompt, SamplingParams(max_tokens=longest - 100, ignore_eos=True))] * 5
    first, *others = outputs(engine, requests)
    assert len(first) == longest - 100
    assert others == [first] * 4


def test_outputs_end_with_a_stop_token(engine, session):
    (whole,) = outputs(engine, [Request(PROMPTS[0], LONG)])
    end = whole[6]
    params = SamplingParams(max_tokens=30, stop_token_ids=(end,), ignore_eos=True)
    assert outputs(engine, [Request(PROMPTS[0], params)]) == [whole[: whole.index(end) + 1]]


def test_draws_follow_temperature_and_filters(engine, llama):
    (greedy,) = outputs(engine, [Request(PROMPTS[0], LONG)])
    one = SamplingParams(max_tokens=30, temperature=5.0, top_k=1, ignore_eos=True)
    nucleus = SamplingParams(max_tokens=30, temperature=5.0, top_p=1e-4, ignore_eos=True)
    assert outputs(engine, [Request(PROMPTS[0], one), Request(PROMPTS[0], nucleus)]) == [greedy, greedy]
    free = SamplingParams(max_tokens=30, temperature=5.0, ignore_eos=True)
    drawn = outputs(engine, [Request(PROMPTS[0], free)] * 4)
    assert len({tuple(tokens) for tokens in drawn}) == 4
    # Single tokens are drawn as often as their probability says.
    wanted = torch.softmax(torch.from_numpy(scored(llama[0], PROMPTS[0])[-1]) / 0.7, 0).numpy()
    single = SamplingParams(max_tokens=1, temperature=0.7, ignore_eos=True)
    drawn = np.bincount([tokens[0] for tokens in outputs(engine, [Request(PROMPTS[0], single)] * 600)], minlength=320)
    likely = wanted.argsort()[-20:]
    share, expected = drawn[likely].sum() / 600, wanted[likely].sum()
    assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / 600)


def test_the_same_seed_gives_the_same_text_whatever_else_runs(engine):
    params = SamplingParams(max_tokens=30, temperature=3.0, seed=7, ignore_eos=True)
    (alone,) = outputs(engine, [Request(PROMPTS[0], params)])
    others = [Request(prompt, SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True)) for prompt in PROMPTS]
    assert outputs(engine, [*others, Request(PROMPTS[0], params)])[-1] == alone
    other = params.model_copy(update={"seed": 8})
    assert outputs(engine, [Request(PROMPTS[0], other)]) != [alone]


def test_repetition_is_penalized_as_optkit_does(engine, llama, tmp_path):
    params = SamplingParams(max_tokens=30, repetition_penalty=1.7, ignore_eos=True)
    requests = [Request(prompt, params) for prompt in PROMPTS]
    assert outputs(engine, requests) == torch_outputs(llama[0], requests, tmp_path)


@pytest.mark.parametrize("wish", [{"min_tokens": 2}, {"min_p": 0.1}, {"presence_penalty": 1.0}, {"logprobs": 1}])
def test_what_it_would_do_otherwise_is_refused(wish, engine):
    with pytest.raises(RequestError, match=f"does not do {next(iter(wish))}, found .*; leave it out"):
        engine.add(Request(PROMPTS[0], SamplingParams(**{"max_tokens": 9} | wish)))


def test_a_cancelled_request_leaves_room_for_others(engine, session):
    endless = SamplingParams(max_tokens=100, ignore_eos=True)
    ids = [engine.add(Request(PROMPTS[0], endless)) for _ in range(3)]
    engine.step()
    for identity in ids:
        engine.cancel(identity)
    (found,) = outputs_after(engine, [Request(PROMPTS[1], LONG)], ids)
    assert len(found) == 30
    end = time.monotonic() + 20
    while session._pipeline.has_non_finished_requests():
        assert time.monotonic() < end
        time.sleep(0.01)


def outputs_after(engine, requests, cancelled):
    """As `outputs`, while others end."""
    ids = [engine.add(request) for request in requests]
    found = {identity: [] for identity in ids}
    ends = []
    while engine.busy:
        for event in engine.step():
            if event.request in cancelled:
                ends += [event.finished] if event.last else []
            elif event.token is not None:
                found[event.request].append(event.token)
    assert ends == ["cancelled"] * len(cancelled)
    return list(found.values())


def asked(prompt, tokens=90):
    return EngineRequest(prompt, tokens, frozenset(), Sampling())


class Stepping:
    """The runtime's own pipeline, with something to do before each step."""

    def __init__(self, pipeline, before):
        self._pipeline, self._before = pipeline, before

    def __getattr__(self, name):
        return getattr(self._pipeline, name)

    def step(self):
        self._before()
        self._pipeline.step()


def test_closing_ends_what_is_open(llama):
    async def main():
        session = BACKEND.open(llama[1], llama[1], LIMITS)
        # So that no stream comes to its end by itself.
        session._pipeline = Stepping(session._pipeline, lambda: time.sleep(0.1))
        streams = [session.submit(asked(prompt)) for prompt in PROMPTS]
        assert all([await anext(stream) >= 0 for stream in streams[:2]])
        await asyncio.to_thread(session.close)
        for stream in streams[:2]:
            with pytest.raises(MachineError, match="the session was closed"):
                async for _ in stream:
                    pass
        with pytest.raises(MachineError, match="the session is closed"):
            await anext(streams[2])
        session.close()

    asyncio.run(main())


def test_a_step_that_raises_fails_every_request_and_all_after_it(session):
    def broken():
        raise RuntimeError("no memory\nfor this")

    engine = StreamingEngine(session)
    try:
        session._pipeline = Stepping(session._pipeline, broken)
        engine.add(Request(PROMPTS[0], LONG))
        for _ in range(2):
            with pytest.raises(MachineError, match=r"^the engine failed \(no memory for this\)"):
                engine.step()
            engine.add(Request(PROMPTS[1], LONG))
    finally:
        engine.close()


def test_an_arm_times_every_token(llama):
    arm = EngineArm(BACKEND.open(llama[1], llama[1], LIMITS), "optimized")
    first, second = (arm.run(PROMPTS[2], 8) for _ in range(2))
    arm.close()
    assert first.output == second.output
    assert len(first.token_seconds) == 8
    assert list(first.token_seconds) == sorted(first.token_seconds)


def test_windows_are_refused_in_one_line(tmp_path):
    config = transformers.MistralConfig(**SHAPE, sliding_window=16)
    module = transformers.AutoModelForCausalLM.from_config(config).eval()
    from optkit.model import Model

    with pytest.raises(RecipeError, match=r"^MistralForCausalLM: has layers with a sliding window, .*; use another"):
        BACKEND.compile(Model(module, None, frozenset()), tmp_path)


@pytest.mark.parametrize("harm", ["cut", "gone", "graph", "facts"])
def test_damaged_files_are_refused_in_one_line(harm, llama, tmp_path):
    files = tmp_path / "runtime"
    shutil.copytree(llama[1], files)
    graph, facts = files / "openvino_model.xml", files / "session.json"
    match harm:
        case "cut":
            (files / "openvino_model.bin").write_bytes(b"x")
        case "gone":
            graph.unlink()
        case "graph":
            graph.write_bytes(b"x" * graph.stat().st_size)
        case "facts":
            facts.write_text("{")
    with pytest.raises(DamagedError) as raised:
        BACKEND.open(files, files, LIMITS)
    assert str(files) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_lowering_says_which_kernel_runs_or_why_none_can():
    tags = {"task:causal-lm", "weights:float", "weights:int4-group", "weights:fp8-channel", "kv:int8-head"}
    lowered = BACKEND.lowering(frozenset(tags | {"activations:int8-dynamic"}))
    assert lowered["weights:int4-group"].native
    refused = {tag for tag, how in lowered.items() if not how.possible}
    assert refused == {"weights:fp8-channel", "kv:int8-head", "activations:int8-dynamic"}
    assert not BACKEND.lowering(frozenset({"task:feature-extraction"}))["task:feature-extraction"].possible


@pytest.fixture(scope="module")
def artifact(tiny_folder, tmp_path_factory):
    """Made by `apply`, from a recipe that names no batching strategy."""
    folder = tmp_path_factory.mktemp("applied")
    text = folder / "text.txt"
    text.write_text(" ".join(f"The capital of France is token {index}." for index in range(400)))
    data = {"dataset": {"text_file": {"path": str(text)}}, "tokens": 256, "context_length": 64}
    keys = {
        "model": {"hf": {"model": str(tiny_folder)}},
        "transforms": [{"quantize.rtn": {"bits": 8, "granularity": "group", "group_size": 32}}],
        "backend": {"openvino_genai": {"max_batch_size": 3, "threads": 1}},
        "max_length": 128,
        "evaluation": data,
        "benchmark": {"prompt_tokens": 16, "output_tokens": 8, "blocks": 3},
        "gates": [],
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(keys))
    plugins = Plugins.load(third_party=False)
    plan = make_plan(load_recipe(recipe, plugins), plugins)
    assert (plan.limits.max_batch_size, plan.limits.max_length) == (3, 128)
    outcome = apply(plan, plugins, folder / "artifact", progress=lambda *_: None)
    recipe.write_text(json.dumps(keys | {"batching": {"continuous": {}}}))
    with pytest.raises(RecipeError, match=r"openvino_genai batches by itself and takes no batching strategy, found"):
        make_plan(load_recipe(recipe, plugins), plugins)
    return outcome


@SLOW
def test_apply_measures_it(artifact):
    report = artifact.report
    assert report["parity"]["distance"] <= report["parity"]["tolerance"]
    assert report["lowering"]["weights:int8-group"]["native"]
    assert report["metrics"]["perplexity"]["value"] > 0
    assert report["metrics"]["decode_tokens_per_second"]["value"] > 0


@SLOW
def test_the_offline_api_and_the_worker_process_give_the_same_text(artifact):
    async def served():
        async with WorkerEngine(artifact.artifact.path) as engine:
            return await asyncio.gather(*(engine.generate(prompt, LONG) for prompt in PROMPTS))

    with LLM(artifact.artifact.path) as llm:
        offline = llm.generate(list(PROMPTS), LONG)
    assert [one.samples for one in asyncio.run(served())] == [one.samples for one in offline]
    assert all(one.samples[0].finish_reason == "length" for one in offline)
