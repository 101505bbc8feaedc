"""Encoders and convolutional networks on the onnxruntime backend, against torch: floats, integers, and files."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import optkit
from optkit.calibration import Calibration
from optkit.engine.tensors import padded
from optkit.errors import DamagedError, MissingError, RecipeError
from optkit.model import Model
from optkit.quantized import QuantizedConv2d, QuantizedLinear, quantized_layers, replace_module
from optkit.schemes import ActivationScheme, WeightScheme
from optkit.steps import Limits, TensorSpec
from optkit.transforms import TransformContext
from optkit.weights import FEATURE_EXTRACTION, load_folder, save_folder
from optkit_backends.onnxruntime import DYNAMIC_TOLERANCE, STATIC_TOLERANCE, OnnxRuntime
from optkit_backends.onnxruntime.export import compile_model, compile_tensors
from optkit_backends.onnxruntime.layers import exportable
from optkit_backends.onnxruntime.loading import load
from optkit_backends.onnxruntime.tensors import OnnxTensorSession
from optkit_backends.onnxruntime.trace import kernel_times
from optkit_quantize.int8_dynamic import Int8Dynamic
from optkit_quantize.int8_static import Int8Static
from optkit_quantize.rtn import RTN

RANDOM = np.random.default_rng(0)
SEQUENCES = [tuple(RANDOM.integers(10, 300, size=length).tolist()) for length in (40, 1, 7, 64)]
BACKEND = OnnxRuntime(threads=1)
EXACT = OnnxRuntime(threads=1, accuracy_level=1)
LIMITS = Limits(4, 64)
SHIFTED = (torch.tensor([0.02]), torch.tensor([-30], dtype=torch.int8))


def context(*batches):
    return TransformContext(lambda *_: None, Calibration(batches))


def tokens(count, vocabulary=300):
    """Calibration data."""
    for length in range(8, 8 + 8 * count, 8):
        ids = torch.from_numpy(RANDOM.integers(10, vocabulary, size=(1, length)))
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def compiled(model, directory, backend=BACKEND):
    directory.mkdir(exist_ok=True)
    backend.compile(model, directory)
    return directory


def alone(module, ids):
    with torch.inference_mode():
        return module(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()


def distance(found, reference):
    assert found.shape == reference.shape
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


def distances(session, module, sequences=SEQUENCES):
    """Of each sequence in one padded batch from the module's own answer to it alone."""
    [hidden] = session.run(padded(sequences, session.inputs)).values()
    assert hidden.dtype == np.float32
    return [distance(row[: len(ids)], alone(module, ids)) for row, ids in zip(hidden, sequences, strict=True)]


def kernels(directory, inputs, tmp_path):
    """What ran, by the runtime's own profiler."""
    session = load(directory / "model.onnx", threads=1, spin=False, trace=tmp_path / "trace")
    session.run(None, inputs)
    times = kernel_times(tmp_path / session.end_profiling(), directory / "model.onnx", runs=1)
    return Counter(time.kernel.partition(" ")[0] for time in times)


