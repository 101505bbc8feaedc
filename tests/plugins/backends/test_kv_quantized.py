"""KV caches of 8 and 16 bits in sessions, against eager attention over keys and values that float64 rounds."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface

from optkit import hardware
from optkit.backends import TokenSession
from optkit.calibration import Calibration
from optkit.engine import Engine, Request, SamplingParams
from optkit.hardware import Memory
from optkit.kv import rounding_layers
from optkit.model import Model
from optkit.steps import Limits, Row, StepPlan
from optkit.transforms import TransformContext
from optkit.weights import save_folder
from optkit_backends.llama_cpp import LlamaCpp
from optkit_backends.onnxruntime import OnnxRuntime
from optkit_backends.openvino import OpenVINO
from optkit_backends.openvino_genai import OpenVINOGenAI
from optkit_backends.torch import Torch
from optkit_backends.torch.native.building import best_instructions
from optkit_backends.torch.native.layout import Instructions
from optkit_backends.torch.native.session import NativeSession
from optkit_batching.continuous import Continuous
from optkit_quantize.kv_cache import KVCache
from tests.architectures import SHAPE, attention_shape

A, B = tuple(range(10, 50)), tuple(range(40, 47))
LIMITS = Limits(max_batch_size=4, max_length=64)
TORCH = [("torch", dtype, granularity) for dtype in ("int8", "fp8") for granularity in ("head", "tensor")]
TORCH += [("torch", "bfloat16", None), ("native", "bfloat16", None), ("native", "int8", "head")]
ONNX = [("onnxruntime", "int8", granularity) for granularity in ("head", "tensor")]
OTHERS: dict[str, Callable[[], Any]] = {
    "mistral-window": lambda: transformers.MistralConfig(**SHAPE, sliding_window=7),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=160, n_embd=64, n_layer=2, n_head=4, n_positions=128),
}
NATIVE = Torch(kernels="native", threads=2)
BACKENDS = {"torch": Torch(), "native": NATIVE, "onnxruntime": OnnxRuntime(threads=1)}
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
E4M3 = np.unique(E4M3[np.isfinite(E4M3)])


def calibration() -> Calibration:
    torch.manual_seed(1)
    ids = [torch.randint(5, 150, (1, length)) for length in (60, 40)]
    return Calibration(tuple({"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids))


def quantized(model: Model, dtype: str, granularity: str | None) -> Model:
    options = KVCache.model_validate({"dtype": dtype, "granularity": granularity})
    return options.apply(model, TransformContext(lambda *_: None, calibration()))


def rounded(given: torch.Tensor, scale: np.ndarray, dtype: str) -> tuple[torch.Tensor, float]:
    """`[rows, heads, tokens, dim]` in float64; `scale` broadcasts over it. And how near a number was to a half way."""
    if dtype == "bfloat16":
        fraction, exponent = np.frexp(given.double().numpy())
        near = np.min(abs(abs(fraction) * 256 % 1 - 0.5)) / 256
        return torch.from_numpy(np.ldexp(np.rint(fraction * 256) / 256, exponent)), float(near)
    numbers = np.arange(-128.0, 128.0) if dtype == "int8" else E4M3
    divided = np.clip(given.double().numpy() / scale, numbers[0], numbers[-1])
    above = np.clip(np.searchsorted(numbers, divided), 1, len(numbers) - 1)
    middle = (numbers[above - 1] + numbers[above]) / 2
    near = np.min(abs(divided - middle) / np.maximum(abs(divided), 32))
    return torch.from_numpy(np.where(divided < middle, numbers[above - 1], numbers[above]) * scale), float(near)


def plain_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, *, scaling: float, **_: Any
) -> tuple[torch.Tensor, None]:
    scales, dtype = module.config.reference[module.layer_idx]
    (key, *near), (value, *others) = (rounded(*part, dtype) for part in zip((key, value), scales, strict=True))
    module.config.near += near + others
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scaling
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    found = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value
    return found.transpose(1, 2).to(query.dtype), None


AttentionInterface.register("tests_rounded", plain_attention)


def references(model: Model, dtype: str) -> dict[int, Any]:
    """What `plain_attention` must know of each layer: the scales of its keys and values, and their dtype."""
    return {
        layer.layer_idx: (
            [torch.as_tensor(getattr(layer, name, 1.0)).double().numpy() for name in ("k_scale", "v_scale")],
            dtype,
        )
        for _, layer in rounding_layers(model.module)
    }


class Case:
    """A model with a quantized cache, its session, and the reference."""

    def __init__(
        self, backend: str, dtype: str, granularity: str | None, make: Callable[[], Model], folder: Path
    ) -> None:
        self.dtype = dtype
        self.model = quantized(make(), dtype, granularity)
        self._weights, self._runtime = folder / "weights", folder / "runtime"
        save_folder(self.model, self._weights)
        self._runtime.mkdir()
        self._backend = BACKENDS[backend]
        self._backend.compile(self.model, self._runtime)
        self._reference: Any = make().module
        self._reference.config.reference = references(self.model, dtype)
        self._reference.set_attn_implementation("tests_rounded")
        self.session = self.open(LIMITS)

    def open(self, limits: Limits) -> TokenSession:
        session = self._backend.open(self._runtime, self._weights, limits)
        assert isinstance(session, TokenSession)
        return session

    def blocks(self, *paged: int) -> tuple[int, ...]:
        """Blocks of one sequence: its pages, or the slot that the first one names."""
        return paged if self.session.caps.kv == "paged" else (paged[0] % 4,)

    def text(self, length: int) -> tuple[int, ...]:
        """Tokens whose keys and values lie so far from any half way that sums in another order round them alike."""
        for seed in range(100):
            tokens = tuple(random.Random(seed + length).choices(range(300), k=length))
            self.expected(tokens)
            if min(self._reference.config.near) > 2e-6:
                return tokens
        raise AssertionError("no such text")

    def expected(self, tokens: tuple[int, ...]) -> np.ndarray:
        self._reference.config.near = []
        with torch.inference_mode():
            found: np.ndarray = self._reference(torch.tensor([tokens])).logits[0].numpy()
        return found

    def run(self, *rows: Row) -> tuple[np.ndarray, ...]:
        return self.session.execute(StepPlan(rows)).logits


@pytest.fixture(scope="module", params=[*TORCH, *ONNX], ids=lambda names: "-".join(filter(None, names)))
def case(request, tiny_llama, tmp_path_factory):
    missing = BACKENDS[request.param[0]].unavailable()
    if missing is not None:
        pytest.skip(missing)
    made = Case(*request.param, tiny_llama, tmp_path_factory.mktemp("case"))
    with made.session:
        yield made


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def test_steps_give_the_logits_of_the_reference(case):
    b, one, two, three = case.blocks, case.text(40), case.text(8), case.text(16)
    whole, last, none = case.run(
        Row(1, one, 0, b(13, 2, 7), "all"), Row(2, two[:7], 0, b(15)), Row(3, three[:13], 0, b(0, 1, 3, 4), "none")
    )
    assert distance(whole, case.expected(one)) < 1e-5
    assert distance(last, case.expected(two)[6:7]) < 1e-5
    assert len(none) == 0
    chunk, decoded = case.run(Row(3, three[13:], 13, b(0, 1, 3, 4), "all"), Row(2, two[7:], 7, b(15)))
    assert distance(chunk, case.expected(three)[13:]) < 1e-5
    assert distance(decoded, case.expected(two)[7:]) < 1e-5
    exact = case.model.module(torch.tensor([one])).logits[0].numpy()
    assert distance(whole, exact) < 1e-5, "the transformed model computes the same"


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_stays_near_the_reference(case, data):
    lengths = data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=4))
    texts = [tuple(random.Random(seed).choices(range(300), k=length)) for seed, length in enumerate(lengths)]
    paged = case.session.caps.kv == "paged"
    free = data.draw(st.permutations(range(16 if paged else 4)))
    blocks = [tuple(free.pop() for _ in range(-(-len(text) // case.session.caps.block_size))) for text in texts]
    done, found = [0] * len(texts), [[] for _ in texts]
    while any(count < len(text) for count, text in zip(done, texts, strict=True)):
        rows = []
        for i in data.draw(st.permutations(range(len(texts)))):
            take = min(len(texts[i]) - done[i], data.draw(st.sampled_from([64, 1, 16, 0])))
            if take:
                rows.append(Row(i, texts[i][done[i] : done[i] + take], done[i], blocks[i], "all"))
        if rows:
            for row, logits in zip(rows, case.run(*rows), strict=True):
                found[row.sequence].append(logits)
                done[row.sequence] += len(row.tokens)
    for text, logits in zip(texts, found, strict=True):
        # Sums in another order may round one number to its other neighbour.
        assert distance(np.concatenate(logits), case.expected(text)) < (1e-2 if case.dtype == "fp8" else 1e-3)


def test_blocks_are_integers_and_move_exactly(case):
    b, size = case.blocks, case.session.caps.block_size
    case.run(Row(1, A[:20], 0, b(4, 2), "none"))
    saved = case.session.read_blocks(b(4, 2))
    assert saved.dtype == (np.int16 if case.dtype == "bfloat16" else np.int8)
    # Layers, keys and values, heads, numbers; ONNX Runtime has one place more than the maximum length.
    assert saved[0].size == 2 * 2 * 2 * 16 * (size if case.session.caps.kv == "paged" else size + 1)
    assert len(np.unique(saved)) > 100
    before = case.run(Row(1, A[20:], 20, b(4, 2, 7), "all"))[0]
    everything = list(range(case.session.caps.blocks))
    nan = {"int8": 0x7F, "fp8": 0x7F, "bfloat16": 0x7FC0}[case.dtype]
    junk = np.full_like(case.session.read_blocks(everything), nan)
    case.session.write_blocks(everything, junk)
    saved.flags.writeable = False  # as it comes back from a file or another process
    case.session.write_blocks(b(15, 3), saved)
    np.testing.assert_array_equal(case.session.read_blocks(b(15, 3)), saved)
    after = case.run(Row(1, A[20:], 20, b(15, 3, 0), "all"))[0]
    np.testing.assert_array_equal(after, before)
    pairs = list(zip(b(15, 3), b(9, 6), strict=True))
    case.session.copy_blocks(pairs)
    np.testing.assert_array_equal(case.session.read_blocks(b(9, 6)), case.session.read_blocks(b(15, 3)))
    case.session.write_blocks(everything, np.zeros_like(junk))


def test_rows_share_the_blocks_of_a_prefix(case):
    if case.session.caps.kv != "paged":
        pytest.skip("slots are not shared")
    mine = case.text(35)
    yours = (*mine[:32], mine[34], mine[33])
    case.run(Row(1, mine[:32], 0, (8, 3), "none"))
    apart = case.run(Row(1, mine[32:], 32, (8, 3, 0), "all"))[0]
    found = case.run(Row(1, mine[32:], 32, (8, 3, 0), "all"), Row(2, yours[32:], 32, (8, 3, 14), "all"))
    assert distance(found[0], case.expected(mine)[32:]) < 1e-5
    assert distance(found[0], apart) < 1e-5
    assert distance(found[1], case.expected(yours)[32:]) < 1e-3


def test_the_engine_generates_what_the_reference_does(case):
    engine = Engine(case.session, Continuous(max_batch_size=3))
    ids = [engine.add(Request(p, SamplingParams(max_tokens=8, ignore_eos=True))) for p in (A, B, A)]
    output: dict[int, list[int]] = {id: [] for id in ids}
    while engine.busy:
        for event in engine.step():
            output[event.request].append(event.token)
    for id, prompt in zip(ids, (A, B, A), strict=True):
        text = prompt
        for _ in range(8):
            text = (*text, int(case.expected(text)[-1].argmax()))
        assert output[id] == list(text[len(prompt) :])


def test_the_same_memory_holds_more_tokens(case, tiny_llama, tmp_path, monkeypatch):
    paged, times = case.session.caps.kv == "paged", 2 if case.dtype == "bfloat16" else 4
    save_folder(tiny_llama(), tmp_path / "weights")
    (tmp_path / "runtime").mkdir()
    backend = Torch() if paged else OnnxRuntime(threads=1)
    backend.compile(tiny_llama(), tmp_path / "runtime")
    monkeypatch.setattr(hardware, "memory", lambda: Memory(1 << 40, 1 << 20))
    limits = Limits(10_000, 64)
    with backend.open(tmp_path / "runtime", tmp_path / "weights", limits) as plain, case.open(limits) as small:
        assert small.caps.blocks == pytest.approx(times * plain.caps.blocks, abs=3)
        assert times * small.read_blocks([0]).nbytes == plain.read_blocks([0]).nbytes


def test_profile_runs_the_same_step(case):
    text = case.text(40)
    plan = StepPlan((Row(1, text, 0, case.blocks(0, 1, 2), "all"), Row(2, text[:1], 0, case.blocks(3))))
    assert sum(time.seconds for time in case.session.profile(plan)) > 0
    assert distance(case.session.execute(plan).logits[0], case.expected(text)) < 1e-5


@pytest.mark.parametrize("dtype", ["int8", "fp8", "bfloat16"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_keep_it_too(kind, dtype, tmp_path):
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(OTHERS[kind]()).eval().requires_grad_(False)
    model = quantized(Model(module, None, frozenset()), dtype, None)
    save_folder(model, tmp_path)
    with Torch().open(tmp_path, tmp_path, LIMITS) as session:
        run = lambda *rows: session.execute(StepPlan(rows)).logits  # noqa: E731
        found = [*run(Row(1, A[:20], 0, (5, 2), "all")), *run(Row(1, A[20:35], 20, (5, 2, 9), "all"))]
        found += [run(Row(1, A[i : i + 1], i, (5, 2, 9)))[0] for i in range(35, 40)]
        assert session.read_blocks([0]).dtype == (np.int16 if dtype == "bfloat16" else np.int8)
    wanted = model.module(torch.tensor([A])).logits[0].numpy()
    assert distance(np.concatenate(found), wanted) < (1e-2 if dtype == "fp8" else 1e-3)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    heads=st.tuples(st.integers(1, 3), st.integers(1, 4) | st.just(26)),
    dim=st.sampled_from([2, 6, 16, 20, 24, 50]),
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=3),
    dtype=st.sampled_from(["int8", "bfloat16"]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("instructions", list(Instructions), ids=lambda one: one.title)
def test_native_attention_of_any_shape_is_that_of_float64(
    heads, dim, lengths, dtype, seed, instructions, tmp_path_factory
):
    if (missing := NATIVE.unavailable()) is not None:
        pytest.skip(missing)
    if instructions > best_instructions():
        pytest.skip(f"this processor has no {instructions.title}")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        **SHAPE | attention_shape(heads, dim) | {"num_hidden_layers": 1, "initializer_range": 0.1}
    )
    reference: Any = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    model = quantized(Model(copy.deepcopy(reference), None, frozenset()), dtype, None)
    folder = tmp_path_factory.mktemp("weights")
    save_folder(model, folder)
    reference.config.reference = references(model, dtype)
    reference.set_attn_implementation("tests_rounded")
    texts = [tuple(torch.randint(0, config.vocab_size, (length,)).tolist()) for length in lengths]
    cuts = [max(1, len(text) - 1 - seed % 3) for text in texts]  # one token or a few come in a second step
    blocks = [tuple(range(4 * i + 3, 4 * i - 1, -1)) for i in range(len(texts))]
    with NativeSession(folder, LIMITS, threads=2, instructions=instructions) as session:

        def part(*bounds: tuple[int, int]) -> tuple[np.ndarray, ...]:
            spans = zip(texts, bounds, blocks, strict=True)
            rows = (Row(i, text[a:b], a, own, "all") for i, (text, (a, b), own) in enumerate(spans))
            return session.execute(StepPlan(tuple(rows))).logits

        begun = part(*((0, cut) for cut in cuts))
        ended = part(*((cut, len(text)) for cut, text in zip(cuts, texts, strict=True)))
    for text, logits in zip(texts, map(np.concatenate, zip(begun, ended, strict=True)), strict=True):
        reference.config.near = []
        with torch.inference_mode():
            wanted = reference(torch.tensor([text])).logits[0].numpy()
        # Sums in another order may round a number that is half way to its other neighbour.
        assert distance(logits, wanted) < (1e-5 if min(reference.config.near) > 2e-6 else 1e-2)


@pytest.mark.parametrize("kind", ["mistral-window", "qwen3"])
def test_onnxruntime_keeps_it_with_windows_and_norms_of_heads(kind, tmp_path):
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(OTHERS[kind]()).eval().requires_grad_(False)
    model = quantized(Model(module, None, frozenset()), "int8", "head")
    OnnxRuntime(threads=1).compile(model, tmp_path)
    with OnnxRuntime(threads=1).open(tmp_path, tmp_path, LIMITS) as session:
        found = session.execute(StepPlan((Row(1, A, 0, (2,), "all"),))).logits[0]
    assert distance(found, model.module(torch.tensor([A])).logits[0].numpy()) < 1e-3


def test_backends_say_what_they_keep():
    tags = frozenset({"task:causal-lm", "arch:llama", "weights:float"})
    for dtype in ("int8", "fp8"):
        for granularity in ("head", "tensor"):
            tag = f"kv:{dtype}-{granularity}"
            lowered = Torch().lowering(tags | {tag})[tag]
            assert (lowered.kernel, lowered.native) == (
                f"paged attention over {dtype} blocks, dequantized when read",
                True,
            )
            assert OnnxRuntime().lowering(tags | {tag})[tag].possible == (dtype == "int8")
    tag = "kv:bfloat16"
    assert Torch().lowering(tags | {tag})[tag].kernel == "paged attention over bfloat16 blocks, widened when read"
    for backend in (OnnxRuntime(), LlamaCpp(), OpenVINO(), OpenVINOGenAI()):
        lowered = backend.lowering(tags | {tag})[tag]
        assert not lowered.possible
        assert lowered.reason
    assert "PER_CHANNEL" in OnnxRuntime().lowering(tags | {"kv:int8-head"})["kv:int8-head"].kernel
    assert "float32 or int8" in OnnxRuntime().lowering(tags | {"kv:fp8-head"})["kv:fp8-head"].reason
    for backend in (Torch(), OnnxRuntime()):
        assert not backend.lowering(tags | {"kv:int4-head"})["kv:int4-head"].possible
        assert not any(tag.startswith("kv:") for tag in backend.lowering(tags))
