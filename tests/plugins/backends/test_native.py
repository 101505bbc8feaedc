"""The native kernels of the torch backend: decoders beside transformers, and steps of every mixture."""

from __future__ import annotations

import ctypes
import random

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from optkit.engine import Engine, Request, SamplingParams
from optkit.errors import MachineError, RecipeError
from optkit.model import Model
from optkit.quantized import ActivationScheme, QuantizedLinear, WeightScheme
from optkit.steps import Limits, Row, StepPlan
from optkit.testing import check_backend
from optkit.weights import save_folder
from optkit_backends.torch import Torch
from optkit_backends.torch.native import building
from optkit_backends.torch.native.layout import Instructions, pack
from optkit_backends.torch.native.session import NativeSession
from optkit_batching.continuous import Continuous
from optkit_quantize.int8_dynamic import Int8Dynamic
from optkit_quantize.int8_static import Int8Static
from optkit_quantize.kv_cache import KVCache
from optkit_quantize.rtn import RTN
from optkit_quantize.w4a8 import W4A8
from tests.architectures import OTHERS as KNOWN
from tests.architectures import SHAPE, attention_shape, other
from tests.calibrating import context, texts
from tests.scheduling import in_any_steps
from tests.shaping import behead, factored, narrow

BACKEND = Torch(kernels="native", threads=2)
LIMITS = Limits(max_batch_size=4, max_length=96)
GROUP = {"granularity": "group", "group_size": 32}
FORMATS = {
    "float": [],
    "int8": [RTN(bits=8)],
    "int8 asymmetric": [RTN(bits=8, symmetric=False)],
    "int8 group": [RTN(bits=8, **GROUP)],
    "int4": [RTN(bits=4)],
    "int4 group": [RTN(bits=4, **GROUP)],
    "int3 group asymmetric": [RTN(bits=3, symmetric=False, **GROUP)],
    "int8 dynamic": [Int8Dynamic()],
    "int7 dynamic": [Int8Dynamic(bits=7)],
    "int8 dynamic asymmetric": [Int8Dynamic(symmetric=False)],
    "int8 static": [Int8Static()],
    "w4a8": [W4A8(group_size=32)],
    "int8 cache": [KVCache()],
    "bfloat16 cache": [KVCache(dtype="bfloat16")],
    "int8 dynamic and cache": [Int8Dynamic(ignore=()), KVCache()],
}
ACTIVATIONS = [
    None,
    *(ActivationScheme(dynamic, symmetric=symmetric) for dynamic in (True, False) for symmetric in (True, False)),
]
A, C = tuple(range(10, 50)), tuple(range(5, 18))

pytestmark = pytest.mark.skipif(BACKEND.unavailable() is not None, reason=str(BACKEND.unavailable()))


def transformed(model, format):
    for transform in FORMATS[format]:
        model = transform.apply(model, context(texts(24, 40)))
    return model


def available(instructions):
    """Instructions that a test needs; skips it where this processor has no such."""
    if instructions > building.best_instructions():
        pytest.skip(f"this processor has no {instructions.title}")
    return instructions


def opened(model, folder, threads=2, limits=LIMITS, **options):
    folder.mkdir(exist_ok=True)
    save_folder(model, folder)
    return NativeSession(folder, limits, threads=threads, **options)


def run(session, *rows):
    return session.execute(StepPlan(rows)).logits


def expected(model, tokens):
    with torch.inference_mode():
        return model.module(torch.tensor([tokens])).logits[0].numpy()


def distance(found, wanted):
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("format", FORMATS)
def test_it_conforms(format, tiny_llama):
    check_backend(BACKEND, transformed(tiny_llama(), format))


# The products.


@pytest.fixture(params=list(Instructions), ids=lambda one: one.title)
def instructions(request):
    return available(request.param)


