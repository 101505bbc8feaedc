"""The onnxruntime backend against transformers' own modules, on tiny random models of every supported architecture."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optkit import hardware
from optkit.backends import TokenSession
from optkit.errors import DamagedError, MachineError, RecipeError
from optkit.hardware import Memory
from optkit.model import Model
from optkit.quantized import QuantizedLinear, WeightScheme, replace_module
from optkit.steps import Limits, Row, StepPlan
from optkit_backends.onnxruntime import OnnxRuntime

VOCABULARY = 160
EXACT = OnnxRuntime(threads=2, accuracy_level=1)
LIMITS = Limits(max_batch_size=4, max_length=64)
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": transformers.LlamaConfig,
    "llama-biased": lambda **shape: transformers.LlamaConfig(**shape, attention_bias=True, mlp_bias=True),
    "llama-rope": lambda **shape: transformers.LlamaConfig(**shape, rope_parameters=LLAMA3_ROPE),
    "llama-yarn": lambda **shape: transformers.LlamaConfig(**shape, rope_parameters=YARN_ROPE),
    "mistral": lambda **shape: transformers.MistralConfig(**shape, sliding_window=None),
    "mistral-window": lambda **shape: transformers.MistralConfig(**shape, sliding_window=7),
    "qwen2": transformers.Qwen2Config,
    "qwen2-window": lambda **shape: transformers.Qwen2Config(
        **shape, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": transformers.Qwen3Config,
}
SCHEMES = [
    WeightScheme(bits, group_size, symmetric)
    for bits, group_size, symmetric in [
        (8, None, True),
        (8, None, False),
        (8, 32, True),
        (4, None, True),
        (4, 32, True),
        (4, 32, False),
        (4, 16, False),
        (2, 32, True),
        (2, 16, False),
    ]
]


def tiny(kind: str = "llama", *, tied: bool = False, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = CONFIGS[kind](**SHAPE, tie_word_embeddings=tied)
    config._attn_implementation = "eager"
    module: Any = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if "norm" in name or "bias" in name:  # initialized to ones and zeros, which would hide a mistake
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    return module


def quantize(module: Any, scheme: WeightScheme, skip: Sequence[str] = ()) -> Any:
    """Rounds every linear layer to nearest; a tied embedding gets the head's values."""
    low, high = scheme.range
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, torch.nn.Linear) or name in skip:
            continue
        groups = layer.weight.reshape(layer.out_features, -1, scheme.group_size or layer.in_features)
        if scheme.symmetric:
            scale, zero = groups.abs().amax(-1) / high, None
            integers = groups / scale[..., None]
        else:
            scale = (groups.amax(-1) - groups.amin(-1)) / (high - low)
            zero = (low - groups.amin(-1) / scale).round().clamp(low, high).to(torch.int8)
            integers = groups / scale[..., None] + zero[..., None]
        weight = integers.round().clamp(low, high).to(torch.int8).flatten(1)
        quantized = QuantizedLinear(weight, scale, zero, layer.bias, scheme)
        if module.get_input_embeddings().weight is layer.weight:
            module.get_input_embeddings().weight = torch.nn.Parameter(quantized.dequantized(), requires_grad=False)
        replace_module(module, name, quantized)
    return module


def compiled(module: Any, directory: Path, backend: OnnxRuntime = EXACT) -> Path:
    directory.mkdir(exist_ok=True)
    backend.compile(Model(module, None, frozenset()), directory)
    return directory


def opened(module: Any, directory: Path, backend: OnnxRuntime = EXACT, limits: Limits = LIMITS) -> TokenSession:
    return backend.open(compiled(module, directory, backend), directory, limits)


def expected(module: Any, tokens: Sequence[int]) -> np.ndarray:
    with torch.no_grad():
        return module(torch.tensor([list(tokens)])).logits[0].numpy()


