"""quantize.kv_cache against float64, against what transformers caches, and in the folders that transformers loads."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from optkit.builtin.huggingface import HuggingFace
from optkit.calibration import Calibration
from optkit.checkpoints import Checkpoint
from optkit.errors import DamagedError, OptkitError, RecipeError
from optkit.kv import attention_layers, compress, decompress, round_cache, rounding_layers, stop_rounding
from optkit.model import Model
from optkit.schemes import BFLOAT16_CACHE, CACHE_ENTRY, CacheScheme
from optkit.transforms import TransformContext
from optkit.weights import load_folder, save_folder
from optkit_quantize.kv_cache import KVCache
from optkit_quantize.rtn import RTN
from tests.calibrating import texts

TOKENS = torch.arange(3, 40)[None]
SCHEMES = [(dtype, granularity) for dtype in ("int8", "fp8") for granularity in ("head", "tensor")]
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
E4M3 = np.unique(E4M3[np.isfinite(E4M3)])


def context(calibration: Calibration | None = None, checkpoint: Checkpoint | None = None) -> TransformContext:
    return TransformContext(lambda *_: None, calibration or texts(30, 17, 24), checkpoint or Checkpoint())


def cached(module, batch):
    """What transformers keeps of a batch: keys and values of each layer, `[heads, tokens, dim]`."""
    cache = transformers.DynamicCache()
    module(**batch, past_key_values=cache)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


@given(
    heads=st.integers(1, 3),
    tokens=st.integers(1, 4),
    kind=st.sampled_from(["int", "float"]),
    shared=st.booleans(),
    size=st.sampled_from([1e-20, 1.0, 1e6]),
    outlier=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rounding_agrees_with_the_reference(heads, tokens, kind, shared, size, outlier, seed):
    generator = np.random.default_rng(seed)
    values = (generator.normal(size=(heads, tokens, 8)) * size).astype(np.float32)
    if outlier:
        values[0, 0, 0] = 1000 * size  # beyond what calibration saw
    scale = np.array([(0.5 + generator.random()) * size / 100 for _ in range(1 if shared else heads)], np.float32)
    scheme = CacheScheme(kind, "tensor" if shared else "head")
    given_scale = torch.from_numpy(scale) if shared else torch.from_numpy(scale).view(-1, 1, 1)
    kept = compress(torch.from_numpy(values), given_scale, scheme)
    assert (kept.shape, kept.dtype) == (values.shape, scheme.dtype)
    read = decompress(kept, given_scale).double().numpy()
    stored = kept.double().numpy()
    for head, token, channel in np.ndindex(values.shape):
        step = float(scale[0 if shared else head])
        quotient = float(values[head, token, channel]) / step
        if kind == "int":
            wanted = min(max(round(quotient), -128), 127)
            near_half = abs(abs(quotient - np.floor(quotient)) - 0.5) < 1e-4
            assert abs(stored[head, token, channel] - wanted) <= near_half
        else:
            quotient = min(max(quotient, -448.0), 448.0)
            distances = np.sort(abs(E4M3 - quotient))
            found = abs(stored[head, token, channel] - quotient)
            assert found <= distances[0] + 1e-6 * abs(quotient)
        assert read[head, token, channel] == pytest.approx(stored[head, token, channel] * step, rel=1e-6)


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=1, max_size=20),
    bits=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=20),
)
def test_bfloat16_is_the_nearest_number_with_ties_to_even(values, bits):
    # Numbers half way between two, and their neighbours, besides any.
    halves = (np.array(bits, np.uint32) << 16 | 0x8000)[:, None] + np.array([-1, 0, 1])
    halves = halves.astype(np.uint32).view(np.float32).ravel()
    given = np.concatenate([np.array(values, np.float32), halves[np.isfinite(halves) & (abs(halves) > 1e-37)]])
    kept = compress(torch.from_numpy(given), None, BFLOAT16_CACHE)
    assert kept.dtype is torch.bfloat16
    fraction, exponent = np.frexp(given.astype(np.float64))
    wanted = np.ldexp(np.rint(fraction * 256) / 256, exponent)
    wanted[abs(wanted) >= 2.0**128] *= np.inf
    np.testing.assert_array_equal(decompress(kept, None).double().numpy(), wanted)


@pytest.mark.parametrize(("dtype", "granularity"), SCHEMES)
def test_scales_cover_what_is_cached_after_the_layers_before_were_rounded(tiny_llama, dtype, granularity):
    calibration = texts(30, 17)
    model = KVCache(dtype=dtype, granularity=granularity).apply(tiny_llama(), context(calibration))
    reference, layers = tiny_llama().module, dict(rounding_layers(model.module))
    assert list(layers) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for index, (path, layer) in enumerate(layers.items()):
        seen = [cached(reference, batch)[index] for batch in calibration.inputs]
        for part, name in enumerate(("k_scale", "v_scale")):
            largest = np.max([pair[part].abs().amax((1, 2)).double().numpy() for pair in seen], axis=0)
            wanted = (largest if granularity == "head" else largest.max(keepdims=True)) / (
                448 if dtype == "fp8" else 127.5
            )
            scale = getattr(layer, name)
            assert scale.shape == ((2, 1, 1) if granularity == "head" else (1,))
            np.testing.assert_allclose(scale.flatten().numpy(), wanted, rtol=1e-6)
        round_cache(reference.get_submodule(path), layer.cache_scheme, layer.k_scale, layer.v_scale)
    assert f"kv:{dtype}-{granularity}" in model.tags


def test_a_head_without_numbers_has_scale_one(tiny_llama):
    model = tiny_llama()
    model.module.model.layers[0].self_attn.v_proj.weight.zero_()
    model = KVCache().apply(model, context())
    assert model.module.model.layers[0].self_attn.v_scale.flatten().tolist() == [1, 1]


@pytest.mark.parametrize(("dtype", "granularity"), [*SCHEMES, ("bfloat16", None)])
def test_the_model_computes_with_rounded_keys_and_values(tiny_llama, dtype, granularity):
    exact = tiny_llama().module(TOKENS).logits
    model = KVCache(dtype=dtype, granularity=granularity).apply(tiny_llama(), context())
    whole = model.module(TOKENS, use_cache=False).logits
    cache = transformers.DynamicCache()
    parts = [model.module(part, past_key_values=cache).logits for part in TOKENS.split([20, 1, 16], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4 * whole.abs().max().item())
    distance = ((whole - exact).norm() / exact.norm()).item()
    assert 1e-4 < distance < {"int8": 0.05, "fp8": 0.1, "bfloat16": 0.02}[dtype]
    for keys, values in cached(model.module, {"input_ids": TOKENS}):
        if dtype == "bfloat16":
            assert all(torch.equal(part.bfloat16().float(), part) for part in (keys, values))
        else:
            assert max(len(head.unique()) for head in (*keys, *values)) <= 256
    stop_rounding(model.module)
    assert torch.equal(model.module(TOKENS).logits, exact)


def test_bfloat16_needs_no_data_and_is_read_again(tiny_llama, tmp_path):
    options = KVCache(dtype="bfloat16")
    assert (options.calibration, options.forward_passes(), options.provides()) == (False, 0, {"kv:bfloat16"})
    assert (KVCache().calibration, KVCache().scheme.granularity) == (True, "head")
    model = options.apply(tiny_llama(), TransformContext(lambda *_: None))
    assert not any(name.endswith("_scale") for name in model.module.state_dict())
    wanted = model.module(TOKENS).logits
    save_folder(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config[CACHE_ENTRY] == "bfloat16"
    assert "quantization_config" not in config
    card = HuggingFace(model=str(tmp_path)).inspect()
    assert card.tags == model.tags
    again = load_folder(tmp_path, tags=model.tags)
    assert torch.equal(again.module(TOKENS).logits, wanted)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(theirs(TOKENS).logits, tiny_llama().module(TOKENS).logits)


@pytest.mark.parametrize("weights", [None, {}, {"bits": 4, "granularity": "group", "group_size": 32}], ids=str)
@pytest.mark.parametrize(("dtype", "granularity"), SCHEMES)
def test_folders_keep_it_here_and_in_transformers(tiny_llama, tmp_path, dtype, granularity, weights):
    model = tiny_llama() if weights is None else RTN(**weights).apply(tiny_llama(), context())
    model = KVCache(dtype=dtype, granularity=granularity).apply(model, context())
    wanted = model.module(TOKENS).logits
    save_folder(model, tmp_path)
    args = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert {key: args[key] for key in ("num_bits", "type", "strategy", "symmetric", "dynamic")} == {
        "num_bits": 8,
        "type": "int" if dtype == "int8" else "float",
        "strategy": "attn_head" if granularity == "head" else "tensor",
        "symmetric": True,
        "dynamic": False,
    }
    again = load_folder(tmp_path, tags=model.tags)
    assert torch.equal(again.module(TOKENS).logits, wanted)
    assert not hasattr(again.module.config, "quantization_config")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert theirs.model.layers[1].self_attn.k_scale.shape == model.module.model.layers[1].self_attn.k_scale.shape
    assert ((theirs(TOKENS).logits - wanted).norm() / wanted.norm()).item() < 1e-5
    card = HuggingFace(model=str(tmp_path)).inspect()
    assert card.tags == model.tags
    assert card.parameters == sum(parameter.numel() for parameter in tiny_llama().module.parameters())
    save_folder(again, tmp_path / "twice")
    assert torch.equal(load_folder(tmp_path / "twice").module(TOKENS).logits, wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dynamic": True, "strategy": "tensor"}, "dynamic or asymmetric"),
        ({"symmetric": False}, "dynamic or asymmetric"),
        ({"num_bits": 4}, "4 bits, int, attn_head"),
        ({"strategy": "channel"}, "8 bits, int, channel"),
        ({"strategy": "tensor"}, r"k_scale has the shape \(2, 1, 1\)"),
    ],
    ids=str,
)
def test_caches_of_another_kind_are_refused(tiny_llama, tmp_path, change, words):
    save_folder(KVCache().apply(tiny_llama(), context()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedError, match=words):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    ("kept", "entry"), [("bfloat16", "float8"), ("bfloat16", {"num_bits": 16}), ("int8", "bfloat16")], ids=str
)
def test_an_entry_of_another_kind_is_refused(tiny_llama, tmp_path, kept, entry):
    save_folder(KVCache(dtype=kept).apply(tiny_llama(), context()), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {CACHE_ENTRY: entry}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DamagedError, match=r"optkit_kv_cache is .*optkit has bfloat16, in place of kv_cache_scheme"):
        load_folder(tmp_path)


def test_bfloat16_goes_with_quantized_weights(tiny_llama, tmp_path):
    model = RTN(bits=4, granularity="group", group_size=32).apply(tiny_llama(), context())
    model = KVCache(dtype="bfloat16").apply(model, context())
    wanted = model.module(TOKENS).logits
    save_folder(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config[CACHE_ENTRY], config["quantization_config"]["kv_cache_scheme"]) == ("bfloat16", None)
    again = load_folder(tmp_path, tags=model.tags)
    assert torch.equal(again.module(TOKENS).logits, wanted)
    assert HuggingFace(model=str(tmp_path)).inspect().tags == model.tags


def test_a_run_that_was_cut_off_goes_on_and_gives_the_same(tiny_llama, tmp_path):
    def make():
        return tiny_llama(num_hidden_layers=4)

    class Cut(Exception):
        pass

    def stop(done, total, what):
        if done == 2:
            raise Cut

    whole = KVCache().apply(make(), context())
    cut = TransformContext(stop, context().calibration, Checkpoint(tmp_path))
    with pytest.raises(Cut):
        KVCache().apply(make(), cut)
    resumed = KVCache().apply(make(), context(checkpoint=Checkpoint(tmp_path)))
    assert torch.equal(resumed.module(TOKENS).logits, whole.module(TOKENS).logits)
    names = [name for name in whole.module.state_dict() if name.endswith(("k_scale", "v_scale"))]
    assert len(names) == 8
    for name in names:
        assert torch.equal(resumed.module.state_dict()[name], whole.module.state_dict()[name])


def test_a_key_that_is_not_finite_is_refused_by_its_layer(tiny_llama):
    model = tiny_llama()
    model.module.model.layers[1].self_attn.k_proj.weight[3, 3] = float("nan")
    with pytest.raises(OptkitError, match=r"^model\.layers\.1\.self_attn: a key or value is not finite"):
        KVCache().apply(model, context())


def test_encoders_and_models_without_such_a_cache_are_refused(tiny_encoder):
    assert not KVCache.requires <= HuggingFace(model=str(tiny_encoder)).inspect().tags
    config = transformers.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, state_size=4)
    mamba = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert not attention_layers(mamba)
    with pytest.raises(OptkitError, match=r"^MambaForCausalLM: has no attention"):
        KVCache().apply(Model(mamba, None, frozenset()), context())


def test_latent_attention_is_refused_when_planned_and_when_applied(tmp_path):
    config = transformers.DeepseekV3Config(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    )
    model = Model(transformers.AutoModelForCausalLM.from_config(config).eval(), None, frozenset())
    save_folder(model, tmp_path)
    card = HuggingFace(model=str(tmp_path)).inspect()
    for refused in (lambda: KVCache().check(card), lambda: KVCache().apply(model, context())):
        with pytest.raises(RecipeError, match=r"caches latents.*kv_a_proj_with_mqa'; leave kv_cache out"):
            refused()


@pytest.mark.parametrize(
    "options",
    [{"dtype": "int4"}, {"granularity": "channel"}, {"bits": 8}, {"dtype": "bfloat16", "granularity": "head"}],
    ids=str,
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValidationError):
        KVCache(**options)


def test_comes_once(tiny_llama):
    from fnmatch import fnmatchcase

    tags = KVCache(dtype="fp8").apply(tiny_llama(), context()).tags
    assert any(fnmatchcase(tag, pattern) for tag in tags for pattern in KVCache.conflicts)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "most"), [("int8", 1.01), ("fp8", 1.02), ("bfloat16", 1.002)])
def test_a_real_model_predicts_nearly_as_well(smollm2, dtype, most):
    from optkit.builtin.gguf import GGUF
    from optkit.builtin.texts import PythonReference
    from optkit.evaluate import every_window, windows

    model = GGUF(file=str(smollm2)).load()
    judged = windows(model.tokenizer, PythonReference(), 2048, 512)
    late = list(every_window(model.tokenizer, PythonReference(), 512))[-4::2]

    def perplexity() -> float:
        with torch.inference_mode():
            losses = [
                torch.nn.functional.cross_entropy(model.module(row[None], use_cache=False).logits[0, :-1], row[1:])
                for row in map(torch.tensor, judged)
            ]
        return torch.stack(losses).mean().exp().item()

    exact = perplexity()
    ids = [torch.tensor([window]) for window in late]
    calibration = Calibration(tuple({"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids))
    KVCache(dtype=dtype).apply(model, context(calibration))
    assert 0.99 < perplexity() / exact < most
