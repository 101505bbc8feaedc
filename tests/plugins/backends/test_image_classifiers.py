"""Image classifiers on every backend that takes them: the model's own logits, and what recipes keep of its accuracy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from optkit.apply import apply, make_plan
from optkit.binding import from_data
from optkit.calibration import Calibration
from optkit.errors import RecipeError
from optkit.plugins import Plugins
from optkit.quantized import QuantizedLayer
from optkit.recipe import bind_recipe
from optkit.steps import Limits
from optkit.transforms import TransformContext
from optkit.weights import load_folder, save_folder
from optkit_quantize.int8_static import Int8Static
from tests.picturing import PIXELS, save, taught, write_images

PLUGINS = Plugins.load(third_party=False)
BACKENDS = ("torch", "torch_compile", "torchscript", "aot_inductor", "onnxruntime", "openvino")
# Each takes seconds to compile.
LONG = {"aot_inductor", "onnxruntime", "torch_compile"}
QUICK = pytest.mark.parametrize("name", [name for name in BACKENDS if name not in LONG])


def noise(rows):
    return torch.randn(rows, 1, PIXELS, PIXELS, generator=torch.Generator().manual_seed(rows))


def transformed(model, format, **options):
    data = Calibration(tuple({"pixel_values": noise(8)} for _ in range(2)))
    if format == "float":
        return model
    quantizer = Int8Static(targets=("Conv2d", "Linear"), observer="minmax", **options)
    return quantizer.apply(model, TransformContext(lambda *_: None, data))


def opened(name, model, folder):
    """A session over what a backend compiled, and the distance that it allows itself."""
    backend = PLUGINS.get("backend", name)()
    if reason := backend.unavailable() or backend.uncompilable():
        pytest.skip(f"{name} {reason}")
    lowered = backend.lowering(model.tags)
    impossible = [f"{tag}: {how.reason}" for tag, how in lowered.items() if not how.possible]
    assert not impossible
    save_folder(model, folder / "weights")
    (folder / "runtime").mkdir()
    backend.compile(model, folder / "runtime")
    session = backend.open(folder / "runtime", folder / "weights", Limits(8, 1))
    return session, max(how.tolerance for how in lowered.values())


def check(name, model, folder):
    session, tolerance = opened(name, model, folder)
    with session:
        [pixels], [logits] = session.inputs.items(), session.outputs.items()
        labels = model.module.config.num_labels
        assert (pixels[0], pixels[1].dtype, pixels[1].shape[1:]) == ("pixel_values", "float32", (1, PIXELS, PIXELS))
        assert (logits[0], logits[1].dtype, logits[1].shape[1:]) == ("logits", "float32", (labels,))
        for rows in (1, 2, 7):
            found = session.run({"pixel_values": noise(rows).numpy()})["logits"]
            with torch.inference_mode():
                wanted = model.module(pixel_values=noise(rows)).logits.numpy()
            assert found.shape == wanted.shape
            assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)
        times = session.profile({"pixel_values": noise(2).numpy()})
    assert sum(kernel.seconds for kernel in times) > 0
    products = {
        path
        for path, layer in model.module.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear | QuantizedLayer)
    }
    assert products - {kernel.layer for kernel in times} == set()


@pytest.mark.parametrize("format", ["float", "int8 static"])
@QUICK
def test_a_backend_gives_the_logits_of_the_model(tiny_classifier, tmp_path, name, format):
    check(name, transformed(load_folder(tiny_classifier), format), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(LONG))
def test_so_does_one_that_compiles_for_long(tiny_classifier, tmp_path, name):
    """In every format: test_parity.py."""
    check(name, transformed(load_folder(tiny_classifier), "int8 static"), tmp_path)


SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PATCHES = ("vit.embeddings.patch_embeddings.projection",)
OTHERS = {
    "vit": lambda: transformers.ViTConfig(**SIZE, image_size=PIXELS, patch_size=6, num_channels=1, num_labels=10),
    "mobilenet_v2": lambda: transformers.MobileNetV2Config(
        num_channels=1, image_size=PIXELS, depth_multiplier=0.25, num_labels=10
    ),
    "convnext": lambda: transformers.ConvNextConfig(
        num_channels=1, patch_size=4, depths=[1, 1], hidden_sizes=[16, 32], num_labels=10, num_stages=2
    ),
}


@pytest.mark.parametrize(
    "kind", ["vit", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("convnext", "mobilenet_v2"))]
)
def test_other_architectures_run_as_well(tmp_path, kind):
    torch.manual_seed(0)
    module = transformers.AutoModelForImageClassification.from_config(OTHERS[kind]()).eval()
    folder = tmp_path / "model"
    save(module, folder)
    if kind == "vit":
        # It casts images to the type of the weights that embed patches.
        model = transformed(load_folder(folder), "int8 static")
        with pytest.raises(RecipeError, match=r"leave that convolution out \(ignore\), such as the patch embedding"):
            model.module(pixel_values=noise(1))
    model = transformed(load_folder(folder), "int8 static", ignore=PATCHES if kind == "vit" else ())
    check("torchscript", model, tmp_path)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with a model that has learnt `train`, and `test`."""
    folder = tmp_path_factory.mktemp("digits")
    write_images(folder)
    save(taught(), folder / "model")
    return folder