@pytest.fixture(scope="module")
def plain(tiny_bert, tmp_path_factory):
    """A float encoder and its files."""
    model = tiny_bert()
    return SimpleNamespace(module=model.module, files=compiled(model, tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def static(tiny_bert, tmp_path_factory):
    """One with static int8 activations."""
    transform = Int8Static(observer="minmax", ignore=("re:pooler",))
    model = transform.apply(tiny_bert(num_hidden_layers=1), context(*tokens(6)))
    return SimpleNamespace(module=model.module, files=compiled(model, tmp_path_factory.mktemp("static")))


def test_a_padded_batch_is_its_sequences_alone(plain):
    with BACKEND.open(plain.files, plain.files, LIMITS) as session:
        assert isinstance(session, OnnxTensorSession)
        assert session.inputs == dict.fromkeys(("input_ids", "attention_mask"), TensorSpec("int64", (None, None)))
        assert session.outputs == {"last_hidden_state": TensorSpec("float32", (None, None, 32))}
        assert max(distances(session, plain.module)) < 1e-5
        for batch in (SEQUENCES[:1], SEQUENCES[1:2], SEQUENCES * 5):
            assert max(distances(session, plain.module, batch)) < 1e-5


def test_a_result_does_not_depend_on_what_else_is_in_the_batch(plain, static, dynamic):
    for encoder in (plain, static, dynamic):
        with BACKEND.open(encoder.files, encoder.files, LIMITS) as session:
            [together] = session.run(padded(SEQUENCES, session.inputs)).values()
            for row, ids in zip(together, SEQUENCES, strict=True):
                [[lonely]] = session.run(padded([ids], session.inputs)).values()
                assert distance(row[: len(ids)], lonely) < 1e-5


def masked(session, module, ids, mask):
    """How far a session is from the module wherever the mask is 1."""
    with torch.inference_mode():
        wanted = module(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    found = session.run({"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
    return distance(found[mask > 0], wanted[mask > 0])


def holes(mask):
    """Padding on the right, on the left, and in between."""
    mask[1, 15:], mask[2, :3], mask[2, 9] = 0, 0, 0
    return mask


def test_what_a_mask_hides_changes_nothing_wherever_it_is(plain):
    ids = RANDOM.integers(10, 300, size=(3, 20))
    mask = holes(np.ones_like(ids))
    with BACKEND.open(plain.files, plain.files, LIMITS) as session:
        assert masked(session, plain.module, ids, mask) < 1e-5
        seen = [
            session.run({"input_ids": np.where(mask > 0, ids, other), "attention_mask": mask})["last_hidden_state"]
            for other in (10, 299)
        ]
    np.testing.assert_array_equal(seen[0][mask > 0], seen[1][mask > 0])


@pytest.mark.slow
def test_masks_that_hide_more_than_padding_are_added_to_the_scores(tmp_path):
    from transformers import ModernBertConfig, ModernBertModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    # The second layer sees four tokens at a time.
    windows = {"global_attn_every_n_layers": 2, "local_attention": 4}
    module = ModernBertModel(ModernBertConfig(**sizes, **tokens, **windows)).eval().requires_grad_(False)
    compile_model(Model(module, None, frozenset({FEATURE_EXTRACTION})), tmp_path, accuracy_level=4, block_size=64)
    ids = RANDOM.integers(10, 300, size=(3, 20))
    inputs = {"input_ids": ids, "attention_mask": holes(np.ones_like(ids))}
    with OnnxTensorSession(tmp_path, threads=1, spin=False) as session:
        assert masked(session, module, *inputs.values()) < 1e-5
    assert kernels(tmp_path, inputs, tmp_path)["MultiHeadAttention"] == 2


def test_the_runtime_is_opened_as_the_options_say(plain):
    backend = OnnxRuntime(threads=1, arena=False, optimization_level="none")
    with (
        backend.open(plain.files, plain.files, LIMITS) as session,
        BACKEND.open(plain.files, plain.files, LIMITS) as usual,
    ):
        options, default = (one._session.get_session_options() for one in (session, usual))
        assert (options.enable_cpu_mem_arena, default.enable_cpu_mem_arena) == (False, True)
        inputs = padded(SEQUENCES, session.inputs)
        ran, fused = ({kernel.kernel for kernel in one.profile(inputs)} for one in (session, usual))
        assert "BiasGelu" in fused - ran
        assert distance(*(one.run(inputs)["last_hidden_state"] for one in (session, usual))) < 1e-5


def test_an_execution_provider_is_there_and_runs_all_or_is_refused(plain):
    import onnxruntime

    wrong = OnnxRuntime(execution_provider="NoSuchProvider").unavailable()
    assert wrong is not None
    assert "'NoSuchProvider', only " in wrong
    assert ", ".join(onnxruntime.get_available_providers()) in wrong
    assert OnnxRuntime(execution_provider="CPUExecutionProvider").unavailable() is None
    # Of the providers in the usual build this one has next to no kernels.
    remote = OnnxRuntime(threads=1, execution_provider="AzureExecutionProvider")
    if remote.unavailable() is not None:
        pytest.skip(remote.unavailable())
    assert remote.lowering(frozenset({"task:causal-lm", "weights:float"}))["weights:float"].kernel.endswith("Provider")
    with pytest.raises(MissingError, match="AzureExecutionProvider has no kernel for some of its operators") as raised:
        remote.open(plain.files, plain.files, LIMITS)
    assert "\n" not in str(raised.value)


def test_static_int8_is_what_the_layers_say_and_runs_as_integers(static, tiny_bert, tmp_path):
    plain = tiny_bert(num_hidden_layers=1).module
    with BACKEND.open(static.files, static.files, LIMITS) as session:
        inputs = padded(SEQUENCES, session.inputs)
        found = distances(session, static.module)
    # Sums are exact, so only a rounding that other floats before it tip over makes a difference.
    assert max(found) < 1e-4
    assert max(distance(alone(static.module, ids), alone(plain, ids)) for ids in SEQUENCES) > 1e-3
    ran = kernels(static.files, inputs, tmp_path)
    assert ran["MatMulIntegerToFloat"] == len(list(quantized_layers(static.module))) == 6
    assert not ran & Counter(MatMul=1, Gemm=1, FusedMatMul=1, DequantizeLinear=1)
    assert ran["MultiHeadAttention"] == 1
    # Query, key and value round the same input once.
    assert ran["QuantizeLinear"] == 4


@pytest.fixture(scope="module")
def dynamic(tiny_bert, tmp_path_factory):
    """One with int8 activations by token."""
    model = Int8Dynamic(ignore=("re:pooler",)).apply(tiny_bert(num_hidden_layers=1), context())
    return SimpleNamespace(module=model.module, files=compiled(model, tmp_path_factory.mktemp("dynamic")))


def test_dynamic_int8_is_what_the_layers_say_and_runs_as_integers(dynamic, tiny_bert, tmp_path):
    plain = tiny_bert(num_hidden_layers=1).module
    with BACKEND.open(dynamic.files, dynamic.files, LIMITS) as session:
        inputs = padded(SEQUENCES, session.inputs)
        found = distances(session, dynamic.module)
    rounding = max(distance(alone(dynamic.module, ids), alone(plain, ids)) for ids in SEQUENCES)
    # As above. The largest number of a token lies on an edge between integers, so that more roundings tip over.
    assert max(found) < rounding / 4
    assert min(found) < 1e-5
    ran = kernels(dynamic.files, inputs, tmp_path)
    assert ran["MatMulIntegerToFloat"] == len(list(quantized_layers(dynamic.module))) == 6
    assert not ran & Counter(MatMul=1, Gemm=1, FusedMatMul=1, DequantizeLinear=1)
    # Query, key and value round the same input once, and its range is looked for once.
    assert ran["QuantizeLinear"] == ran["ReduceMax"] == 4
    # The activation takes over its bias, sums and norms stay apart, and nothing moves heads about.
    assert (ran["BiasGelu"], ran["LayerNormalization"]) == (1, 3)
    assert not ran & Counter(SkipLayerNormalization=1, Transpose=1)


def test_weights_alone_of_one_scale_a_channel_round_their_input_by_token(tiny_bert, tmp_path):
    """At accuracy level 4: the same numbers as with dynamic activations."""
    model = RTN(bits=8, symmetric=False, ignore=("re:pooler",)).apply(tiny_bert(num_hidden_layers=1), context())
    wanted = copy.deepcopy(model.module)
    for _, layer in quantized_layers(wanted):
        layer.activations = ActivationScheme(dynamic=True)
    with BACKEND.open(compiled(model, tmp_path), tmp_path, LIMITS) as session:
        inputs = padded(SEQUENCES, session.inputs)
        found = distances(session, wanted)
        assert min(found) < 1e-5
        assert max(found) < max(distances(session, model.module)) / 2
    assert kernels(tmp_path, inputs, tmp_path)["MatMulIntegerToFloat"] == 6


def test_integer_weights_alone_are_the_very_same(tiny_bert, tmp_path):
    model = RTN(bits=8, targets=("re:.*attention.*",)).apply(tiny_bert(num_hidden_layers=1), context())
    model = RTN(bits=4, granularity="group", group_size=16, symmetric=False).apply(model, context())
    schemes = {layer.scheme.tag for _, layer in quantized_layers(model.module)}
    assert schemes == {"weights:int8-channel", "weights:int4-group-asym"}
    with EXACT.open(compiled(model, tmp_path, EXACT), tmp_path, LIMITS) as session:
        assert max(distances(session, model.module)) < 1e-5


def test_compiling_leaves_the_model_as_it_is(tiny_bert, static):
    module = copy.deepcopy(static.module)
    assert module.config._attn_implementation == tiny_bert().module.config._attn_implementation
    assert {type(layer) for _, layer in quantized_layers(module)} == {QuantizedLinear}


def test_nothing_in_the_graph_tells_of_this_machine(static):
    model = ir.load(static.files / "model.onnx")
    assert not any(node.metadata_props or node.doc_string for node in model.graph)
    assert b"site-packages" not in (static.files / "model.onnx").read_bytes()


def test_an_encoder_of_texts_runs_on_it(tiny_bert, tiny_encoder, plain, published, encoder_artifact):
    def files(folder):
        save_folder(tiny_bert(), folder)
        shutil.copytree(plain.files, folder.parent / "runtime", dirs_exist_ok=True)

    batching = {"bucketed": {"max_batch_size": 4, "max_padding": 0.1}}
    recipe = {"backend": {"onnxruntime": {"threads": 1}}, "batching": batching}
    facts = {"tags": ["task:feature-extraction"], "max_batch_size": 4, "max_length": 64}
    texts = ["the capital of France", "a", "A model reads tokens and answers with the next one, 0 1 2 3 4 5 6 7 8 9."]
    with optkit.Encoder(published("onnxruntime", recipe, files, **facts)) as encoder:
        found = encoder.encode(texts)
    with optkit.Encoder(encoder_artifact(tiny_encoder, batching, 64)) as encoder:
        np.testing.assert_allclose(found, encoder.encode(texts), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "harm"),
    [(name, harm) for name in ("model.onnx", "model.onnx.data", "tensors.json") for harm in ("cut", "gone")],
)
def test_damaged_files_are_refused_in_one_line(plain, name, harm, tmp_path):
    directory = shutil.copytree(plain.files, tmp_path / "files")
    path = directory / name
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DamagedError) as raised:
        BACKEND.open(directory, directory, LIMITS)
    assert "\n" not in str(raised.value)
    assert str(directory) in str(raised.value)


def test_closing_twice_does_nothing(plain):
    session = BACKEND.open(plain.files, plain.files, LIMITS)
    session.close()
    session.close()


class Forks(nn.Module):
    """Goes where its data tells it."""

    def forward(self, pixels):
        return pixels + 1 if pixels.sum() > 0 else pixels


def test_what_cannot_be_exported_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"Forks: torch\.onnx cannot export it \(") as raised:
        compile_tensors(Forks(), {"pixels": torch.ones(2, 3)}, tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("scheme", "activations", "why"),
    [
        (WeightScheme(8, None, True), ActivationScheme(True, symmetric=False), "each token, or one zero point, found"),
        (WeightScheme(8, 16, True), ActivationScheme(dynamic=True), "each output channel, found 'groups of 16'"),
        (WeightScheme(8, 16, True), ActivationScheme(dynamic=False), "each output channel, found 'groups of 16'"),
        (WeightScheme(3, None, True), None, "stores 2, 4 or 8 bits, found 3"),
    ],
)
def test_linear_layers_without_a_kernel_are_named(scheme, activations, why, tiny_bert, tmp_path):
    module = tiny_bert().module
    scale = torch.ones(32, 32 // (scheme.group_size or 32))
    input = SHIFTED[:1] if activations is not None and not activations.dynamic else ()
    layer = QuantizedLinear(torch.zeros(32, 32, dtype=torch.int8), scale, None, None, scheme, activations, *input)
    replace_module(module, "pooler.dense", layer)
    with pytest.raises(RecipeError, match=rf"pooler\.dense: .*{why}"):
        compile_model(Model(module, None, frozenset({FEATURE_EXTRACTION})), tmp_path, accuracy_level=4, block_size=64)


def convolution(symmetric=True, activations=None, input=(), **options):
    """A quantized convolution with extreme weights."""
    layer = nn.Conv2d(4, 6, 3, **options).requires_grad_(False)
    weight = torch.randint(0, 2, layer.weight.shape) * 255 - 128
    zero_point = None if symmetric else torch.zeros(6, 1, dtype=torch.int8)
    scheme = WeightScheme(8, None, symmetric)
    return QuantizedConv2d(
        layer, weight.to(torch.int8), torch.rand(6, 1) + 0.1, zero_point, layer.bias, scheme, activations, *input
    )


def test_convolutions_without_a_kernel_are_named():
    with pytest.raises(RecipeError, match=r"stem: .* weights alone are integers"):
        exportable(convolution(), "stem", accuracy_level=4, block_size=64)
    static = ActivationScheme(dynamic=False)
    with pytest.raises(RecipeError, match=r"stem: QLinearConv .* symmetric weights, found 'weights:int8-channel-asym'"):
        exportable(convolution(False, static, SHIFTED[:1]), "stem", accuracy_level=4, block_size=64)


class Products(nn.Module):
    """Layers of the largest integers, whose sums do not fit 16 bits. Some run twice, one has too large a bias."""

    def __init__(self):
        super().__init__()
        shifted, symmetric = ActivationScheme(dynamic=False, symmetric=False), ActivationScheme(dynamic=False)
        self.same = convolution(True, shifted, SHIFTED, padding="same", dilation=2)
        self.groups = convolution(True, symmetric, SHIFTED[:1], padding=1, stride=(2, 1), groups=2, bias=False)
        self.biased = convolution(True, shifted, SHIFTED)
        self.biased.bias += 1e9
        zero_point = torch.randint(-9, 9, (6, 1), dtype=torch.int8)
        self.linear, self.narrow = (
            QuantizedLinear(
                (torch.randint(0, 2, (6, 6)) * (2**bits - 1) - 2 ** (bits - 1)).to(torch.int8),
                torch.rand(6, 1),
                zero_point,
                None,
                WeightScheme(bits, None, False),
                shifted,
                *SHIFTED,
            )
            for bits in (8, 7)
        )
        tokens = ActivationScheme(dynamic=True)
        self.by_token, self.narrow_by_token = (
            QuantizedLinear(layer.weight, layer.scale, None, torch.ones(6), WeightScheme(bits, None, True), tokens)
            for layer, bits in ((self.linear, 8), (self.narrow, 7))
        )

    def forward(self, pixels, gains):
        same = self.same(pixels)
        groups = self.groups(pixels)
        rows = self.linear(self.linear(same.mean((2, 3))).sigmoid() * gains)
        following = self.groups(nn.functional.max_pool2d(self.groups(pixels).relu(), 2)[:, :4])
        chained = self.biased(pixels).relu()
        largest = pixels.flatten(2)[:, :, :6].sign()
        narrow = self.narrow(largest), self.narrow_by_token(largest), self.narrow_by_token(largest * 0)
        found = {"same": same, "groups": groups, "rows": rows, "following": following, "chained": chained}
        return found | {"narrow": torch.cat(narrow, 1), "by_token": self.by_token(largest)}


def test_products_of_the_largest_integers_are_exact_on_every_processor(tmp_path):
    module = Products().eval()
    inputs = {"pixels": torch.randint(0, 2, (3, 4, 9, 8)) * 10.0 - 4.0, "gains": torch.rand(3, 1)}
    with torch.inference_mode():
        wanted = module(**inputs)
    compile_tensors(module, inputs, tmp_path)
    with OnnxTensorSession(tmp_path, threads=2, spin=False) as session:
        assert session.inputs["pixels"] == TensorSpec("float32", (None, 4, 9, 8))
        assert list(session.outputs) == list(wanted)
        found = session.run({name: tensor.numpy() for name, tensor in inputs.items()})
        assert {len(array) for array in session.run({n: t[:1].numpy() for n, t in inputs.items()}).values()} == {1}
    for name, tensor in wanted.items():
        assert distance(found[name], tensor.numpy()) < 1e-5, name


class Digits(nn.Module):
    """A small network for images of 8 by 8, with all that decides how a convolution is compiled."""

    def __init__(self):
        super().__init__()
        self.stem, self.middle = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last, self.head = nn.Conv2d(16, 32, 3, padding=1), nn.Linear(32 * 4, 10)

    def forward(self, pixels):
        hidden = nn.functional.max_pool2d(self.stem(pixels).relu(), 2)
        hidden = hidden + self.middle(hidden)
        hidden = nn.functional.max_pool2d(self.last(hidden).relu(), 2)
        return self.head(hidden.flatten(1))


@pytest.fixture(scope="module")
def digits():
    """A trained network, and images that it has not seen."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels, labels = torch.from_numpy(data.images).float()[:, None] / 16, torch.from_numpy(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Digits()
        optimizer = torch.optim.Adam(module.parameters(), 4e-3)
        for _ in range(8):
            for chosen in torch.randperm(1200).split(50):
                loss = nn.functional.cross_entropy(module(pixels[chosen]), labels[chosen])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return SimpleNamespace(
        module=module.eval().requires_grad_(False), seen=pixels[:1200], pixels=pixels[1200:], labels=labels[1200:]
    )


@pytest.mark.parametrize("bits", [8, 7])
def test_a_convolutional_network_keeps_its_accuracy_in_integers(bits, digits, tmp_path):
    def accuracy(logits):
        return float((torch.as_tensor(logits).argmax(-1) == digits.labels).float().mean())

    wanted = accuracy(digits.module(digits.pixels))
    assert wanted > 0.93
    transform = Int8Static(bits=bits, targets=("Linear", "Conv2d"), ignore=())
    batches = [{"pixels": batch} for batch in digits.seen[:128].split(32)]
    model = transform.apply(Model(copy.deepcopy(digits.module), None, frozenset({"weights:float"})), context(*batches))
    compile_tensors(model.module, {"pixels": digits.pixels[:1]}, tmp_path)
    with OnnxTensorSession(tmp_path, threads=1, spin=False) as session:
        found = session.run({"pixels": digits.pixels.numpy()})["output"]
    assert accuracy(found) >= wanted - 0.01
    with torch.inference_mode():
        assert distance(found, model.module(digits.pixels).numpy()) < 0.01
    ran = kernels(tmp_path, {"pixels": digits.pixels.numpy()}, tmp_path)
    # Where the sum goes on in floats no integers can come out of the convolution.
    assert (ran["QLinearConv"], ran["ConvInteger"], ran["MatMulIntegerToFloat"]) == (1, 2, 1)
    assert not ran & Counter(Conv=1, FusedConv=1, MatMul=1, Gemm=1, DequantizeLinear=1)


def test_lowering_of_encoders():
    encoder = frozenset({"task:feature-extraction", "arch:anything", "shape:pruned"})

    def lowered(*tags):
        return OnnxRuntime().lowering(encoder | set(tags))

    assert set(lowered("weights:float")) == {"weights:float"}
    for tags in (
        ("weights:int8-channel", "activations:int8-static"),
        ("weights:int8-channel", "activations:int8-static-asym"),
        ("weights:int7-channel", "activations:int8-static-asym"),
        ("weights:float", "weights:int4-channel-asym", "activations:int8-static-asym"),
    ):
        found = lowered(*tags)
        assert set(found) == set(tags)
        assert all(entry.possible and entry.native for entry in found.values())
        assert "MatMulIntegerToFloat" in found[tags[-1]].kernel
    assert lowered("weights:int4-group")["weights:int4-group"].kernel.startswith("MatMulNBits")
    assert not lowered("weights:int8-group", "activations:int8-static")["weights:int8-group"].possible
    assert lowered("weights:int7-channel", "activations:int8-dynamic")["weights:int7-channel"].native
    for activations in ("activations:int8-dynamic-asym", "activations:fp8-dynamic", "activations:fp8-static"):
        assert not lowered("weights:int8-channel", activations)[activations].possible
    # Weights alone: what happens to the activations is said.
    alone = lowered("weights:int8-channel")["weights:int8-channel"]
    assert alone.kernel.startswith("MatMulIntegerToFloat")
    assert "scale of each token" in alone.reason
    [exact] = EXACT.lowering(encoder | {"weights:int8-channel"}).values()
    assert exact.tolerance < 1e-3
    decoder = OnnxRuntime().lowering(frozenset({"task:causal-lm", "weights:int8-channel", "activations:int8-static"}))
    assert not decoder["activations:int8-static"].possible


@pytest.mark.slow
@pytest.mark.parametrize(
    ("transform", "tolerance", "least"),
    [
        (Int8Static(), STATIC_TOLERANCE, 0.97),
        (Int8Static(bits=7), STATIC_TOLERANCE, 0.97),
        (Int8Dynamic(), DYNAMIC_TOLERANCE, 0.995),
        (RTN(bits=8), DYNAMIC_TOLERANCE, 0.995),
    ],
)
def test_minilm_in_int8_stays_close_and_runs_as_integers(transform, tolerance, least, minilm, tmp_path):
    from optkit.builtin.texts import PythonReference

    model = load_folder(minilm)
    reference = copy.deepcopy(model.module)
    text = model.tokenizer(" ".join(PythonReference().texts())[:20000], add_special_tokens=False)["input_ids"]
    ends = model.tokenizer.cls_token_id, model.tokenizer.sep_token_id
    sequences = [(ends[0], *text[start : start + 126], ends[1]) for start in range(0, 126 * 16, 126)]
    batches = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, 128).long()} for ids in sequences]
    model = transform.apply(model, context(*batches[8:]))
    compiled(model, tmp_path)
    with BACKEND.open(tmp_path, tmp_path, LIMITS) as session:
        inputs = padded(sequences[:8], session.inputs)
        [hidden] = session.run(inputs).values()
        assert max(distances(session, model.module, sequences[:4])) < tolerance
    found = nn.functional.normalize(torch.from_numpy(hidden.mean(1)), dim=-1)
    plain = torch.from_numpy(np.stack([alone(reference, ids).mean(0) for ids in sequences[:8]]))
    cosine = (found * nn.functional.normalize(plain, dim=-1)).sum(-1)
    assert cosine.mean() >= least, f"mean {cosine.mean():.4f}, smallest {cosine.min():.4f}"
    assert kernels(tmp_path, inputs, tmp_path)["MatMulIntegerToFloat"] == 36


def test_a_profile_names_each_layer_and_what_it_computes(tiny_bert, tmp_path):
    model = tiny_bert()
    OnnxRuntime(threads=1).compile(model, tmp_path)
    ids = np.ones((3, 16), np.int64)
    with OnnxRuntime(threads=1).open(tmp_path, tmp_path, LIMITS) as session:
        kernels = {kernel.layer: kernel for kernel in session.profile({"input_ids": ids, "attention_mask": ids})}
    linears = {name: layer for name, layer in model.module.named_modules() if isinstance(layer, torch.nn.Linear)}
    linears.pop("pooler.dense")
    for name, layer in linears.items():
        # Query and key have a feature more in each of 4 heads.
        outputs = layer.out_features + (4 if name.endswith(("query", "key")) else 0)
        assert kernels[name].operations == 2 * ids.size * layer.in_features * outputs
        assert kernels[name].weight_bytes >= layer.weight.nbytes
        assert kernels[name].seconds > 0
    others = [kernel for name, kernel in kernels.items() if name not in linears]
    assert others
    assert not any(kernel.operations for kernel in others)
