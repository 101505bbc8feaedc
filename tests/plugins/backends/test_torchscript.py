"""The torchscript backend against transformers: decoders, encoders and convolutional networks, and its files."""

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

from optkit.engine import Engine, Request, SamplingParams
from optkit.engine.tensors import padded
from optkit.errors import DamagedError, RecipeError
from optkit.steps import Limits, Row, StepPlan, TensorSpec
from optkit_backends.torchscript import TorchScript
from optkit_backends.torchscript.tensors import TorchScriptTensorSession
from optkit_backends.torchscript.tracing import compile_decoder, compile_tensors
from optkit_batching.static import Static
from optkit_quantize.int8_dynamic import Int8Dynamic
from optkit_quantize.int8_static import Int8Static
from optkit_quantize.kv_cache import KVCache
from optkit_quantize.rtn import RTN
from tests.architectures import OTHERS, SHAPE, other
from tests.calibrating import context, texts
from tests.damaging import HARMS, damage
from tests.scheduling import in_any_steps

A, B = tuple(range(10, 50)), tuple(range(5, 18))
LIMITS = Limits(max_batch_size=4, max_length=64)
BACKEND = TorchScript()


def compiled(model, directory):
    directory.mkdir(exist_ok=True)
    BACKEND.compile(model, directory)
    return directory


def opened(model, directory, limits=LIMITS):
    return BACKEND.open(compiled(model, directory), directory, limits)


@pytest.fixture(scope="module")
def llama(tiny_llama, tmp_path_factory):
    model = tiny_llama()
    with opened(model, tmp_path_factory.mktemp("llama")) as session:
        yield model, session


@pytest.fixture(scope="module")
def bert(tiny_bert, tmp_path_factory):
    model = tiny_bert()
    return model, compiled(model, tmp_path_factory.mktemp("bert"))


def expected(model, tokens):
    with torch.inference_mode():
        return model.module(torch.tensor([tokens])).logits[0].numpy()


def distance(found, wanted):
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def run(session, *rows):
    return session.execute(StepPlan(rows)).logits


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_schedule_gives_the_logits_of_the_whole_text(llama, data):
    model, session = llama
    lengths = data.draw(st.lists(st.integers(1, 64), min_size=1, max_size=4))
    sequences = [tuple(random.Random(seed).choices(range(300), k=length)) for seed, length in enumerate(lengths)]
    found = in_any_steps(data, session, sequences, 16)
    for text, (places, logits) in zip(sequences, found, strict=True):
        assert not places or distance(logits, expected(model, text)[places]) < 1e-5


def test_only_the_wanted_logits_come_back(llama):
    whole, none, last = run(
        llama[1], Row(1, A, 0, (13, 2, 7), "all"), Row(2, B, 0, (15,), "none"), Row(3, B[:1], 0, (0,))
    )
    assert distance(whole, expected(llama[0], A)) < 1e-5
    assert none.shape == (0, llama[0].module.config.vocab_size)
    assert distance(last, expected(llama[0], B[:1])) < 1e-5


def test_blocks_can_be_read_written_and_copied(llama):
    model, session = llama
    run(session, Row(1, A[:20], 0, (4, 2), "none"))
    saved = session.read_blocks([2])
    session.copy_blocks([(4, 9)])
    session.write_blocks([11], saved)
    [found] = run(session, Row(2, A[20:], 20, (9, 11, 3), "all"))
    assert distance(found, expected(model, A)[20:]) < 1e-5


def test_what_blocks_held_before_leaves_no_trace(llama):
    session = llama[1]
    plan = (Row(1, A[:20], 0, (3, 9)), Row(2, B[:1], 0, (1,)))
    first = run(session, *plan)
    junk = session.read_blocks(range(16))
    session.write_blocks(range(16), np.full_like(junk, np.nan))
    for found, wanted in zip(run(session, *plan), first, strict=True):
        np.testing.assert_array_equal(found, wanted)
    session.write_blocks(range(16), np.zeros_like(junk))


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


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_and_windows_match_transformers(kind, tmp_path):
    model = other(OTHERS[kind](), tmp_path / "weights")
    with opened(model, tmp_path / "runtime") as session:
        found = run(session, Row(1, A[:20], 0, (5, 2), "all"))
        found += (run(session, Row(2, B, 0, (1,)), Row(1, A[20:35], 20, (5, 2, 9), "all"))[1],)
        for i in range(35, 40):
            found += run(session, Row(1, A[i : i + 1], i, (5, 2, 9)), Row(2, (50,), 13, (1,)))[:1]
    assert distance(np.concatenate(found), expected(model, A)) < 1e-5


