"""The llama_cpp backend: GGUF files against the model they come from, and sessions against transformers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import nn

from optkit.builtin.gguf import GGUF
from optkit.engine import Engine, Request, SamplingParams
from optkit.errors import DamagedError, MachineError, RecipeError
from optkit.quantized import QuantizedLinear, WeightScheme, quantized_layers, replace_module
from optkit.steps import Limits, Row, StepPlan
from optkit.testing import check_backend
from optkit_backends.llama_cpp import LlamaCpp
from optkit_backends.llama_cpp.export import export_gguf
from optkit_backends.llama_cpp.formats import blocks, stored_as
from optkit_batching.static import Static
from optkit_quantize.rtn import RTN
from tests.architectures import SHAPE, other
from tests.calibrating import context, texts
from tests.damaging import HARMS, damage
from tests.shaping import factored, narrow

A, B = tuple(range(10, 50)), tuple(range(5, 18))
LIMITS = Limits(max_batch_size=4, max_length=64)
BACKEND = LlamaCpp(threads=1)
TOLERANCE = BACKEND.lowering(frozenset({"weights:float"}))["weights:float"].tolerance
running = pytest.mark.skipif(BACKEND.unavailable() is not None, reason=str(BACKEND.unavailable()))


def compiled(model, directory):
    directory.mkdir(exist_ok=True)
    BACKEND.compile(model, directory)
    return directory


def opened(model, directory, limits=LIMITS):
    return BACKEND.open(compiled(model, directory), directory, limits)


def quantized(model, bits, **options):
    return RTN(bits=bits, **options).apply(model, context(texts()))


def tensors(file):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def metadata(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def expected(model, tokens):
    with torch.inference_mode():
        return model.module(torch.tensor([tokens])).logits[0].numpy()


def distance(found, wanted):
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def run(session, *rows):
    return session.execute(StepPlan(rows)).logits


def in_halves(rows, heads):
    """Rows of a query or key in transformers' order, from those of llama.cpp, which has each pair side by side."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


# The export.


def parts(data, kind):
    """Integers `[out, in]` as stored, scales and minima `[out, blocks]`, by the layout in `ggml-common.h`."""
    size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind]
    by_block = np.asarray(data).reshape(len(data), -1, size)
    fields = by_block[..., : 4 if kind == "Q4_1" else 2].copy().view("<f2").astype(np.float64)
    codes = by_block[..., 4 if kind == "Q4_1" else 2 :]
    if kind == "Q8_0":
        integers = codes.copy().view(np.int8)
    else:
        integers = np.concatenate([codes & 15, codes >> 4], axis=-1).astype(np.int8) - 8
    return integers.reshape(len(data), -1), fields[..., 0], fields[..., -1]


@settings(max_examples=60)
@given(
    data=st.data(),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    magnitude=st.floats(-6, 2),
)
def test_only_scales_are_rounded(data, bits, symmetric, shape, magnitude):
    kind = stored_as(bits, symmetric)
    if kind is None:
        assert bits > 4
        return
    rows, groups, of_blocks = shape
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    low, high = WeightScheme(bits, 32, symmetric).range
    integers = random.integers(low, high, (rows, groups * of_blocks * 32), np.int8, endpoint=True)
    scale = (10**magnitude * random.uniform(0.5, 2, (rows, groups))).astype(np.float32)
    zero_point = None if symmetric else random.integers(low, high, (rows, groups), np.int8, endpoint=True)
    found = blocks(kind, integers, scale, zero_point, "layer")
    stored, scales, _ = parts(found, kind)
    np.testing.assert_array_equal(stored, integers)
    np.testing.assert_array_equal(scales, scale.astype(np.float16).repeat(of_blocks, axis=1))
    exact = scale.astype(np.float64).repeat(of_blocks * 32, axis=1)
    shift = np.zeros_like(exact) if zero_point is None else zero_point.astype(np.float64).repeat(of_blocks * 32, axis=1)
    read = gguf.dequantize(found, gguf.GGMLQuantizationType[kind]).astype(np.float64)
    steps = np.abs(integers - shift) + (0 if symmetric else np.abs(shift + 8))
    # Half a unit in the last place of a float16, which has 11 bits and ends at 2^-24; and float32 sums.
    assert (
        np.abs(read - (integers - shift) * exact) <= np.maximum(exact * 2**-11, 2**-25) * steps * 1.001 + 1e-12
    ).all()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_integers_of_llama_cpp_become_its_own_bytes(kind):
    numbers = np.random.default_rng(0).normal(size=(7, 96)).astype(np.float32)
    theirs = gguf.quantize(numbers, gguf.GGMLQuantizationType[kind])
    integers, scale, _ = parts(theirs, kind)
    np.testing.assert_array_equal(blocks(kind, integers, scale.astype(np.float32), None, "layer"), theirs)


