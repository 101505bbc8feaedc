"""GGUF files beside the models that they come from."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from optkit.builtin.gguf import GGUF
from optkit.errors import RecipeError
from optkit.quantized import QuantizedLinear, WeightScheme, quantized_layers, replace_module
from optkit_backends.llama_cpp import LlamaCpp
from optkit_backends.llama_cpp.export import export_gguf
from optkit_backends.llama_cpp.formats import blocks, stored_as
from tests.architectures import SHAPE, other
from tests.gguf_files import FORMATS, SPLITS, metadata, other_tokenizer, parts, quantized, split, tensors
from tests.shaping import factored, narrow

UNKNOWN = {
    "Split, ByteLevel": (split(r"\s+"), {}),
    "Metaspace": (pre_tokenizers.Metaspace(), {}),
    "byte_fallback": (None, {"byte_fallback": True}),
    "Lowercase": (None, {"normalizer": normalizers.Lowercase()}),
}
running = pytest.mark.skipif(LlamaCpp().unavailable() is not None, reason=str(LlamaCpp().unavailable()))


def in_halves(rows, heads):
    """Rows of a query or key in transformers' order, from those of llama.cpp, which has each pair side by side."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


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


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_holds_the_weights_of_the_model(name, tiny_llama, tmp_path):
    kind = name.partition("-")[0]
    model = quantized(tiny_llama(), **FORMATS[name])
    [tag] = [tag for tag in model.tags if tag.startswith("weights:int")]
    how = LlamaCpp().lowering(model.tags)[tag]
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