def distance(found: np.ndarray, reference: np.ndarray) -> float:
    assert found.shape == reference.shape
    assert found.dtype == np.float32
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


def text(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(token) for token in np.random.default_rng(seed).integers(0, VOCABULARY, length))


def score(session: TokenSession, tokens: tuple[int, ...], slot: int = 0) -> np.ndarray:
    return session.execute(StepPlan((Row(0, tokens, 0, (slot,), "all"),))).logits[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_float_models_match_transformers(kind: str, tied: bool, tmp_path: Path) -> None:
    module, tokens = tiny(kind, tied=tied), text(40)
    reference = expected(module, tokens)
    with opened(module, tmp_path) as session:
        assert distance(score(session, tokens), reference) < 1e-5
        steps = [session.execute(StepPlan((Row(1, (t,), i, (1,)),))).logits[0][0] for i, t in enumerate(tokens)]
    assert distance(np.array(steps), reference) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.tag[8:]}-{scheme.group_size}")
def test_integers_are_the_very_same(scheme: WeightScheme, tied: bool, tmp_path: Path) -> None:
    module, tokens = quantize(tiny("llama-biased", tied=tied), scheme), text(24)
    reference = expected(module, tokens)
    with opened(module, tmp_path) as session:
        assert distance(score(session, tokens), reference) < 1e-5
        assert distance(score(session, tokens[:1]), reference[:1]) < 1e-5


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_other_architectures_take_integers_too(kind: str, tmp_path: Path) -> None:
    module, tokens = quantize(tiny(kind, tied=True), WeightScheme(4, 32, False)), text(24)
    with opened(module, tmp_path) as session:
        assert distance(score(session, tokens), expected(module, tokens)) < 1e-5


@pytest.mark.parametrize("scheme", [WeightScheme(8, None, True), WeightScheme(4, 32, False), WeightScheme(2, 32, True)])
def test_int8_activations_stay_within_their_tolerance(scheme: WeightScheme, tmp_path: Path) -> None:
    module, tokens = quantize(tiny(tied=True), scheme), text(40)
    reference = expected(module, tokens)
    errors = []
    for size in (64, 16):
        backend = OnnxRuntime(threads=2, block_size=size)
        with opened(module, tmp_path / str(size), backend) as session:
            errors.append(distance(score(session, tokens), reference))
    tolerance = OnnxRuntime().lowering(frozenset({scheme.tag}))[scheme.tag].tolerance
    assert 1e-5 < errors[0] < tolerance
    assert errors[1] < errors[0]  # smaller blocks, smaller loss


def test_formats_can_differ_between_layers(tmp_path: Path) -> None:
    module = tiny("llama-biased")
    keys = "model.layers.0.self_attn.k_proj"
    others = [name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear) and name != keys]
    quantize(module, WeightScheme(4, 32, True), skip=others)
    quantize(module, WeightScheme(8, None, True), skip=("lm_head",))
    with opened(module, tmp_path) as session:
        assert distance(score(session, text(24)), expected(module, text(24))) < 1e-5


def test_a_tied_quantized_head_is_stored_once(tmp_path: Path) -> None:
    scheme = WeightScheme(8, None, True)
    tied = quantize(tiny(tied=True), scheme)
    loose = quantize(tiny(tied=True), scheme)
    loose.model.embed_tokens.weight = torch.nn.Parameter(loose.model.embed_tokens.weight * 1.5, requires_grad=False)
    sizes = [
        (compiled(module, tmp_path / name) / "model.onnx.data").stat().st_size
        for module, name in [(tied, "tied"), (loose, "loose")]
    ]
    assert sizes[1] - sizes[0] >= VOCABULARY * 64 * 4
    for module, name in [(tied, "tied"), (loose, "loose")]:
        with EXACT.open(tmp_path / name, tmp_path, LIMITS) as session:
            assert distance(score(session, text(24)), expected(module, text(24))) < 1e-5


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, TokenSession]]:
    module = tiny(tied=True)
    with opened(module, tmp_path_factory.mktemp("llama")) as session:
        yield module, session


