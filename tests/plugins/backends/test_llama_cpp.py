"""The llama_cpp backend: its sessions beside transformers."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from optkit.builtin.gguf import GGUF
from optkit.engine import Engine, Request, SamplingParams
from optkit.errors import DamagedError, MachineError, RecipeError
from optkit.steps import Limits, Row, StepPlan
from optkit.testing import check_backend
from optkit_backends.llama_cpp import LlamaCpp
from optkit_batching.static import Static
from tests.architectures import SHAPE, other
from tests.damaging import HARMS, damage
from tests.gguf_files import FORMATS, quantized

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


def expected(model, tokens):
    with torch.inference_mode():
        return model.module(torch.tensor([tokens])).logits[0].numpy()


def distance(found, wanted):
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def run(session, *rows):
    return session.execute(StepPlan(rows)).logits


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


def chat(model):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])


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
