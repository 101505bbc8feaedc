"""The openvino backend against torch: encoders of several architectures, convolutional networks, integers and files."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from optkit import hardware
from optkit.calibration import Calibration
from optkit.engine.tensors import padded
from optkit.errors import DamagedError, RecipeError
from optkit.model import Model
from optkit.quantized import QuantizedConv2d, QuantizedLinear, quantized_layers
from optkit.schemes import ActivationScheme, WeightScheme
from optkit.steps import Limits, TensorSpec
from optkit.testing import check_backend
from optkit.weights import load_folder
from optkit_backends.openvino import ROUNDING_TOLERANCE, OpenVINO
from optkit_quantize.fp8 import FP8
from optkit_quantize.int8_dynamic import Int8Dynamic
from optkit_quantize.int8_static import Int8Static
from optkit_quantize.rtn import RTN
from tests.calibrating import context, texts

BACKEND = OpenVINO(threads=1)
LIMITS = Limits(4, 64)
SEQUENCES = [tuple(range(10, 50)), (7,), tuple(range(5, 18)), tuple(range(3, 67))]
ENCODER = {"task:feature-extraction", "arch:bert"}

conversion = pytest.importorskip("optkit_backends.openvino.conversion", reason=f"the backend {BACKEND.unavailable()}")
tensors = pytest.importorskip("optkit_backends.openvino.tensors")


def compiled(model, directory):
    directory.mkdir(exist_ok=True)
    BACKEND.compile(model, directory)
    return directory


@pytest.fixture(scope="module")
def plain(tiny_bert, tmp_path_factory):
    """A float encoder and its files."""
    model = tiny_bert()
    return SimpleNamespace(model=model, files=compiled(model, tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def static(tiny_bert, tmp_path_factory):
    """One with static int8 activations."""
    transform = Int8Static(observer="minmax", ignore=("re:pooler",))
    model = transform.apply(tiny_bert(num_hidden_layers=1), context(texts(*[24] * 4)))
    return SimpleNamespace(model=model, files=compiled(model, tmp_path_factory.mktemp("static")))


def distance(found, wanted):
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def distances(session, module, sequences=SEQUENCES):
    """Of each sequence in one padded batch from the module's own answer to it alone."""
    [hidden] = session.run(padded(sequences, session.inputs)).values()
    found = []
    for row, ids in zip(hidden, sequences, strict=True):
        with torch.inference_mode():
            alone = module(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()
        found.append(distance(row[: len(ids)], alone))
    return found


def products(session, inputs):
    """By layer, the kernel that multiplied with its weights, and their bytes."""
    times = session.profile(inputs)
    return {time.layer: (time.kernel, time.weight_bytes) for time in times if time.operations}


def test_a_padded_batch_is_its_sequences_alone(plain):
    with BACKEND.open(plain.files, plain.files, LIMITS) as session:
        assert isinstance(session, tensors.OpenVINOTensorSession)
        assert session.inputs == dict.fromkeys(("input_ids", "attention_mask"), TensorSpec("int64", (None, None)))
        assert session.outputs == {"last_hidden_state": TensorSpec("float32", (None, None, 32))}
        for batch in (SEQUENCES, SEQUENCES[:1], SEQUENCES[1:2], SEQUENCES * 5):
            assert max(distances(session, plain.model.module, batch)) < 1e-5


def test_attention_is_followed_by_the_transposition_that_its_kernel_takes_in(plain):
    graph = conversion.openvino.Core().read_model(plain.files / conversion.GRAPH)
    products = [node for node in graph.get_ops() if node.get_type_name() == "ScaledDotProductAttention"]
    assert len(products) == plain.model.module.config.num_hidden_layers
    for node in products:
        readers = {use.get_node().get_type_name() for use in node.output(0).get_target_inputs()}
        assert readers == {"Transpose"}


def test_the_next_call_leaves_what_was_given_back(plain):
    with BACKEND.open(plain.files, plain.files, LIMITS) as session:
        inputs = padded(SEQUENCES[:1], session.inputs)
        [first] = session.run(inputs).values()
        kept = first.copy()
        session.run(padded(SEQUENCES[2:3] * 3, session.inputs))
        np.testing.assert_array_equal(first, kept)
        # Views with strides of their own are as good as arrays.
        strided = {name: np.repeat(array, 2, axis=1)[:, ::2] for name, array in inputs.items()}
        np.testing.assert_array_equal(session.run(strided)["last_hidden_state"], kept)


GROUP = {"granularity": "group", "group_size": 16}
FORMATS = {  # by the end of a layer's path
    "self.query": RTN(bits=8),
    "self.key": RTN(bits=8, symmetric=False, **GROUP),
    "self.value": RTN(bits=4),
    "attention.output.dense": RTN(bits=4, symmetric=False, **GROUP),
    "intermediate.dense": RTN(bits=3, **GROUP),
    "output.dense": RTN(bits=2, symmetric=False),
}


def test_integer_weights_are_read_as_they_are_stored(tiny_bert, tmp_path):
    model = tiny_bert(num_hidden_layers=1)
    for end, transform in FORMATS.items():
        targeted = transform.model_copy(update={"targets": (f"re:.*{end}",), "ignore": ()})
        model = targeted.apply(model, context(texts()))
    layers = dict(quantized_layers(model.module))
    assert len({layer.scheme.tag for layer in layers.values()}) == len(layers) == len(FORMATS)
    lowered = BACKEND.lowering(frozenset(ENCODER | {layer.scheme.tag for layer in layers.values()}))
    with BACKEND.open(compiled(model, tmp_path), tmp_path, LIMITS) as session:
        assert max(distances(session, model.module)) < 1e-5
        found = products(session, padded(SEQUENCES, session.inputs))
    assert set(found) == set(layers)
    for path, (kernel, size) in found.items():
        layer = layers[path]
        bits = 4 if layer.scheme.bits <= 4 else 8
        how = lowered[layer.scheme.tag]
        assert (how.native, how.kernel) == (True, f"FullyConnected (int{bits} weights)")
        assert kernel.startswith("FullyConnectedCompressed")
        stored = layer.weight.numel() * bits // 8
        # Scales, zero points and the bias besides.
        assert stored < size <= stored + 4 * (2 * layer.scale.numel() + layer.out_features)


def test_static_int8_is_what_the_layers_say(static, tiny_bert):
    plain = tiny_bert(num_hidden_layers=1).module
    with tensors.OpenVINOTensorSession(static.files, threads=1, integer_products=False) as session:
        found = distances(session, static.model.module)
        lost = distances(session, plain)
        kernels = products(session, padded(SEQUENCES, session.inputs))
    # Only a rounding that other floats before it tip over makes a difference.
    assert max(found) < 0.01
    assert min(lost) > max(found)
    assert {kernel.partition(" ")[0] for kernel, _ in kernels.values()} == {"FullyConnectedCompressed"}


class Products(nn.Module):
    """Integer layers whose weights are small enough that no processor's products overflow."""

    def __init__(self, static):
        super().__init__()
        scheme = WeightScheme(8, None, symmetric=True)
        shifted = ActivationScheme(dynamic=False, symmetric=False) if static else None
        given = (torch.tensor([0.02]), torch.tensor([-30], dtype=torch.int8)) if static else ()

        def convolution(**options):
            layer = nn.Conv2d(4, 6, 3, **options).requires_grad_(False)
            weight = torch.randint(-64, 64, layer.weight.shape, dtype=torch.int8)
            return QuantizedConv2d(layer, weight, torch.rand(6, 1) + 0.1, None, layer.bias, scheme, shifted, *given)

        self.same, self.groups = convolution(padding="same"), convolution(padding=1, stride=(2, 1), groups=2)
        weight = torch.randint(-64, 64, (5, 6), dtype=torch.int8)
        self.linear = QuantizedLinear(weight, torch.rand(5, 1) / 50, None, None, scheme, shifted, *given)

    def forward(self, pixels, gains):
        same = self.same(pixels)
        return {"same": same, "groups": self.groups(pixels), "rows": self.linear(same.mean((2, 3)) / 9000) * gains}


@pytest.mark.parametrize("products", ["integer", "float", "weights"])
def test_convolutions_and_products_of_integers(products, tmp_path):
    torch.manual_seed(0)
    module = Products(products != "weights").eval()
    inputs = {"pixels": torch.rand(3, 4, 9, 8) * 5 - 2, "gains": torch.rand(3, 1)}
    with torch.inference_mode():
        wanted = module(**inputs)
    conversion.compile_tensors(module, inputs, tmp_path)
    with tensors.OpenVINOTensorSession(tmp_path, threads=2, integer_products=products == "integer") as session:
        assert session.inputs["pixels"] == TensorSpec("float32", (None, 4, 9, 8))
        assert list(session.outputs) == list(wanted)
        assert session.outputs["same"] == TensorSpec("float32", (None, 6, 9, 8))
        found = session.run({name: tensor.numpy() for name, tensor in inputs.items()})
        assert {len(array) for array in session.run({n: t[:1].numpy() for n, t in inputs.items()}).values()} == {1}
        kernels = session.profile({n: t.numpy() for n, t in inputs.items()})
    for name, tensor in wanted.items():
        assert distance(found[name], tensor.numpy()) < 1e-5, name
    integer = [time for time in kernels if time.integer and time.operations]
    assert all(time.kernel.lower().endswith("i8)") for time in integer)
    assert sum("Convolution" in time.kernel for time in integer) == (2 if products == "integer" else 0)


TRANSFORMS = {
    "int8-dynamic": lambda model: Int8Dynamic().apply(model, context(texts())),
    "int8-static": lambda model: Int8Static(ignore=("re:pooler",)).apply(model, context(texts(*[24] * 4))),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_rounded_activations_conform(kind, tiny_bert):
    check_backend(BACKEND, TRANSFORMS[kind](tiny_bert(num_hidden_layers=1)))


SHAPE = {"vocab_size": 160, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "pad_token_id": 1}
MODERN = {"global_attn_every_n_layers": 2, "local_attention": 8, "intermediate_size": 48}
ENCODERS = {
    "mpnet": lambda: transformers.MPNetConfig(**SHAPE, intermediate_size=64, max_position_embeddings=96),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=160, dim=32, hidden_dim=64, n_heads=4, n_layers=2, max_position_embeddings=96
    ),
    "modernbert": lambda: transformers.ModernBertConfig(**SHAPE, **MODERN),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_other_architectures_conform(kind):
    torch.manual_seed(0)
    module = transformers.AutoModel.from_config(ENCODERS[kind]()).eval().requires_grad_(False)
    tags = frozenset({"task:feature-extraction", f"arch:{kind}", "weights:float"})
    check_backend(BACKEND, Model(module, None, tags), tolerance=1e-5)


def test_float8_is_refused(tiny_bert, tmp_path):
    model = FP8().apply(tiny_bert(num_hidden_layers=1), context(texts()))
    assert not any(how.possible for tag, how in BACKEND.lowering(model.tags).items() if "fp8" in tag)
    expected = r"dense: the openvino backend rounds to integers only, found 'weights:fp8-channel'$|query: .*$"
    with pytest.raises(RecipeError, match=expected):
        BACKEND.compile(model, tmp_path)


def test_what_depends_on_the_example_is_refused(tmp_path):
    class Sized(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.sum(1) / len(image)

    with pytest.raises(RecipeError, match=r"^Sized: what torch\.jit traced gives something else for other sizes;"):
        conversion.compile_tensors(Sized().eval(), {"image": torch.rand(2, 4)}, tmp_path)

    class Untraceable(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            if torch.jit.is_tracing():
                raise ValueError("not me")
            return image

    expected = r"^Untraceable: openvino cannot convert it \(not me\); choose another backend$"
    with pytest.raises(RecipeError, match=expected):
        conversion.compile_tensors(Untraceable().eval(), {"image": torch.rand(2, 4)}, tmp_path)

    class Unknown(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(image)

    with pytest.raises(RecipeError, match=r"^Unknown: openvino cannot convert it \(.*bessel_j0") as raised:
        conversion.compile_tensors(Unknown().eval(), {"image": torch.rand(2, 4)}, tmp_path)
    assert "\n" not in str(raised.value)

    class Fixed(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.reshape(2, 4)

    with pytest.raises(RecipeError, match=r"^Fixed: does not run on other sizes itself: .*; say with dynamic"):
        conversion.compile_tensors(Fixed().eval(), {"image": torch.rand(2, 4)}, tmp_path)

    class Empty(nn.Module):
        def forward(self, image: torch.Tensor) -> dict[str, str]:
            return {"text": str(image.shape)}

    with pytest.raises(RecipeError, match=r"^Empty: gives no tensors; let it return a tensor, or several$"):
        conversion.compile_tensors(Empty().eval(), {"image": torch.rand(2, 4)}, tmp_path)


@pytest.mark.parametrize("harm", ["cut", "gone", "weights", "garbage", "foreign", "format"])
def test_damaged_files_are_refused_in_one_line(harm, plain, tmp_path):
    for file in plain.files.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    graph, weights, facts = (tmp_path / name for name in ("model.xml", "model.bin", "tensors.json"))
    match harm:
        case "cut":
            graph.write_bytes(graph.read_bytes()[:-100])
        case "gone":
            graph.unlink()
        case "weights":
            weights.write_bytes(weights.read_bytes()[:-1])
        case "garbage":
            graph.write_bytes(b"x" * graph.stat().st_size)
        case "foreign":
            text = graph.read_text()
            graph.write_text(text.replace('names="input_ids"', 'names="inputs_id"'))
        case "format":
            facts.write_text(json.dumps(json.loads(facts.read_text()) | {"format": 99}))
    with pytest.raises(DamagedError) as raised:
        BACKEND.open(tmp_path, tmp_path, LIMITS)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_session_needs_neither_torch_nor_transformers(plain):
    code = (
        "import sys; from pathlib import Path; from optkit.steps import Limits;"
        "from optkit_backends.openvino import OpenVINO;"
        f"folder = Path({str(plain.files)!r}); OpenVINO().open(folder, folder, Limits(1, 8)).close();"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_nothing_in_the_graph_tells_of_this_machine(static):
    text = (static.files / "model.xml").read_text()
    assert "site-packages" not in text
    assert str(Path.home()) not in text


def test_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2025.3.0")
    expected = "needs openvino 2026.4 or later, found 2025.3.0; pip install 'optkit[openvino]'"
    assert BACKEND.unavailable() == expected
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert BACKEND.unavailable() == "needs openvino; pip install 'optkit[openvino]'"


def test_lowering_says_which_kernel_runs_or_why_none_can(monkeypatch):
    def lowered(*tags):
        return BACKEND.lowering(frozenset(ENCODER | set(tags)))

    assert lowered("weights:float")["weights:float"].native
    static = "activations:int8-static-asym"
    for isa, native in (((), False), (("avx2", "avx512f"), False), (("avx2", "avx_vnni"), True)):
        for module in (hardware, hardware.facts):
            monkeypatch.setattr(module, "isa", lambda isa=isa: isa)
        found = lowered("weights:int8-channel", static)
        assert found["weights:int8-channel"].native == ("avx2" in isa)
        assert (found[static].possible, found[static].native) == (True, native)
        dynamic = lowered("activations:int8-dynamic")["activations:int8-dynamic"]
        assert (dynamic.possible, dynamic.native) == (True, False)
    refused = ("weights:bnb-nf4", "activations:int4", "kv:int8-head")
    assert {tag for tag, how in lowered(*refused).items() if not how.possible} == set(refused)
    decoder = BACKEND.lowering(frozenset({"task:causal-lm", "weights:float"}))
    assert "KV cache" in decoder["task:causal-lm"].reason
    assert not decoder["task:causal-lm"].possible
    assert not BACKEND.lowering(frozenset({"task:image"}))["task:image"].possible


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transform", "least"),
    [(None, 0.99999), (RTN(bits=8), 0.999), (RTN(bits=4, granularity="group", group_size=32), 0.94)],
)
def test_minilm_stays_close(transform, least, minilm, tmp_path):
    assert cosine(minilm, transform, tmp_path)[0] >= least


@pytest.mark.slow
@pytest.mark.parametrize("integer_products", [False, True])
def test_minilm_in_static_int8_stays_close(integer_products, minilm, tmp_path):
    found, lost = cosine(minilm, Int8Static(), tmp_path, integer_products=integer_products)
    assert found >= 0.985
    assert lost < ROUNDING_TOLERANCE


def cosine(folder, transform, directory, integer_products=False):
    """Of MiniLM's embeddings to those in float32, on average; and the largest distance from the module's own output."""
    from optkit.builtin.texts import PythonReference

    model = load_folder(folder)
    reference = copy.deepcopy(model.module)
    text = model.tokenizer(" ".join(PythonReference().texts())[:20000], add_special_tokens=False)["input_ids"]
    ends = model.tokenizer.cls_token_id, model.tokenizer.sep_token_id
    sequences = [(ends[0], *text[start : start + 126], ends[1]) for start in range(0, 126 * 16, 126)]
    if transform is not None:
        batches = [
            {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, 128).long()} for ids in sequences[8:]
        ]
        model = transform.apply(model, context(Calibration(tuple(batches))))
    compiled(model, directory)
    with tensors.OpenVINOTensorSession(directory, threads=1, integer_products=integer_products) as session:
        [hidden] = session.run(padded(sequences[:8], session.inputs)).values()
        lost = max(distances(session, model.module, sequences[:4]))
    with torch.inference_mode():
        plain = reference(input_ids=torch.tensor(sequences[:8])).last_hidden_state
    found = nn.functional.cosine_similarity(torch.from_numpy(hidden).mean(1), plain.mean(1))
    return found.mean().item(), lost