def test_a_ragged_first_step(llama: tuple[Any, TokenSession]) -> None:
    module, session = llama
    texts = [text(5, 1), text(17, 2), text(1, 3)]
    rows = tuple(Row(i, tokens, 0, (2 - i,), "all") for i, tokens in enumerate(texts))
    for tokens, logits in zip(texts, session.execute(StepPlan(rows)).logits, strict=True):
        assert distance(logits, expected(module, tokens)) < 1e-5


def test_prompts_and_single_tokens_mix_with_idle_slots_between(llama: tuple[Any, TokenSession]) -> None:
    module, session = llama
    first, second, idle = text(30, 1), text(22, 2), text(20, 3)
    start = (Row(0, first[:20], 0, (0,)), Row(9, idle[:19], 0, (2,)))
    session.execute(StepPlan(start))
    mixed = session.execute(StepPlan((Row(0, first[20:21], 20, (0,)), Row(1, second, 0, (3,), "all")))).logits
    assert distance(mixed[0], expected(module, first)[20:21]) < 1e-5
    assert distance(mixed[1], expected(module, second)) < 1e-5
    # What was idle is unharmed, and goes on next to a chunk.
    later = session.execute(StepPlan((Row(9, idle[19:], 19, (2,)), Row(0, first[21:], 21, (0,), "all")))).logits
    assert distance(later[0], expected(module, idle)[19:]) < 1e-5
    assert distance(later[1], expected(module, first)[21:]) < 1e-5


def test_chunks_of_several_prompts_share_steps(llama: tuple[Any, TokenSession]) -> None:
    module, session = llama
    texts = [text(40, 1), text(33, 2), text(8, 3)]
    for start in range(0, 40, 8):
        alive = [i for i in range(3) if start < len(texts[i])]
        rows = tuple(Row(i, texts[i][start : start + 8], start, (i,), "all") for i in alive)
        for i, logits in zip(alive, session.execute(StepPlan(rows)).logits, strict=True):
            assert distance(logits, expected(module, texts[i])[start : start + 8]) < 1e-5


def test_a_slot_starts_anew(llama: tuple[Any, TokenSession]) -> None:
    module, session = llama
    score(session, text(64, 1))
    assert distance(score(session, text(9, 2)), expected(module, text(9, 2))) < 1e-5


def test_slots_can_be_read_written_and_copied(llama: tuple[Any, TokenSession]) -> None:
    module, session = llama
    first, second = text(30, 1), text(22, 2)
    session.execute(StepPlan((Row(0, first[:20], 0, (1,)), Row(1, second[:9], 0, (3,)))))
    ends = Row(0, first[20:], 20, (1,), "all"), Row(1, second[9:], 9, (3,), "all")
    saved = session.read_blocks([3, 1])
    before = session.execute(StepPlan(ends)).logits
    junk = np.full_like(session.read_blocks(range(4)), np.nan)  # as broken sequences would leave them
    session.write_blocks(range(4), junk)
    session.write_blocks([0, 2], saved)
    assert np.array_equal(session.read_blocks([0, 2]), saved)
    moved = Row(0, first[20:], 20, (2,), "all"), Row(1, second[9:], 9, (0,), "all")
    after = session.execute(StepPlan(moved)).logits
    for found, wanted, whole in zip(after, before, (first[:30], second), strict=True):
        assert np.array_equal(found, wanted)
        assert distance(found, expected(module, whole)[-len(found) :]) < 1e-5
    session.copy_blocks([(2, 3), (0, 1)])
    session.write_blocks([2, 0], junk[:2])
    copied = Row(0, first[20:], 20, (3,), "all"), Row(1, second[9:], 9, (1,), "all")
    for found, wanted in zip(session.execute(StepPlan(copied)).logits, before, strict=True):
        assert np.array_equal(found, wanted)
    session.write_blocks(range(4), np.zeros_like(junk))


