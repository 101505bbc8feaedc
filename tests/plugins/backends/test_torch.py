"""The torch session against transformers: every shape of step gives the logits of the whole sequence."""

from __future__ import annotations

import random

import numpy as np
import psutil
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optkit import hardware
from optkit.engine import Engine, Request, SamplingParams
from optkit.errors import MachineError, RecipeError
from optkit.hardware import Memory
from optkit.steps import Limits, Row, StepPlan
from optkit.transforms import TransformContext
from optkit.weights import save_folder
from optkit_backends.torch import Torch
from optkit_backends.torch.attention import GATHERED
from optkit_batching.static import Static
from optkit_quantize.rtn import RTN
from tests.architectures import OTHERS, SHAPE, other
from tests.scheduling import in_any_steps

A, B, C = tuple(range(10, 50)), tuple(range(40, 47)), tuple(range(5, 18))
LIMITS = Limits(max_batch_size=4, max_length=64)
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
REFUSED = {
    "softcap": lambda: transformers.Gemma2Config(**SHAPE),
    "s_aux": lambda: transformers.GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "0 use transformers' attention interface": lambda: transformers.MambaConfig(
        vocab_size=160, hidden_size=64, num_hidden_layers=2, state_size=8
    ),
    "1 use transformers' attention interface": lambda: transformers.Qwen3NextConfig(
        **SHAPE, layer_types=["linear_attention", "full_attention"]
    ),
    "type chunked_attention": lambda: transformers.Llama4TextConfig(
        **SHAPE, attention_chunk_size=8, intermediate_size_mlp=64, num_local_experts=2
    ),
}


@pytest.fixture(scope="module")
def opened(tiny_llama, tmp_path_factory):
    model = tiny_llama()
    weights = tmp_path_factory.mktemp("weights")
    save_folder(model, weights)
    return model, weights


@pytest.fixture(scope="module")
def session(opened):
    with Torch().open(opened[1], opened[1], LIMITS) as session:
        yield session


@pytest.fixture
def free(monkeypatch):
    """Sets how much memory the machine says it has free."""

    def set_free(size):
        monkeypatch.setattr(hardware, "memory", lambda: Memory(1 << 40, size))

    return set_free


def expected(model, tokens):
    with torch.inference_mode():
        return model.module(torch.tensor([tokens])).logits[0].numpy()


def close(actual, wanted):
    assert actual.shape == wanted.shape
    assert actual.dtype == np.float32
    assert np.linalg.norm(actual - wanted) <= 1e-5 * np.linalg.norm(wanted)


def run(session, *rows):
    return session.execute(StepPlan(rows)).logits


def test_ragged_prompts_in_scattered_blocks(opened, session):
    whole, last, none = run(
        session, Row(1, A, 0, (13, 2, 7), "all"), Row(2, B, 0, (15,)), Row(3, C, 0, (0, 1, 3, 4), "none")
    )
    close(whole, expected(opened[0], A))
    close(last, expected(opened[0], B)[-1:])
    assert none.shape == (0, opened[0].module.config.vocab_size)


def test_chunks_decoding_and_scoring_share_a_step(opened, session):
    run(session, Row(1, A[:18], 0, (9, 1), "none"), Row(2, B, 0, (2,)), Row(4, C[:12], 0, (4,)))
    chunk, decoded, scored, short = run(
        session,
        Row(1, A[18:35], 18, (9, 1, 0), "all"),
        Row(2, (50,), 7, (2,)),
        Row(3, A, 0, (12, 11, 10), "all"),
        Row(4, C[12:], 12, (4,)),
    )
    close(chunk, expected(opened[0], A[:35])[18:])
    close(decoded, expected(opened[0], (*B, 50))[-1:])
    close(scored, expected(opened[0], A))
    close(short, expected(opened[0], C)[-1:])


def test_a_step_without_any_logits_fills_the_cache(opened, session):
    (nothing,) = run(session, Row(1, A[:20], 0, (5, 6), "none"))
    assert nothing.shape[0] == 0
    close(run(session, Row(1, A[20:21], 20, (5, 6)))[0], expected(opened[0], A[:21])[-1:])


def test_rows_share_the_blocks_of_a_prefix(opened, session):
    run(session, Row(1, A[:32], 0, (8, 3), "none"))
    mine, yours = (*A[:32], 7, 8, 9), (*A[:32], 60)
    found = run(session, Row(1, mine[32:], 32, (8, 3, 0), "all"), Row(2, yours[32:], 32, (8, 3, 14), "all"))
    close(found[0], expected(opened[0], mine)[32:])
    close(found[1], expected(opened[0], yours)[32:])