def applied(digits, tmp_path, samples=256, **changes):
    images = {split: {"imagefolder": {"path": str(digits / split)}} for split in ("train", "test")}
    gates = [{"metric": "accuracy", "at_least": "-1%"}, {"metric": "label_agreement", "at_least": 0.97}]
    recipe = {
        "model": {"hf": {"model": str(digits / "model")}},
        "evaluation": {"dataset": images["test"], "images": 500},
        "benchmark": {"blocks": 3},
        "batching": {"static": {"max_batch_size": 32}},
        "calibration": {"dataset": images["train"], "samples": samples},
        "gates": gates,
    }
    plan = make_plan(bind_recipe(from_data(recipe | changes), PLUGINS), PLUGINS)
    return apply(plan, PLUGINS, tmp_path / "out", progress=lambda *_: None).artifact


STATIC = {"quantize.int8_static": {"targets": ["Conv2d", "Linear"]}}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_recipe_keeps_the_accuracy(digits, tmp_path, name):
    backend = PLUGINS.get("backend", name)()
    if reason := backend.unavailable() or backend.uncompilable():
        pytest.skip(f"{name} {reason}")
    artifact = applied(digits, tmp_path, backend=name, transforms=[STATIC])
    accuracy = artifact.report()["metrics"]["accuracy"]
    assert accuracy["baseline"] > 0.95
    assert accuracy["value"] >= accuracy["baseline"] - 0.01


def products(module):
    """Multiplications for one image."""
    counted = []

    def count(layer, args, output):
        counted.append(layer.weight.numel() * output[0, 0].numel())

    layers = [part for part in module.modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Linear | QuantizedLayer)]
    for layer in layers:
        layer.register_forward_hook(count)
    module(pixel_values=noise(1))
    return sum(counted)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_half_of_the_multiplications_in_int8_cost_less_than_a_point(digits, tmp_path, name):
    prune = {"prune.structured": {"parts": ["channels"], "flops": "50%"}}
    recover = {"prune.recover": {"steps": 200, "batch_tokens": 64, "at_least": 0.5}}
    artifact = applied(digits, tmp_path, samples=1024, backend=name, transforms=[prune, recover, STATIC])
    pruned, whole = load_folder(artifact.weights).module, load_folder(digits / "model").module
    assert products(pruned) <= products(whole) / 2
    accuracy = artifact.report()["metrics"]["accuracy"]
    assert accuracy["value"] >= accuracy["baseline"] - 0.01
    judged = [step.effect["metrics"]["accuracy"]["value"] for step in artifact.manifest.steps[:3]]
    assert judged[0] < judged[1] - 0.1, "recovery won something back"