def test_a_row_near_its_end_shares_a_step_with_a_whole_prompt(llama: tuple[Any, TokenSession]) -> None:
    module, session = llama
    long, prompt = text(64, 1), text(64, 2)
    session.execute(StepPlan((Row(0, long[:63], 0, (0,)),)))
    plan = StepPlan((Row(0, long[63:], 63, (0,)), Row(1, prompt, 0, (3,), "all")))
    logits = session.execute(plan).logits
    assert distance(logits[0], expected(module, long)[63:]) < 1e-5
    assert distance(logits[1], expected(module, prompt)) < 1e-5


def test_only_the_wanted_logits_come_back(llama: tuple[Any, TokenSession]) -> None:
    module, session = llama
    tokens, reference = text(10), expected(module, text(10))
    plan = StepPlan((Row(0, tokens, 0, (0,), "none"), Row(1, tokens, 0, (1,), "last"), Row(2, tokens, 0, (2,), "all")))
    none, last, every = session.execute(plan).logits
    assert none.shape == (0, VOCABULARY)
    assert distance(last, reference[-1:]) < 1e-5
    assert distance(every, reference) < 1e-5
    (silent,) = session.execute(StepPlan((Row(0, tokens, 0, (0,), "none"),))).logits
    assert silent.shape == (0, VOCABULARY)
    after = session.execute(StepPlan((Row(0, (7,), 10, (0,)),))).logits[0]
    assert distance(after, expected(module, (*tokens, 7))[-1:]) < 1e-5


def test_results_outlive_the_next_step(llama: tuple[Any, TokenSession]) -> None:
    _, session = llama
    first = score(session, text(6, 1))
    kept = first.copy()
    score(session, text(6, 2))
    assert np.array_equal(first, kept)


def test_results_take_the_same_memory_only_when_nobody_reads_it(llama: tuple[Any, TokenSession]) -> None:
    _, session = llama

    def step(token: int) -> np.ndarray:
        return session.execute(StepPlan((Row(0, (token,), 0, (0,)),))).logits[0]

    alone = [step(token).copy() for token in (3, 4)]
    dropped = step(3)
    place = dropped.ctypes.data
    del dropped
    first = step(3)
    assert first.ctypes.data == place
    part = first[0, 5:9]  # a view of a view counts as well
    del first
    second = step(4)
    assert second.ctypes.data != place
    assert np.array_equal(part, alone[0][0, 5:9])
    assert np.array_equal(second, alone[1])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_gives_the_logits_of_the_whole_text(llama: tuple[Any, TokenSession], data: st.DataObject) -> None:
    module, session = llama
    texts = [text(data.draw(st.integers(1, 64)), seed) for seed in range(data.draw(st.integers(1, 4)))]
    slots = data.draw(st.permutations(range(4)))
    done = [0] * len(texts)
    found: list[list[np.ndarray]] = [[] for _ in texts]
    while any(count < len(tokens) for count, tokens in zip(done, texts, strict=True)):
        rows = []
        for i in data.draw(st.permutations(range(len(texts)))):
            left = len(texts[i]) - done[i]
            take = min(left, data.draw(st.sampled_from([64, 1, 5, 0])))
            if take:
                rows.append(Row(i, texts[i][done[i] : done[i] + take], done[i], (slots[i],), "all"))
        if rows:
            for row, logits in zip(rows, session.execute(StepPlan(tuple(rows))).logits, strict=True):
                found[row.sequence].append(logits)
                done[row.sequence] += len(row.tokens)
    for tokens, logits in zip(texts, found, strict=True):
        assert distance(np.concatenate(logits), expected(module, tokens)) < 1e-5


