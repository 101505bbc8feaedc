"""What a folder of an image classifier says of it, how images are prepared, and convolutions that come back."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from optkit.builtin.huggingface import HuggingFace
from optkit.calibration import Calibration
from optkit.errors import DamagedError, MissingError, OptkitError, RecipeError
from optkit.quantized import QuantizedConv2d, QuantizedLinear, quantized_layers
from optkit.transforms import TransformContext
from optkit.weights import ImagePreparation, load_folder, save_folder
from optkit.weights.images import pixels_of
from optkit_prune.structured import Structured
from optkit_quantize.int8_static import Int8Static
from tests.picturing import NAMES, PIXELS, processor

CROPPED = {"do_center_crop": True, "crop_size": {"height": 31, "width": 30}}
NAMELESS = '{"architectures": ["UnknownForImageClassification"]}'
GRADIENT = np.linspace(0, 255, 37 * 53).reshape(37, 53).astype(np.uint8)


@pytest.fixture
def folder(tiny_classifier, tmp_path):
    return shutil.copytree(tiny_classifier, tmp_path / "model")


def pixels(rows=3):
    return torch.randn(rows, 1, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))


def logits(module, given):
    with torch.inference_mode():
        return module(pixel_values=given).logits


def calibrated(folder, **options):
    """A model whose layers of both kinds are int8."""
    data = Calibration(tuple({"pixel_values": pixels(8)} for _ in range(2)))
    quantizer = Int8Static(targets=("Conv2d", "Linear"), observer="minmax", **options)
    return quantizer.apply(load_folder(folder), TransformContext(lambda *_: None, data))


def test_a_card_says_what_the_loaded_model_is(folder):
    source = HuggingFace(model=str(folder))
    card, model = source.inspect(), source.load()
    kinds = ((torch.nn.Linear, card.linears), (torch.nn.Conv2d, card.convolutions))
    for kind, told in kinds:
        layers = {n: tuple(m.weight.shape) for n, m in model.module.named_modules() if isinstance(m, kind)}
        assert dict(told) == layers
        assert layers
    assert card.parameters == sum(p.numel() for p in model.module.parameters())
    assert card.tags == model.tags == {"task:image-classification", "arch:resnet", "weights:float"}
    assert (card.labels, card.pixels, card.max_length, card.hidden_size) == (NAMES, (1, PIXELS, PIXELS), 1, 32)
    assert model.files.keys() == {"preprocessor_config.json"}
    assert (model.tokenizer, card.kv_values_per_token, card.vocab_size) == (None, 0, 0)


def test_images_are_prepared_by_the_models_own_processor(folder):
    prepare = ImagePreparation.of_folder(folder)
    found = prepare(np.stack([GRADIENT] * 3, -1))
    [wanted] = processor()(images=[Image.fromarray(GRADIENT)], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(found, wanted)
    assert (prepare.shape, found.dtype, prepare.labels) == ((1, PIXELS, PIXELS), np.float32, NAMES)


@pytest.mark.parametrize(
    ("config", "preparation", "shape"),
    [
        ({"num_channels": 3}, processor(3).to_dict(), (3, PIXELS, PIXELS)),
        ({"num_channels": 3}, {**processor(3, size={"shortest_edge": 40}).to_dict(), **CROPPED}, (3, 31, 30)),
        # Older files name a feature extractor, and give one size.
        ({"num_channels": 3}, {"feature_extractor_type": "ViTFeatureExtractor", "size": 20}, (3, 20, 20)),
        ({}, {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 22}}, (3, 22, 22)),
    ],
)  # fmt: skip
def test_shapes_are_those_of_prepared_images(config, preparation, shape):
    text = json.dumps(preparation)
    prepare = ImagePreparation({"model_type": "resnet", **config}, {"preprocessor_config.json": text})
    assert prepare.shape == shape
    assert prepare(np.full((7, 91, 3), 200, np.uint8)).shape == shape
    assert pixels_of(config, text) == shape


def test_a_processor_that_keeps_proportions_is_refused():
    text = json.dumps({"image_processor_type": "ViTImageProcessor", "size": {"shortest_edge": 20}})
    prepare = ImagePreparation({"num_channels": 3}, {"preprocessor_config.json": text})
    with pytest.raises(RecipeError, match="keeps the proportions of images, which then share no batch, found"):
        assert prepare.shape


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda f: (f / "preprocessor_config.json").unlink(), DamagedError, "no preprocessor_config.json, so nothing"),
        (lambda f: (f / "preprocessor_config.json").write_text("[]"), DamagedError, "says no size"),
        (lambda f: (f / "preprocessor_config.json").write_text("{"), DamagedError, "says no size"),
        (lambda f: (f / "config.json").write_text(NAMELESS), DamagedError, "is incomplete"),
    ],
)  # fmt: skip
def test_what_a_folder_lacks_is_said_before_anything_is_loaded(folder, spoil, error, words):
    spoil(folder)
    with pytest.raises(error, match=words):
        HuggingFace(model=str(folder)).inspect()


def test_other_channels_and_unknown_processors_are_refused(folder):
    files = {"preprocessor_config.json": json.dumps({"image_processor_type": "NoSuchProcessor"})}
    with pytest.raises(RecipeError, match="other than one or three channels, found 4"):
        ImagePreparation({"num_channels": 4}, files)
    with pytest.raises(DamagedError, match="transformers has no such image processor"):
        ImagePreparation({}, files)


def test_without_pillow_it_says_how_to_get_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingError, match=r"prepared with Pillow; pip install 'optkit\[vision\]'"):
        ImagePreparation.of_folder(folder)


@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_convolutions_come_back(folder, tmp_path, symmetric):
    model = calibrated(folder, symmetric=symmetric, ignore=("resnet.embedder.embedder.convolution",))
    save_folder(model, tmp_path / "saved")
    again = load_folder(tmp_path / "saved")
    ours, theirs = dict(quantized_layers(model.module)), dict(quantized_layers(again.module))
    assert ours.keys() == theirs.keys()
    assert {type(layer) for layer in theirs.values()} == {QuantizedConv2d, QuantizedLinear}
    for name, layer in ours.items():
        assert layer.state_dict().keys() == theirs[name].state_dict().keys()
        assert all(torch.equal(one, theirs[name].state_dict()[key]) for key, one in layer.state_dict().items())
        assert (layer.scheme, layer.activations) == (theirs[name].scheme, theirs[name].activations)
    assert torch.equal(logits(model.module, pixels()), logits(again.module, pixels()))
    assert again.files == model.files
    card = HuggingFace(model=str(tmp_path / "saved")).inspect()
    assert card.tags == model.tags
    assert set(ours) <= {*card.linears, *card.convolutions}
    groups = json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]["config_groups"]
    assert [sorted(group["targets"]) for group in groups.values()] == [["Conv2d", "Linear"]]


def test_integer_weights_alone_have_no_format_for_a_convolution(folder, tmp_path):
    model = calibrated(folder)
    layer = next(layer for _, layer in quantized_layers(model.module) if isinstance(layer, QuantizedConv2d))
    layer.activations = None
    with pytest.raises(OptkitError, match="weights alone cannot be integers; quantize its activations too"):
        save_folder(model, tmp_path / "saved")


def test_pruned_convolutions_come_back(folder, tmp_path):
    data = Calibration(tuple({"pixel_values": pixels(4)} for _ in range(2)))
    pruner = Structured(parts=("channels",), flops="50%", importance="magnitude")
    model = pruner.apply(load_folder(folder), TransformContext(lambda *_: None, data))
    assert model.tags >= {"shape:pruned", "pruned:channels"}
    save_folder(model, tmp_path / "saved")
    again = load_folder(tmp_path / "saved")
    assert again.tags >= {"shape:pruned"}
    assert torch.equal(logits(model.module, pixels()), logits(again.module, pixels()))
    quantizer = Int8Static(targets=("Conv2d",), observer="minmax")
    small = quantizer.apply(again, TransformContext(lambda *_: None, data))
    save_folder(small, tmp_path / "small")
    assert torch.equal(logits(small.module, pixels()), logits(load_folder(tmp_path / "small").module, pixels()))
    before, after = (HuggingFace(model=str(place)).inspect().parameters for place in (folder, tmp_path / "small"))
    assert after < 0.8 * before