# Rounded, some or all of the last three are too large to be multiplied two at a time in 16 bits.
INPUTS = (lambda x: x, torch.abs, torch.sign, lambda x: x + 3)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 130), st.integers(1, 40), st.integers(0, 9) | st.sampled_from([119, 120, 121, 250])),
    bits=st.integers(2, 8) | st.none(),
    groups=st.booleans(),
    symmetric=st.booleans(),
    activations=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    inputs=st.sampled_from(INPUTS),
    seed=st.integers(0, 99),
)
def test_products_are_those_of_float64(shape, bits, groups, symmetric, activations, bias, inputs, seed, instructions):
    features, out, rows = shape
    torch.manual_seed(seed)
    shift = torch.randn(out) if bias else None
    layer: nn.Module
    if bits is None:
        layer = nn.Linear(features, out, bias=bias)
        if bias:
            layer.bias = nn.Parameter(shift)
    else:
        size = 6 * features if groups else features
        scheme = WeightScheme(bits, 2 * features if groups else None, symmetric)
        low, high = scheme.range
        weight = torch.randint(low, high + 1, (out, size), dtype=torch.int8)
        scale = torch.rand(out, 3 if groups else 1) + 0.5
        zero_point = None if symmetric else torch.randint(low, high + 1, scale.shape, dtype=torch.int8)
        fixed = (torch.tensor([0.02]), None) if activations and not activations.dynamic else (None, None)
        if fixed[0] is not None and not activations.symmetric:
            fixed = (fixed[0], torch.tensor([-37], dtype=torch.int8))
        layer, features = QuantizedLinear(weight, scale, zero_point, shift, scheme, activations, *fixed), size
    input = inputs(torch.randn(rows, features))
    found = product(layer, input, instructions)
    with torch.inference_mode():
        rounded = layer.rounded(input) if bits else input
        weight = (layer.dequantized() if bits else layer.weight).double()
        wanted = rounded.double() @ weight.T + (0 if shift is None else shift.double())
        size = rounded.double().abs() @ weight.abs().T
    # Of one sum of floats, an ulp a step at the worst.
    assert ((found - wanted).abs() <= 2**-22 * features * size + 1e-6).all()
    if activations is not None and bits:
        # Groups of integers add up exactly: what is left is how the reference rounds each input, and the scales.
        terms = 3 if groups else 1
        assert ((found - wanted).abs() <= 2**-22 * terms * (size + (0 if shift is None else shift.abs()))).all()
        if instructions > Instructions.AVX2:
            assert torch.equal(found, product(layer, input, Instructions.AVX2))


def product(layer, input, instructions):
    keep = []
    packed, out = pack(layer, keep), torch.empty(len(input), layer.weight.shape[0])
    assert not building.library().optkit_product(
        ctypes.byref(packed), input.data_ptr(), len(input), out.data_ptr(), instructions
    )
    return out.double()


# Steps.


STEPS = [
    *((format, one) for format in ("int8 dynamic and cache", "w4a8", "bfloat16 cache") for one in Instructions),
    ("int4 group", Instructions.AVX2),
    ("int4 group", Instructions.AVX512_VNNI),
]


@pytest.fixture(scope="module", params=STEPS, ids=lambda one: f"{one[0]}, {one[1].title}")
def session(request, tiny_llama, tmp_path_factory):
    format, instructions = request.param
    folder, options = tmp_path_factory.mktemp("native"), {"instructions": available(instructions)}
    with opened(transformed(tiny_llama(), format), folder, **options) as session:
        yield session


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_gives_the_same_bits(session, data):
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=4))
    texts = [tuple(random.Random(seed).choices(range(300), k=length)) for seed, length in enumerate(lengths)]
    wanted = [run(session, Row(0, text, 0, tuple(range(6)), "all"))[0] for text in texts]
    found = in_any_steps(data, session, texts, session.caps.blocks)
    for (places, logits), whole in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(logits, whole[places])


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dim=st.sampled_from([2, 6, 16, 20, 24, 50]),
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_bfloat16_blocks_hold_the_nearest_numbers(heads, dim, lengths, seed, instructions, tmp_path_factory):
    torch.manual_seed(seed)
    # Keys and values of the first layer do not depend on the cache.
    config = transformers.LlamaConfig(**SHAPE | attention_shape(heads, dim) | {"num_hidden_layers": 1})
    module = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    rows = [
        Row(i, tuple(torch.randint(0, config.vocab_size, (length,)).tolist()), 0, tuple(range(4 * i, 4 * i + 4)))
        for i, length in enumerate(lengths)
    ]
    held = []
    for transforms in ([], [KVCache(dtype="bfloat16")]):
        model = Model(module, None, frozenset())
        for transform in transforms:
            model = transform.apply(model, context(texts()))
        with opened(model, tmp_path_factory.mktemp("weights"), instructions=instructions) as session:
            run(session, *rows)
            held.append(session.read_blocks(range(4 * len(rows))))
    floats, numbers = held
    assert 2 * numbers.nbytes == floats.nbytes
    np.testing.assert_array_equal(numbers, torch.from_numpy(floats).bfloat16().view(torch.int16).numpy())