def test_greedy_text_is_that_of_transformers(llama: tuple[Any, TokenSession]) -> None:
    module, session = llama
    for seed in range(3):
        prompt = text(12, seed)
        settings = transformers.GenerationConfig(max_new_tokens=32, do_sample=False, pad_token_id=0)
        with torch.no_grad():
            reference = module.generate(torch.tensor([prompt]), generation_config=settings)[0].tolist()
        output, row = list(prompt), Row(seed, prompt, 0, (seed,))
        while len(output) < len(reference):
            output.append(int(session.execute(StepPlan((row,))).logits[0].argmax()))
            row = Row(seed, (output[-1],), len(output) - 1, (seed,))
        assert output == reference


def test_profile_names_layers_kernels_and_bytes(tmp_path: Path) -> None:
    module = quantize(tiny(tied=True), WeightScheme(8, None, True))
    backend = OnnxRuntime(threads=2, spin=True)
    plan = StepPlan((Row(0, text(12), 0, (0,), "all"),))
    with opened(module, tmp_path, backend) as session:
        times = session.profile(plan)
        assert distance(session.execute(plan).logits[0], expected(module, text(12))) < 0.15
    kernels = {entry.layer: entry for entry in times}
    down = kernels["model.layers.1.mlp.down_proj"]
    assert down.kernel == OnnxRuntime().lowering(frozenset({"weights:int8-channel"}))["weights:int8-channel"].kernel
    assert down.weight_bytes == 64 * 128 + 64 * 2 * 4  # integers, and a scale for each block of 64
    assert kernels["model.layers.0.self_attn"].kernel == "GroupQueryAttention"
    assert kernels["model.embed_tokens"].weight_bytes == 0
    layers = [entry.layer for entry in times]
    assert len(layers) == len(set(layers))  # one run and not two
    assert layers.index("model.embed_tokens") < layers.index("model.layers.1.mlp.down_proj") < layers.index("lm_head")
    assert all(entry.seconds >= 0 for entry in times)


# Weights that are overwritten but whole are found by the artifact's hashes.
@pytest.mark.parametrize(
    ("name", "harm"),
    [(name, harm) for name in ("model.onnx", "model.onnx.data", "session.json") for harm in ("cut", "gone")]
    + [("model.onnx", "overwritten"), ("session.json", "overwritten")],
)
def test_damaged_files_are_refused_in_one_line(name: str, harm: str, tmp_path: Path) -> None:
    directory = compiled(tiny(), tmp_path)
    path = directory / name
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    elif harm == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(b"\xff" * len(content))
    with pytest.raises(DamagedError) as raised:
        EXACT.open(directory, directory, LIMITS)
    assert "\n" not in str(raised.value)
    assert str(directory) in str(raised.value)


def test_a_session_is_bounded_by_the_model_and_the_machine(tmp_path: Path) -> None:
    directory = compiled(tiny(), tmp_path)
    with pytest.raises(RecipeError, match="the model knows 128 positions, found 129"):
        EXACT.open(directory, directory, Limits(1, 129))
    tokens = text(128)
    with EXACT.open(directory, directory, Limits(2, 128)) as session:
        assert (session.caps.kv, session.caps.block_size, session.caps.blocks) == ("slot", 128, 2)
        plan = StepPlan((Row(0, tokens, 0, (0,), "all"), Row(1, tokens[:3], 0, (1,))))
        assert distance(session.execute(plan).logits[0], expected(tiny(), tokens)) < 1e-5
    session.close()