def test_copied_blocks_go_their_own_way(opened, session):
    run(session, Row(1, A[:20], 0, (0, 1), "none"))
    session.copy_blocks([(1, 6), (0, 9)])
    run(session, Row(1, (99,) * 10, 20, (0, 1)))
    close(run(session, Row(2, A[20:30], 20, (9, 6), "all"))[0], expected(opened[0], A[:30])[20:])
    session.copy_blocks([])


def test_blocks_that_were_read_go_on_elsewhere(session):
    run(session, Row(1, A[:20], 0, (4, 2), "none"))
    saved = session.read_blocks([2, 4])
    (before,) = run(session, Row(1, A[20:], 20, (4, 2, 7), "all"))
    run(session, *(Row(i, (3,) * 64, 0, tuple(range(4 * i, 4 * i + 4)), "none") for i in range(4)))
    session.write_blocks([15, 3], saved)
    np.testing.assert_array_equal(session.read_blocks([15, 3]), saved)
    (after,) = run(session, Row(1, A[20:], 20, (3, 15, 0), "all"))
    np.testing.assert_array_equal(after, before)


def test_a_step_that_failed_runs_again_whole_or_in_parts(opened, session, monkeypatch):
    run(session, Row(1, A[:18], 0, (0, 1), "none"), Row(2, B, 0, (2,)))
    rows = Row(1, A[18:30], 18, (0, 1), "all"), Row(2, (50,), 7, (2,))
    second = session._module.model.layers[1]  # the first has written its keys and values by then
    monkeypatch.setattr(second, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(session, *rows)
    monkeypatch.undo()
    whole = run(session, *rows)
    close(whole[0], expected(opened[0], A[:30])[18:])
    close(run(session, Row(2, (51,), 7, (2,)))[0], expected(opened[0], (*B, 51))[-1:])
    for found, wanted in zip(run(session, *rows), whole, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_what_blocks_held_before_leaves_no_trace(opened, session):
    plan = (Row(1, A[:20], 0, (3, 9)), Row(2, B, 0, (1,)))
    more = (Row(1, A[20:21], 20, (3, 9)), Row(2, (50,), 7, (1,)))
    first = [*run(session, *plan), *run(session, *more)]
    junk = session.read_blocks(range(16))
    junk[:] = np.nan  # as a broken sequence would leave it
    session.write_blocks(range(16), junk)
    again = [*run(session, *plan), *run(session, *more)]
    for found, wanted in zip(again, first, strict=True):
        np.testing.assert_array_equal(found, wanted)
    session.write_blocks(range(16), np.zeros_like(junk))


def test_many_rows_of_different_lengths_decode_together(opened):
    lengths = [1, 200, 3, 120, 90, 7, 16, 33, 180, 64] + [15] * 6 + [150] * 16
    assert sum(lengths) > GATHERED
    generator = random.Random(0)
    texts = [tuple(generator.randrange(300) for _ in range(length + 1)) for length in lengths]
    ids = iter(generator.sample(range(32 * 13), 32 * 13))
    blocks = [tuple(next(ids) for _ in range(len(text) // 16 + 1)) for text in texts]
    with Torch().open(opened[1], opened[1], Limits(32, 208)) as session:
        run(session, *(Row(i, text[:-1], 0, blocks[i], "none") for i, text in enumerate(texts)))
        found = run(session, *(Row(i, text[-1:], len(text) - 1, blocks[i]) for i, text in enumerate(texts)))
    for text, logits in zip(texts, found, strict=True):
        close(logits, expected(opened[0], text)[-1:])


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_gives_the_logits_of_the_whole_text(opened, session, data):
    lengths = data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=4))
    texts = [tuple(random.Random(seed).choices(range(300), k=length)) for seed, length in enumerate(lengths)]
    found = in_any_steps(data, session, texts, 16)
    for text, (places, logits) in zip(texts, found, strict=True):
        close(logits, expected(opened[0], text)[places])


def test_generates_what_transformers_generates(opened, session):
    engine = Engine(session, Static(max_batch_size=3))
    ids = [engine.add(Request(p, SamplingParams(max_tokens=12, ignore_eos=True))) for p in (A, B, C)]
    output = {id: [] for id in ids}
    while engine.busy:
        for event in engine.step():
            output[event.request].append(event.token)
    for id, prompt in zip(ids, (A, B, C), strict=True):
        whole = opened[0].module.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
        )
        assert output[id] == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_and_windows_match_transformers(kind, tmp_path):
    model = other(OTHERS[kind](), tmp_path)
    with Torch().open(tmp_path, tmp_path, LIMITS) as session:
        found = run(session, Row(1, A[:20], 0, (5, 2), "all"))
        found += (run(session, Row(2, C, 0, (1,)), Row(1, A[20:35], 20, (5, 2, 9), "all"))[1],)
        for i in range(35, 40):
            found += run(session, Row(1, A[i : i + 1], i, (5, 2, 9)), Row(2, (50,), 13, (1,)))[:1]
        close(run(session, Row(3, A, 0, (15, 14, 13), "all"))[0], expected(model, A))
    close(np.concatenate(found), expected(model, A))


@pytest.mark.parametrize("reason", REFUSED)
def test_attention_of_another_kind_is_refused_in_one_line(reason, tmp_path):
    other(REFUSED[reason](), tmp_path)
    with pytest.raises(RecipeError, match=f"this model .*{reason}.*; choose another backend") as raised:
        Torch().open(tmp_path, tmp_path, LIMITS)
    assert "\n" not in str(raised.value)


def test_angles_that_change_with_other_texts_are_refused(tmp_path):
    other(transformers.LlamaConfig(**SHAPE, rope_parameters=DYNAMIC), tmp_path)
    with pytest.raises(RecipeError, match=r"beyond 128 tokens.* found 129; set max_length to 128 or less"):
        Torch().open(tmp_path, tmp_path, Limits(1, 129))
    Torch().open(tmp_path, tmp_path, Limits(1, 128)).close()


def test_integer_weights_give_their_reference(tiny_llama, tmp_path):
    model = RTN(bits=4, granularity="group", group_size=32).apply(
        tiny_llama(), TransformContext(progress=lambda done, total, what: None)
    )
    save_folder(model, tmp_path / "weights")
    with Torch().open(tmp_path, tmp_path / "weights", Limits(1, 64)) as session:
        close(run(session, Row(1, A, 0, (0, 1, 2), "all"))[0], expected(model, A))


def test_the_cache_holds_what_sequences_can_use_or_what_is_free(opened, free):
    block = 2 * 2 * 2 * 16 * 16 * 4  # layers, keys and values, heads, tokens, numbers, bytes

    def caps(limits):
        with Torch().open(opened[1], opened[1], limits) as session:
            return session.caps

    assert caps(Limits(3, 50)).blocks == 3 * 4
    assert (caps(LIMITS).kv, caps(LIMITS).block_size, caps(LIMITS).max_length) == ("paged", 16, 64)
    assert caps(LIMITS).max_batch_size == 4
    assert caps(Limits(2, 64, kv_cache_tokens=100)).blocks == 7
    free(10 * block)
    assert caps(Limits(1000, 64)).blocks == 8
    assert caps(Limits(1000, 64, kv_cache_tokens=160)).blocks == 10
    with pytest.raises(MachineError, match=r"cache of 161 tokens needs 88 KiB, and 80 KiB are free; lower kv_c"):
        caps(Limits(1000, 64, kv_cache_tokens=161))
    with pytest.raises(MachineError, match="takes up to 64 tokens of KV cache, found 48; raise kv_cache_tokens"):
        caps(Limits(1, 64, kv_cache_tokens=48))
    free(4 * block)
    with pytest.raises(
        MachineError, match=r"one sequence of 64 tokens needs 32 KiB .* and 25 KiB are .*; lower max_length"
    ):
        caps(Limits(1, 64))


def test_memory_is_committed_as_it_is_written(opened):
    before = psutil.Process().memory_info().rss
    with Torch().open(opened[1], opened[1], Limits(1, 1 << 20)) as session:
        run(session, Row(1, A, 0, (3, 4, 5)))
        grown = psutil.Process().memory_info().rss - before
        assert session.caps.blocks * session.read_blocks([0]).nbytes == 512 << 20
    assert grown < 100 << 20


def test_says_that_integers_are_dequantized():
    lowering = Torch().lowering(frozenset({"task:causal-lm", "arch:llama", "weights:float", "weights:int4-group"}))
    assert lowering["weights:float"].native
    assert not lowering["weights:int4-group"].native
    assert "dequantized" in lowering["weights:int4-group"].reason
    assert not Torch().lowering(frozenset({"task:vision"}))["task:vision"].possible


def test_profile_names_every_layer(opened, session):
    plan = StepPlan((Row(1, A, 0, (0, 1, 2)), Row(2, B[:1], 0, (3,))))
    times = session.profile(plan)
    layers = {time.layer: time for time in times}
    assert layers["model.layers.1.mlp.down_proj"].weight_bytes == 64 * 128 * 4
    assert layers["lm_head"].kernel == "Linear"
    assert "scaled_dot_product_attention" in layers["model.layers.1.self_attn"].kernel
    assert all(time.seconds >= 0 for time in times)
    order = [time.layer for time in times]
    assert order.index("model.layers.0.self_attn.v_proj") < order.index("model.layers.0.self_attn")
    close(session.execute(plan).logits[0], expected(opened[0], A)[-1:])