@pytest.mark.parametrize("format", ["float", "int8 dynamic", "int8 cache", "bfloat16 cache", "int4 group"])
def test_neither_threads_nor_instructions_change_what_is_said(format, tiny_llama, tmp_path):
    model = transformed(tiny_llama(), format)
    given = []
    ways = [(1, None), (3, None), *((2, one) for one in Instructions if one < building.best_instructions())]
    for threads, instructions in ways:
        with opened(model, tmp_path / "weights", threads, instructions=instructions) as session:
            given.append(run(session, Row(1, A, 0, (4, 1, 3), "all"))[0])
    np.testing.assert_array_equal(given[0], given[1])
    for logits in given[2:]:
        assert distance(logits, given[0]) < (0.15 if "dynamic" in format else 0.02 if "cache" in format else 1e-5)


OTHERS = KNOWN | {
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE),
    "gemma": lambda: transformers.GemmaConfig(**SHAPE),
    "odd": lambda: transformers.LlamaConfig(**SHAPE | {"head_dim": 24, "hidden_size": 52, "intermediate_size": 99}),
    "biased": lambda: transformers.LlamaConfig(**SHAPE, attention_bias=True),
    "gelu": lambda: transformers.LlamaConfig(**SHAPE, hidden_act="gelu"),
}


@pytest.mark.parametrize("kind", ["mistral", "mistral-wide", "qwen2", "gemma3", "qwen3", "gemma", "odd", "biased"])
def test_other_architectures_and_windows_match_transformers(kind, tmp_path):
    model = other(OTHERS[kind](), tmp_path)
    with BACKEND.open(tmp_path, tmp_path, LIMITS) as session:
        found = run(session, Row(1, A[:20], 0, (5, 2), "all"))
        found += (run(session, Row(2, C, 0, (1,)), Row(1, A[20:35], 20, (5, 2, 9), "all"))[1],)
        for i in range(35, 40):
            found += run(session, Row(1, A[i : i + 1], i, (5, 2, 9)), Row(2, (50,), 13, (1,)))[:1]
        assert distance(run(session, Row(3, A, 0, (15, 14, 13), "all"))[0], expected(model, A)) < 1e-5
    assert distance(np.concatenate(found), expected(model, A)) < 1e-5


@pytest.mark.parametrize("window", [None, 20, 300])
@pytest.mark.parametrize("cache", ["float", "int8 cache", "bfloat16 cache"])
def test_long_sequences_get_the_same_bits_however_they_are_shared(cache, window, instructions, tmp_path):
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SHAPE | {"max_position_embeddings": 1024}, sliding_window=window)
    module = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model = transformed(Model(module, None, frozenset()), cache)
    text = tuple(random.Random(0).choices(range(1, 160), k=600))
    blocks = (*range(20, 30), 7, 3, *range(50, 70), 4, *range(30, 40))  # some in a row, some not
    limits = Limits(max_batch_size=4, max_length=640)
    with opened(model, tmp_path / "weights", 1, limits, instructions=instructions) as session:
        [whole] = run(session, Row(1, text, 0, blocks, "all"))
    with opened(model, tmp_path / "weights", 3, limits, instructions=instructions) as session:
        found = [run(session, Row(1, text[:250], 0, blocks, "all"))[0]]
        found += [run(session, Row(1, text[250:256], 250, blocks, "all"), Row(2, C, 0, (1,)))[0]]
        found += [run(session, Row(2, (3,), 13, (1,)), Row(1, text[256:590], 256, blocks, "all"))[1]]
        for i in range(590, 600):
            found += run(session, Row(1, text[i : i + 1], i, blocks), Row(2, (3,), 14, (1,)))[:1]
    np.testing.assert_array_equal(np.concatenate(found), whole)
    assert distance(whole, expected(model, text)) < (1e-5 if cache == "float" else 0.02)