def test_there_are_as_many_slots_as_sequences_or_as_memory_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = compiled(tiny(), tmp_path)
    slot = 2 * 2 * 2 * 65 * 32 * 4  # layers, keys and values, heads, places, numbers, bytes

    def slots(limits: Limits) -> int:
        with EXACT.open(directory, directory, limits) as session:
            assert session.caps.max_batch_size == session.caps.blocks
            assert session.caps.max_length == session.caps.block_size == limits.max_length
            return session.caps.blocks

    assert slots(Limits(3, 64)) == 3
    assert slots(Limits(8, 64, kv_cache_tokens=5 * 64 + 63)) == 5
    assert slots(Limits(2, 64, kv_cache_tokens=5 * 64)) == 2
    with pytest.raises(MachineError, match="takes up to 64 tokens of KV cache, found 63; raise kv_cache_tokens"):
        slots(Limits(2, 64, kv_cache_tokens=63))
    monkeypatch.setattr(hardware, "memory", lambda: Memory(1 << 40, 5 * slot))
    assert slots(Limits(1 << 30, 64)) == 4
    assert slots(Limits(1 << 30, 64, kv_cache_tokens=320)) == 5
    with pytest.raises(MachineError, match="cache of 384 tokens needs 390 KiB, and 325 KiB are free; lower kv_cache"):
        slots(Limits(1 << 30, 64, kv_cache_tokens=384))
    monkeypatch.setattr(hardware, "memory", lambda: Memory(1 << 40, slot))
    with pytest.raises(MachineError, match=r"one sequence of 64 tokens needs 65 KiB .* 52 KiB are free for it"):
        slots(Limits(1, 64))


def test_what_the_graph_cannot_express_is_refused(tmp_path: Path) -> None:
    odd = QuantizedLinear(
        torch.zeros(64, 40, dtype=torch.int8), torch.ones(64, 1), None, None, WeightScheme(8, None, True)
    )
    module = tiny()
    replace_module(module, "model.layers.0.mlp.down_proj", odd)
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.mlp\.down_proj: .* divisible by 16, found 40"):
        compiled(module, tmp_path / "odd")
    with pytest.raises(RecipeError, match=r"qkv_proj: .* 2, 4 or 8 bits, found 3"):
        compiled(quantize(tiny(), WeightScheme(3, None, True)), tmp_path / "three")
    module = tiny()
    module.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(RecipeError, match="rope_type, found 'dynamic'"):
        compiled(module, tmp_path / "rope")
    module = tiny()
    module.config.hidden_act = "gelu"
    with pytest.raises(RecipeError, match="hidden_act, found 'gelu'"):
        compiled(module, tmp_path / "gelu")


def test_lowering_says_which_kernel_runs_or_why_none_can() -> None:
    fine = frozenset({"task:causal-lm", "arch:qwen3", "sparsity:2:4", "weights:float", "weights:int4-group-asym"})
    lowered = OnnxRuntime().lowering(fine)
    assert set(lowered) == {"weights:float", "weights:int4-group-asym"}
    assert all(entry.native and entry.possible for entry in lowered.values())
    assert lowered["weights:int4-group-asym"].kernel == "MatMulNBits (4-bit, int8 activations)"
    bad = frozenset({"task:embedding", "arch:mamba", "weights:int3-group", "weights:nf4"})
    refused = OnnxRuntime().lowering(bad)
    assert set(refused) == bad
    assert not any(entry.possible for entry in refused.values())
    assert "llama, mistral, qwen2, qwen3" in refused["arch:mamba"].reason
    [streams] = OnnxRuntime(streams=2).lowering(frozenset({"task:causal-lm", "arch:llama"})).values()
    assert not streams.possible
    assert "leave streams at 1" in streams.reason
    slow = EXACT.lowering(frozenset({"weights:int8-channel", "weights:int4-group"}))
    assert not slow["weights:int8-channel"].native
    assert "every step" in slow["weights:int8-channel"].reason
    assert slow["weights:int4-group"].native
    assert slow["weights:int4-group"].tolerance < lowered["weights:int4-group-asym"].tolerance


def test_planning_imports_no_runtime() -> None:
    code = (
        "import sys; from optkit_backends.onnxruntime import OnnxRuntime as B; b = B();"
        "assert b.unavailable() is None; b.lowering(frozenset({'weights:float'}));"
        "print(sorted({'torch', 'onnx', 'onnx_ir', 'onnxruntime', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