FORMATS = {
    "Q8_0": {"bits": 8, "granularity": "group", "group_size": 32},
    "Q8_0-channel": {"bits": 8},
    "Q4_0": {"bits": 4, "granularity": "group", "group_size": 32},
    "Q4_0-wide": {"bits": 4, "granularity": "group", "group_size": 64},
    "Q4_0-3": {"bits": 3, "granularity": "group", "group_size": 32},
    "Q4_1": {"bits": 4, "granularity": "group", "group_size": 32, "symmetric": False},
    "F32": {"bits": 8, "symmetric": False},
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_holds_the_weights_of_the_model(name, tiny_llama, tmp_path):
    kind = name.partition("-")[0]
    model = quantized(tiny_llama(), **FORMATS[name])
    [tag] = [tag for tag in model.tags if tag.startswith("weights:int")]
    how = BACKEND.lowering(model.tags)[tag]
    assert kind in how.kernel
    assert how.native == (kind != "F32")
    facts = export_gguf(model, tmp_path / "x.gguf")
    found = tensors(tmp_path / "x.gguf")
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    layers = dict(quantized_layers(model.module))
    assert len(layers) == 14
    for path, layer in layers.items():
        _, _, index, _, part = path.split(".")
        stored = found[f"blk.{index}.{names[part]}.weight"]
        assert stored.tensor_type.name == kind
        assert facts.linears[path] == (kind, stored.data.nbytes)
        heads = {"q_proj": 4, "k_proj": 2}.get(part)
        read = gguf.dequantize(stored.data, stored.tensor_type)
        read = read if heads is None else in_halves(read, heads)
        wanted = layer.dequantized().double().numpy()
        if kind == "F32":
            np.testing.assert_array_equal(read, layer.dequantized().numpy())
            continue
        integers, _, _ = parts(stored.data, kind)
        np.testing.assert_array_equal(integers if heads is None else in_halves(integers, heads), layer.weight.numpy())
        assert np.abs(read - wanted).max() <= 2**-10 * np.abs(wanted).max()


def test_floats_stay_the_same_bits(tiny_llama, tmp_path):
    model = tiny_llama(tie_word_embeddings=False)
    export_gguf(model, tmp_path / "x.gguf")
    found, state = tensors(tmp_path / "x.gguf"), model.module.state_dict()
    for name, path in {
        "token_embd": "model.embed_tokens",
        "output": "lm_head",
        "output_norm": "model.norm",
        "blk.1.attn_norm": "model.layers.1.input_layernorm",
        "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm",
        "blk.1.ffn_down": "model.layers.1.mlp.down_proj",
    }.items():
        tensor = found[f"{name}.weight"]
        np.testing.assert_array_equal(tensor.data, state[f"{path}.weight"].numpy())
    turned = in_halves(found["blk.0.attn_k.weight"].data, 2)
    np.testing.assert_array_equal(turned, state["model.layers.0.self_attn.k_proj.weight"].numpy())
    assert len(found) == len(state)


def test_a_tied_head_is_stored_once(tiny_llama, tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    export_gguf(model, tmp_path / "float.gguf")
    assert "output.weight" not in tensors(tmp_path / "float.gguf")
    head = quantized(
        tiny_llama(tie_word_embeddings=True), 8, granularity="group", group_size=32, targets=("re:lm_head",), ignore=()
    )
    table = head.module.model.embed_tokens.weight
    assert torch.equal(table, head.module.lm_head.dequantized())
    export_gguf(head, tmp_path / "int8.gguf")
    found = tensors(tmp_path / "int8.gguf")
    assert "output.weight" not in found
    assert found["token_embd.weight"].tensor_type.name == "Q8_0"


def test_the_vocabulary_is_the_tokenizers(tiny_llama, tmp_path):
    model = tiny_llama(vocab_size=330)
    export_gguf(model, tmp_path / "x.gguf")
    found, tokenizer = metadata(tmp_path / "x.gguf"), model.tokenizer
    ids = range(len(tokenizer))
    assert found["tokenizer.ggml.tokens"][: len(ids)] == tokenizer.convert_ids_to_tokens(list(ids))
    assert found["tokenizer.ggml.tokens"][len(ids) :] == [f"[PAD{index}]" for index in range(len(ids), 330)]
    special, normal, unused = (gguf.TokenType[name] for name in ("CONTROL", "NORMAL", "UNUSED"))
    types = [special] * 6 + [normal] * (len(ids) - 6) + [unused] * (330 - len(ids))
    assert found["tokenizer.ggml.token_type"] == types
    assert found["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert found["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.add_bos_token"] is False


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def other_tokenizer(tokenizer, pre=None, normalizer=None, **options):
    """The same tokens, but another way to split text."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    whole["model"] |= options
    backend = Tokenizer.from_str(json.dumps(whole))
    if pre is not None:
        backend.pre_tokenizer = pre
    if normalizer is not None:
        backend.normalizer = normalizer
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


SPLITS = {
    "smollm": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        {},
    ),
    "llama-bpe": (split(rf"{WORDS}|\p{{N}}{{1,3}}{REST}"), {"ignore_merges": True}),
    "qwen2": (split(rf"{WORDS}|\p{{N}}{REST}"), {}),
}
UNKNOWN = {
    "Split, ByteLevel": (split(r"\s+"), {}),
    "Metaspace": (pre_tokenizers.Metaspace(), {}),
    "byte_fallback": (None, {"byte_fallback": True}),
    "Lowercase": (None, {"normalizer": normalizers.Lowercase()}),
}


@pytest.mark.parametrize("name", SPLITS)
def test_llama_cpp_knows_how_text_is_split(name, tiny_llama, tmp_path):
    pre, options = SPLITS[name]
    model = tiny_llama()
    model = replace(model, tokenizer=other_tokenizer(model.tokenizer, pre, **options))
    export_gguf(model, tmp_path / "x.gguf")
    assert metadata(tmp_path / "x.gguf")["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize("name", UNKNOWN)
def test_text_that_llama_cpp_would_split_in_another_way_is_refused(name, tiny_llama, tmp_path):
    pre, options = UNKNOWN[name]
    model = tiny_llama()
    model = replace(model, tokenizer=other_tokenizer(model.tokenizer, pre, **options))
    with pytest.raises(
        RecipeError, match=rf"^tokenizer: GGUF files are written with .*{name}.*; choose another backend$"
    ):
        export_gguf(model, tmp_path / "x.gguf")


def test_a_tokenizer_of_another_kind_is_refused(tiny_llama, tmp_path):
    model = tiny_llama()
    word = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(RecipeError, match=r"^tokenizer: .* found 'the model WordLevel'"):
        export_gguf(replace(model, tokenizer=word), tmp_path / "x.gguf")
    with pytest.raises(RecipeError, match=r"^tokenizer: it has more tokens than the embedding has rows, 300, found 3"):
        export_gguf(tiny_llama(vocab_size=300), tmp_path / "x.gguf")


def test_what_a_file_cannot_hold_is_refused_in_one_line(tiny_llama, tmp_path):
    def refused(model):
        with pytest.raises(RecipeError) as raised:
            export_gguf(model, tmp_path / "x.gguf")
        assert not (tmp_path / "x.gguf").exists()
        return str(raised.value)

    groups = quantized(tiny_llama(), 4, granularity="group", group_size=16)
    assert "model.layers.0.self_attn.q_proj: blocks of GGUF hold 32 input features" in refused(groups)
    large = quantized(tiny_llama(), 8)
    large.module.model.layers[1].mlp.up_proj.scale[3] = 7e4
    assert "mlp.up_proj: a scale is more than float16 can hold, which GGUF stores, found 70000.0" in refused(large)
    ranks = tiny_llama()
    factored(ranks.module, "model.layers.0.mlp.down_proj", 16)
    assert "down_proj: GGUF holds linear layers of one matrix, found 'LowRankLinear'" in refused(ranks)
    uneven = tiny_llama()
    narrow(uneven.module.model.layers[0].mlp, 96)
    assert "LlamaForCausalLM: llama.cpp gives all layers of this architecture one shape" in refused(uneven)
    assert "knows no such hidden_act, found 'gelu'" in refused(tiny_llama(hidden_act="gelu"))
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "knows no such rope_type, found 'dynamic'" in refused(tiny_llama(rope_parameters=rope))
    assert "knows no such architecture, found 'gpt2'" in refused(
        other(transformers.GPT2Config(vocab_size=160, n_embd=64, n_layer=2, n_head=4), tmp_path / "weights")
    )
    biased = transformers.Qwen3Config(**SHAPE, attention_bias=True)
    assert "knows no such bias, found 'model.layers.0.self_attn.o_proj'" in refused(other(biased, tmp_path / "biased"))


def test_lowering_says_which_kernel_runs_or_why_none_can():
    tags = {
        "task:causal-lm",
        "arch:llama",
        "weights:float",
        "weights:int4-group-asym",
        "weights:int8-channel-asym",
        "weights:fp8-channel",
        "weights:bnb-nf4",
        "activations:int4",
        "kv:int8-head",
        "shape:pruned",
        "pruned:rank",
    }
    lowered = BACKEND.lowering(frozenset(tags))
    assert (lowered["weights:int4-group-asym"].kernel, lowered["weights:int4-group-asym"].native) == (
        "MUL_MAT (Q4_1 weights)",
        True,
    )
    assert {tag for tag, how in lowered.items() if how.possible and not how.native} == {
        "weights:int8-channel-asym",
        "weights:fp8-channel",
    }
    refused = {tag for tag, how in lowered.items() if not how.possible}
    assert refused == {"weights:bnb-nf4", "activations:int4", "kv:int8-head", "shape:pruned", "pruned:rank"}
    assert all(how.reason for how in lowered.values() if not how.native)
    others = BACKEND.lowering(frozenset({"task:feature-extraction", "arch:bert"}))
    assert not any(how.possible for how in others.values())
    dynamic = {"weights:int8-channel", "activations:int8-dynamic"}
    assert BACKEND.lowering(frozenset(dynamic))["activations:int8-dynamic"].native
    floats = frozenset({"weights:int8-channel-asym", "activations:int8-dynamic"})
    assert not BACKEND.lowering(floats)["activations:int8-dynamic"].possible


# Sessions.


@running
@pytest.mark.parametrize("name", [None, "Q8_0", "Q4_0", "Q4_1"])
def test_it_conforms(name, tiny_llama):
    check_backend(BACKEND, tiny_llama() if name is None else quantized(tiny_llama(), **FORMATS[name]))


@pytest.fixture(scope="module")
def llama(tiny_llama, tmp_path_factory):
    model = tiny_llama()
    with opened(model, tmp_path_factory.mktemp("llama")) as session:
        yield model, session


@running
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_gives_the_logits_of_the_whole_text(llama, data):
    model, session = llama
    lengths = data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=4))
    sequences = [tuple(random.Random(seed).choices(range(300), k=length)) for seed, length in enumerate(lengths)]
    slots = data.draw(st.permutations(range(4)))
    done = [0] * len(sequences)
    found = [np.empty((0, session.caps.vocab_size), np.float32) for _ in sequences]
    while any(count < len(text) for count, text in zip(done, sequences, strict=True)):
        rows = []
        for i in data.draw(st.permutations(range(len(sequences)))):
            # Back by some tokens, as after a step that failed, and on by some, of which the last are filler.
            done[i] -= data.draw(st.integers(0, min(done[i], 3)))
            take = min(len(sequences[i]) - done[i], data.draw(st.sampled_from([64, 1, 5, 16, 0])))
            if take:
                padding = min(data.draw(st.sampled_from([0, 0, 4])), 64 - done[i] - take)
                text = sequences[i][done[i] : done[i] + take] + (7,) * padding
                rows.append(Row(i, text, done[i], (slots[i],), "all", padding))
        if rows:
            for row, logits in zip(rows, run(session, *rows), strict=True):
                found[row.sequence] = np.concatenate([found[row.sequence][: row.computed], logits])
                done[row.sequence] += len(row.tokens) - row.padding
    for text, logits in zip(sequences, found, strict=True):
        assert distance(logits, expected(model, text)) < TOLERANCE


@running
def test_only_the_wanted_logits_come_back(llama):
    whole, none, last = run(llama[1], Row(1, A, 0, (2,), "all"), Row(2, B, 0, (0,), "none"), Row(3, B[:1], 0, (3,)))
    assert distance(whole, expected(llama[0], A)) < TOLERANCE
    assert none.shape == (0, llama[0].module.config.vocab_size)
    assert distance(last, expected(llama[0], B[:1])) < TOLERANCE
    assert run(llama[1], Row(2, B, 0, (0,), "none"))[0].shape == none.shape


@running
def test_a_step_may_be_longer_than_a_run_of_llama_cpp(tiny_llama, tmp_path):
    model = tiny_llama(max_position_embeddings=1024)
    long = tuple(random.Random(0).choices(range(300), k=700))
    with opened(model, tmp_path, Limits(2, 1000)) as session:
        other, found = run(session, Row(2, B, 0, (0,)), Row(1, long, 0, (1,), "all"))
    assert distance(found, expected(model, long)) < TOLERANCE
    assert distance(other, expected(model, B)[-1:]) < TOLERANCE


@running
def test_blocks_can_be_read_written_and_copied(llama):
    model, session = llama
    run(session, Row(1, A[:20], 0, (2,), "none"), Row(2, B, 0, (1,), "none"))
    saved = session.read_blocks([2, 1])
    session.copy_blocks([(2, 3)])
    run(session, Row(1, B, 0, (2,), "none"))  # the copy is not of what comes later
    session.write_blocks([1, 0], saved)
    for slot in (3, 1):
        [found] = run(session, Row(3, A[20:], 20, (slot,), "all"))
        assert distance(found, expected(model, A)[20:]) < TOLERANCE
    [found] = run(session, Row(4, B[-1:], len(B) - 1, (0,)))
    assert distance(found, expected(model, B)[-1:]) < TOLERANCE
    # Of one size, whatever slots hold, also nothing.
    run(session, Row(1, B[:1], 0, (2,), "none"))
    assert session.read_blocks([2]).nbytes * 2 == saved.nbytes


@running
def test_an_empty_slot_empties_the_one_it_is_written_to(tiny_llama, tmp_path):
    with opened(tiny_llama(), tmp_path) as session:
        empty = session.read_blocks([0])
        run(session, Row(1, A, 0, (1,), "none"))
        session.write_blocks([1], empty)

        with pytest.raises(RuntimeError, match=r"^slot 1 holds 0 tokens, not 40$"):
            run(session, Row(1, (5,), 40, (1,)))


@running
def test_a_step_that_cannot_be_run_raises_and_can_be_followed(llama):
    model, session = llama
    with pytest.raises(RuntimeError, match=r"^llama_decode gave -1: .*invalid token"):
        run(session, Row(1, (5, 99999), 0, (0,)))
    with pytest.raises(RuntimeError, match=r"^slot 0 holds 0 tokens, not 17$"):
        run(session, Row(1, (5,), 17, (0,)))
    [found] = run(session, Row(1, B, 0, (0,), "all"))
    assert distance(found, expected(model, B)) < TOLERANCE


@running
def test_generates_what_transformers_generates(llama):
    engine = Engine(llama[1], Static(max_batch_size=2))
    ids = [engine.add(Request(prompt, SamplingParams(max_tokens=12, ignore_eos=True))) for prompt in (A, B)]
    output = {id: [] for id in ids}
    while engine.busy:
        for event in engine.step():
            output[event.request].append(event.token)
    for id, prompt in zip(ids, (A, B), strict=True):
        tokens = torch.tensor([prompt])
        whole = llama[0].module.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=12, min_new_tokens=12, do_sample=False
        )
        assert output[id] == whole[0, len(prompt) :].tolist()


ROPE3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE3 |= {"original_max_position_embeddings": 32}
ARCHITECTURES = {
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE | {"head_dim": 32}),
    "biases": lambda: transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "linear": lambda: transformers.LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama3": lambda: transformers.LlamaConfig(**SHAPE, rope_parameters=ROPE3),
}


@running
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_other_architectures_match_transformers(kind, tmp_path):
    model = other(ARCHITECTURES[kind](), tmp_path / "weights")
    for name, parameter in model.module.named_parameters():
        if name.endswith("bias") or "norm" in name:  # as training leaves them, not zeros and ones
            parameter.data += 0.1 * torch.randn_like(parameter)
    with opened(model, tmp_path / "runtime") as session:
        found = run(session, Row(1, A[:20], 0, (3,), "all"))
        found += (run(session, Row(2, B, 0, (1,)), Row(1, A[20:], 20, (3,), "all"))[1],)
    assert distance(np.concatenate(found), expected(model, A)) < TOLERANCE


@running
def test_a_window_bounds_the_length(tmp_path):
    model = other(transformers.MistralConfig(**SHAPE, sliding_window=17), tmp_path / "weights")
    files = compiled(model, tmp_path / "runtime")
    with pytest.raises(RecipeError, match=r"^the model takes 17 tokens, found 18; set max_length to 17 or less$"):
        BACKEND.open(files, files, Limits(1, 18))
    with BACKEND.open(files, files, Limits(1, 17)) as session:
        assert distance(run(session, Row(1, A[:17], 0, (0,), "all"))[0], expected(model, A[:17])) < TOLERANCE


@running
@pytest.mark.parametrize("name", FORMATS)
def test_quantized_models_give_what_their_modules_give(name, tiny_llama, tmp_path):
    plain, model = tiny_llama(), quantized(tiny_llama(), **FORMATS[name])
    lowered = BACKEND.lowering(model.tags)
    with opened(model, tmp_path) as session:
        found = run(session, Row(1, A[:30], 0, (0,), "all"))
        found += run(session, Row(1, A[30:], 30, (0,), "all"))
    lost = distance(np.concatenate(found), expected(model, A))
    assert lost <= max(how.tolerance for how in lowered.values())
    # Rounding to 8 bits by block is of the size of what the finest weights lose, not more.
    assert lost < max(distance(expected(model, A), expected(plain, A)), 0.02)


def tokenized(file, text):
    """As llama.cpp's own tokenizer has it."""
    import llama_cpp

    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    try:
        return model.tokenize(text.encode(), add_bos=False, special=True)
    finally:
        model.close()


TEXT = "The capital\tof France is Paris,  isn't it?\n\n 3 + 14 = 17; we'll see: été 🚀\r\n<s>x</s>"


@running
@pytest.mark.parametrize("name", ["gpt-2", *SPLITS])
def test_llama_cpp_splits_text_as_the_tokenizer_does(name, tiny_llama, tmp_path):
    model = tiny_llama()
    if name in SPLITS:
        pre, options = SPLITS[name]
        model = replace(model, tokenizer=other_tokenizer(model.tokenizer, pre, **options))
    export_gguf(model, tmp_path / "x.gguf")
    assert tokenized(tmp_path / "x.gguf", TEXT) == model.tokenizer(TEXT, add_special_tokens=False)["input_ids"]


@running
def test_profile_names_every_linear_layer(llama):
    model, session = llama
    run(session, Row(2, B, 0, (3,), "none"))
    plan = (Row(1, A, 0, (0,)), Row(2, (7,), len(B), (3,)))
    times = session.profile(StepPlan(plan))
    linears = {name: layer for name, layer in model.module.named_modules() if isinstance(layer, nn.Linear)}
    found = {time.layer: time for time in times if time.kernel == "MUL_MAT (F32 weights)"}
    assert set(found) == set(linears)
    assert all(found[name].weight_bytes == layer.weight.nbytes for name, layer in linears.items())
    assert any("ROPE" in time.kernel for time in times)
    # The step counts as run.
    [logits] = run(session, Row(1, (50,), len(A), (0,)))
    assert distance(logits, expected(model, (*A, 50))[-1:]) < TOLERANCE


@running
@pytest.mark.parametrize("harm", HARMS)
def test_damaged_files_are_refused_in_one_line(harm, tiny_llama, tmp_path, capfd):
    files = compiled(tiny_llama(), tmp_path / "runtime")
    model, facts = files / "model.gguf", files / "session.json"
    damage(harm, model, facts)
    with pytest.raises(DamagedError) as raised:
        BACKEND.open(files, files, LIMITS)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


@running
def test_a_file_that_ends_too_early_is_said_by_llama_cpp_too(tiny_llama, tmp_path):
    from optkit_backends.llama_cpp.runtime import Weights

    files = compiled(tiny_llama(), tmp_path / "runtime")
    (tmp_path / "cut.gguf").write_bytes((files / "model.gguf").read_bytes()[:-4096])
    with pytest.raises(DamagedError, match=r"cut\.gguf: llama-cpp-python \S+ cannot load it: .*(bounds|incomplete)"):
        Weights(tmp_path / "cut.gguf")


@running
def test_nothing_is_written_to_the_terminal(tiny_llama, tmp_path, capfd):
    with opened(tiny_llama(), tmp_path) as session:
        run(session, Row(1, A, 0, (0,)))
    assert capfd.readouterr() == ("", "")


@running
def test_too_many_sequences_are_cut_to_what_llama_cpp_takes(tiny_llama, tmp_path):
    files = compiled(tiny_llama(), tmp_path)
    with BACKEND.open(files, files, Limits(300, 16)) as session:
        assert session.caps.blocks == session.caps.max_batch_size == 256
        assert run(session, *(Row(i, (i,), 0, (i,)) for i in range(256)))[255].shape == (1, session.caps.vocab_size)
    with pytest.raises(MachineError, match=r"^one sequence takes up to 64 tokens of KV cache, found 63"):
        BACKEND.open(files, files, Limits(1, 64, kv_cache_tokens=63))
    with BACKEND.open(files, files, Limits(8, 64, kv_cache_tokens=200)) as session:
        assert session.caps.blocks == 3


@running
def test_a_session_needs_no_torch(tiny_llama, tmp_path):
    files = compiled(tiny_llama(), tmp_path)
    code = (
        "import sys; from pathlib import Path; from optkit.steps import Limits;"
        "from optkit_backends.llama_cpp import LlamaCpp;"
        f"folder = Path({str(files)!r}); LlamaCpp().open(folder, folder, Limits(1, 8)).close();"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The real model.


def chat(model):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def answer(file):
    """What llama.cpp's own loop makes of a question, greedily, with the file's vocabulary and chat template."""
    import llama_cpp

    model = llama_cpp.Llama(str(file), n_ctx=256, verbose=False)
    try:
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        found = model.create_chat_completion(messages, temperature=0, max_tokens=16)
    finally:
        model.close()
    return found["choices"][0]["message"]["content"]


@running
@pytest.mark.slow
def test_a_real_model_goes_back_into_the_file_that_it_came_from(smollm2, tmp_path):
    model, theirs = GGUF(file=str(smollm2)).load(), tensors(smollm2)
    # Its embedding and head are one Q8_0 matrix. Minima of its Q4_1 layers are not multiples of the scales, so that
    # these stay float32 here.
    integers, scale, _ = parts(theirs["token_embd.weight"].data, "Q8_0")
    stored = torch.from_numpy(integers), torch.from_numpy(scale.astype(np.float32))
    replace_module(model.module, "lm_head", QuantizedLinear(*stored, None, None, WeightScheme(8, 32, True)))
    export_gguf(model, tmp_path / "x.gguf")
    ours = tensors(tmp_path / "x.gguf")
    assert set(ours) == set(theirs)
    np.testing.assert_array_equal(ours["token_embd.weight"].data, theirs["token_embd.weight"].data)
    for name, tensor in theirs.items():
        wanted = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(gguf.dequantize(ours[name].data, ours[name].tensor_type), wanted)
    found, wanted = metadata(tmp_path / "x.gguf"), metadata(smollm2)
    same = {name for name in wanted if name.startswith(("tokenizer.", "llama."))}
    assert {name: found[name] for name in same} == {name: wanted[name] for name in same}
    assert answer(tmp_path / "x.gguf") == answer(smollm2)


@running
@pytest.mark.slow
@pytest.mark.parametrize("name", ["float", "Q8_0", "Q4_0", "Q4_1"])
def test_a_real_model_keeps_to_the_tolerance(name, smollm2, tmp_path):
    model = GGUF(file=str(smollm2)).load()
    model = model if name == "float" else quantized(model, **FORMATS[name])
    lowered, text = BACKEND.lowering(model.tags), chat(model)
    with opened(model, tmp_path) as session:
        found = run(session, Row(1, text[:30], 0, (2,), "all")) + run(session, Row(1, text[30:], 30, (2,), "all"))
    lost = distance(np.concatenate(found), expected(model, text))
    assert lost < max(how.tolerance for how in lowered.values()) / 1.5