def test_layers_may_differ_in_width(tiny_llama, tmp_path):
    model = tiny_llama()
    narrow(model.module.model.layers[0].mlp, 72)
    with opened(model, tmp_path) as session:
        assert distance(run(session, Row(1, A, 0, (0, 1, 2), "all"))[0], expected(model, A)) < 1e-5


def test_generates_what_transformers_generates(tiny_llama, tmp_path):
    model = tiny_llama()
    with opened(model, tmp_path) as session:
        engine = Engine(session, Continuous(max_batch_size=3))
        prompts = (A, C, A[7:30], C[3:])
        ids = [engine.add(Request(p, SamplingParams(max_tokens=12, ignore_eos=True, temperature=0))) for p in prompts]
        output = {id: [] for id in ids}
        while engine.busy:
            for event in engine.step():
                output[event.request].append(event.token)
    for id, prompt in zip(ids, prompts, strict=True):
        whole = model.module.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
        )
        assert output[id] == whole[0, len(prompt) :].tolist()


def test_profile_tells_of_every_layer(tiny_llama, tmp_path):
    model = transformed(tiny_llama(), "int8 dynamic")
    with opened(model, tmp_path) as session:
        plan = StepPlan((Row(1, A, 0, (0, 1, 2)), Row(2, C, 0, (3,))))
        times = session.profile(plan)
    title = building.best_instructions().title
    weights = sum(
        layer.weight.nbytes for layer in model.module.modules() if isinstance(layer, nn.Linear | QuantizedLinear)
    )
    assert sum(time.weight_bytes for time in times) == weights
    assert {time.kernel for time in times if time.layer.endswith("down_proj")} == {
        f"native product (int8 weights, int8 input; {title})"
    }
    assert {time.kernel for time in times if time.layer == "lm_head"} == {f"native product (float32 weights; {title})"}
    assert all(time.seconds > 0 for time in times if time.weight_bytes)
    assert {time.integer for time in times if time.layer.endswith("down_proj")} == {True}
    assert not [time for time in times if time.layer == "lm_head" and time.integer]


def test_profile_counts_no_weights_that_nobody_wants(tiny_llama, tmp_path):
    with opened(tiny_llama(), tmp_path) as session:
        times = session.profile(StepPlan((Row(1, A, 0, (0, 1, 2), "none"),)))
        last = f"model.layers.{session._decoder.model.layer_count - 1}."
    unread = [time.layer for time in times if " product " in time.kernel and not time.weight_bytes]
    parts = ("self_attn.o_proj", "mlp.gate_proj, up_proj", "mlp.down_proj")
    assert unread == [*(last + part for part in parts), "lm_head"]


# What is refused.


@pytest.mark.parametrize("row", [Row(1, (9, 1_000_000), 0, (0,)), Row(1, (-1,), 0, (0,)), Row(1, (5,), 0, (999,))])
def test_a_step_that_cannot_be_run_raises_and_can_be_followed(row, session):
    [wanted] = run(session, Row(0, A, 0, (0, 1, 2)))
    with pytest.raises(IndexError, match="tokens that the vocabulary, or blocks that the cache, does not have"):
        run(session, Row(0, C, 0, (0,)), row)
    np.testing.assert_array_equal(run(session, Row(0, A, 0, (0, 1, 2)))[0], wanted)