TRANSFORMS = {
    "int4": lambda model: RTN(bits=4, granularity="group", group_size=32).apply(model, context(texts())),
    "int8-dynamic": lambda model: Int8Dynamic().apply(model, context(texts())),
    "kv-int8": lambda model: KVCache(dtype="int8").apply(model, context(texts(*[24] * 4))),
    "kv-bfloat16": lambda model: KVCache(dtype="bfloat16").apply(model, context(texts())),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_quantized_models_give_what_their_modules_give(kind, tiny_llama, tmp_path):
    plain, model = tiny_llama(), TRANSFORMS[kind](tiny_llama())
    lowered = BACKEND.lowering(model.tags)
    assert all(how.possible for how in lowered.values())
    with opened(model, tmp_path) as session:
        found = [run(session, Row(1, A[:30], 0, (0, 1, 2), "all"))[0]]
        found += [run(session, Row(1, A[i : i + 1], i, (0, 1, 2)))[0] for i in range(30, 40)]
    lost = distance(np.concatenate(found), expected(model, A))
    assert lost <= max(how.tolerance for how in lowered.values())
    assert lost < distance(expected(model, A), expected(plain, A))


def test_a_padded_batch_is_its_sequences_alone(bert):
    model, files = bert
    sequences = [A, A[:1], B, A[3:12]]
    with BACKEND.open(files, files, LIMITS) as session:
        assert isinstance(session, TorchScriptTensorSession)
        assert session.inputs == dict.fromkeys(("input_ids", "attention_mask"), TensorSpec("int64", (None, None)))
        assert session.outputs == {"last_hidden_state": TensorSpec("float32", (None, None, 32))}
        for batch in (sequences, sequences[1:2], sequences * 5):
            [hidden] = session.run(padded(batch, session.inputs)).values()
            for row, ids in zip(hidden, batch, strict=True):
                with torch.inference_mode():
                    wanted = model.module(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
                assert distance(row[: len(ids)], wanted) < 1e-5


def test_an_encoder_rounds_its_inputs(tiny_bert, tmp_path):
    model = Int8Static(observer="minmax", ignore=("re:pooler",)).apply(tiny_bert(), context(texts(*[24] * 4)))
    with opened(model, tmp_path) as session:
        [hidden] = session.run(padded([A], session.inputs)).values()
    with torch.inference_mode():
        wanted = model.module(input_ids=torch.tensor([A])).last_hidden_state[0].numpy()
    assert distance(hidden[0], wanted) < 1e-3


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(128, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(image).flatten(1))


def test_a_convolutional_network_runs_from_python(tmp_path):
    torch.manual_seed(0)
    module = Convolutional().eval()
    compile_tensors(module, {"image": torch.rand(2, 1, 8, 8)}, tmp_path)
    images = torch.rand(7, 1, 8, 8)
    with BACKEND.open(tmp_path, tmp_path, LIMITS) as session:
        assert session.inputs == {"image": TensorSpec("float32", (None, 1, 8, 8))}
        assert session.outputs == {"output": TensorSpec("float32", (None, 10))}
        found = session.run({"image": images.numpy()})["output"]
    with torch.inference_mode():
        assert distance(found, module(images).numpy()) < 1e-5


def test_what_depends_on_the_example_is_refused(tmp_path):
    class Sized(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.sum(1) / len(image)

    with pytest.raises(RecipeError, match=r"^Sized: what torch\.jit traced gives something else for other sizes;"):
        compile_tensors(Sized().eval(), {"image": torch.rand(2, 4)}, tmp_path)

    class Broken(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.reshape(int(image.shape[0]), -1).cos()

    with pytest.raises(RecipeError, match=r"^Broken: what torch\.jit traced gives something else for other sizes;"):
        compile_tensors(Broken().eval(), {"image": torch.rand(2, 4)}, tmp_path)

    class Untraceable(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            if torch.jit.is_tracing():
                raise ValueError("not me")
            return image

    expected = r"^Untraceable: torch\.jit cannot trace it \(not me\); choose another backend$"
    with pytest.raises(RecipeError, match=expected):
        compile_tensors(Untraceable().eval(), {"image": torch.rand(2, 4)}, tmp_path)

    class Empty(nn.Module):
        def forward(self, image: torch.Tensor) -> dict[str, str]:
            return {"text": str(image.shape)}

    with pytest.raises(RecipeError, match=r"^Empty: gives no tensors; let it return a tensor, or several$"):
        compile_tensors(Empty().eval(), {"image": torch.rand(2, 4)}, tmp_path)


def test_attention_of_another_kind_is_refused_in_one_line():
    module = transformers.AutoModelForCausalLM.from_config(transformers.Gemma2Config(**SHAPE)).eval()
    with pytest.raises(
        RecipeError, match=r"^Gemma2ForCausalLM: this backend runs .*softcap.*; choose another backend$"
    ):
        compile_decoder(module, None)


def test_angles_that_change_bound_the_length(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = other(transformers.LlamaConfig(**SHAPE, rope_parameters=rope), tmp_path / "weights")
    files = compiled(model, tmp_path / "runtime")
    with pytest.raises(RecipeError, match=r"angles hold for 128 tokens, found 129; set max_length to 128 or less"):
        BACKEND.open(files, files, Limits(1, 129))
    BACKEND.open(files, files, Limits(1, 128)).close()


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_files_are_refused_in_one_line(harm, bert, tmp_path):
    for file in bert[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    archive, facts = tmp_path / "model.pt", tmp_path / "tensors.json"
    damage(harm, archive, facts)
    with pytest.raises(DamagedError) as raised:
        BACKEND.open(tmp_path, tmp_path, LIMITS)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_profile_names_every_linear_layer(llama):
    model, session = llama
    times = session.profile(StepPlan((Row(1, A, 0, (0, 1, 2)), Row(2, (7,), 0, (3,)))))
    linears = {name: layer for name, layer in model.module.named_modules() if isinstance(layer, nn.Linear)}
    found = {time.layer: time for time in times if time.kernel == "aten::linear"}
    assert set(found) == set(linears)
    assert all(found[name].weight_bytes == layer.weight.nbytes for name, layer in linears.items())
    assert any(time.kernel == "aten::scaled_dot_product_attention" for time in times)


def test_profile_of_an_encoder_names_its_linear_layers_and_counts_their_operations(bert):
    model, folder = bert
    ids = np.arange(5, 16)[None]
    with BACKEND.open(folder, folder, LIMITS) as session:
        times = session.profile({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    modules = model.module.named_modules()
    linears = {name: layer.weight.numel() for name, layer in modules if isinstance(layer, nn.Linear)}
    found = {time.layer: time.operations for time in times if time.kernel == "aten::linear"}
    # The pooler gives no output, and is not run.
    wanted = {name: 2 * ids.size * size for name, size in linears.items() if not name.startswith("pooler")}
    assert found == wanted


def test_closing_twice_does_nothing(bert, tiny_llama, tmp_path):
    for session in (BACKEND.open(bert[1], bert[1], LIMITS), opened(tiny_llama(), tmp_path)):
        session.close()
        session.close()


def test_lowering_says_which_kernel_runs_or_why_none_can():
    tags = {
        "task:causal-lm",
        "weights:float",
        "weights:int4-group",
        "weights:bnb-nf4",
        "activations:int4",
        "kv:fp8-head",
    }
    lowered = BACKEND.lowering(frozenset(tags))
    assert lowered["weights:float"].native
    assert (lowered["weights:int4-group"].possible, lowered["weights:int4-group"].native) == (True, False)
    refused = {tag for tag, how in lowered.items() if not how.possible}
    assert refused == {"weights:bnb-nf4", "activations:int4", "kv:fp8-head"}
    assert not BACKEND.lowering(frozenset({"task:image"}))["task:image"].possible


def test_a_session_needs_no_transformers(bert):
    code = (
        "import sys; from pathlib import Path; from optkit.steps import Limits;"
        "from optkit_backends.torchscript import TorchScript;"
        f"folder = Path({str(bert[1])!r}); TorchScript().open(folder, folder, Limits(1, 8)).close();"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