REFUSED = {
    "is of the architecture gpt2": "gpt2",
    "is of the architecture qwen3_moe": "qwen3-moe",
    "has the activation gelu": "gelu",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_decoders_are_refused_in_one_line(reason, tmp_path):
    other(OTHERS[REFUSED[reason]](), tmp_path)
    with pytest.raises(RecipeError, match=f"this model {reason}; take kernels: eager, or another backend$") as raised:
        BACKEND.open(tmp_path, tmp_path, LIMITS)
    assert "\n" not in str(raised.value)


def test_layers_of_two_matrices_and_uneven_heads_are_refused(tiny_llama, tmp_path):
    model = tiny_llama()
    factored(model.module, "model.layers.0.mlp.down_proj", 16)
    with pytest.raises(RecipeError, match=r"of another kind at model\.layers\.0\.mlp\.down_proj, LowRankLinear"):
        opened(model, tmp_path / "ranks")
    model = tiny_llama()
    behead(model.module.model.layers[1].self_attn, 2, 1)
    with pytest.raises(RecipeError, match="layers of unequal numbers of heads"):
        opened(model, tmp_path / "heads")


def test_a_cache_of_fp8_is_refused_when_opened_too(tiny_llama, tmp_path):
    model = KVCache(dtype="fp8").apply(tiny_llama(), context(texts(24)))
    with pytest.raises(RecipeError, match="this model keeps keys and values as fp8-head; take kernels: eager"):
        opened(model, tmp_path)


def test_a_sum_of_integers_that_could_overflow_is_refused(tiny_llama, tmp_path):
    model = Int8Dynamic().apply(tiny_llama(num_hidden_layers=1, intermediate_size=32784), context(texts(24)))
    with pytest.raises(
        RecipeError, match=r"sums 32784 products of integers at model\.layers\.0\.mlp\.down_proj, more "
    ):
        opened(model, tmp_path)


def test_instructions_that_the_processor_lacks_are_refused_in_one_line(tiny_llama, tmp_path):
    best = building.best_instructions()
    if best == max(Instructions):
        pytest.skip("this processor has all")
    with pytest.raises(MachineError, match=rf"^these kernels need a processor with .+, found '{best.title}'$"):
        opened(tiny_llama(), tmp_path, instructions=Instructions(best + 1))


def test_lowering_says_which_kernel_runs_or_why_none_can():
    tags = {
        "task:feature-extraction",
        "arch:gpt2",
        "weights:bnb-nf4",
        "weights:fp8-channel",
        "activations:fp8-dynamic",
        "kv:fp8-head",
    }
    lowered = BACKEND.lowering(frozenset(tags | {"pruned:rank"}))
    assert set(lowered) == tags | {"pruned:rank"}
    assert not any(how.possible for how in lowered.values())
    assert all(how.reason for how in lowered.values())
    for tag, kept in {"kv:bfloat16": "bfloat16 blocks, widened", "kv:int8-head": "int8 blocks, dequantized"}.items():
        how = BACKEND.lowering(frozenset({tag}))[tag]
        assert (how.kernel, how.native) == (f"native paged attention over {kept} when read", True)
    lowered = BACKEND.lowering(frozenset({"weights:int4-group", "activations:int8-dynamic"}))
    assert {tag: (how.kernel, how.native) for tag, how in lowered.items()} == {
        "weights:int4-group": ("native product (int4 weights)", True),
        "activations:int8-dynamic": ("native integer product (int4 weights, int8 input)", True),
    }


def test_without_a_compiler_it_says_what_to_do(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert BACKEND.unavailable() == (
        "needs a C++ compiler, and there is no no-such-compiler; install it, set CXX to one, or take kernels: eager"
    )
    assert Torch().unavailable() is None
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(building, "_path", lambda: "/nowhere")
    assert "needs ninja to build; pip install" in str(BACKEND.unavailable())


def test_what_cannot_be_built_is_said_in_one_line(monkeypatch, tmp_path):
    broken = tmp_path / "csrc"
    broken.mkdir()
    (broken / "api.cpp").write_text("no C++ at all\n")
    monkeypatch.setattr(building, "_SOURCES", broken)
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        MachineError, match=r"^\S+: the kernels cannot be built, found .*; take kernels: eager$"
    ) as raised:
        building.library.__wrapped__()
    assert "\n" not in str(raised.value)
