"""An encoder's weights folder: what is saved is loaded, by optkit and by transformers, quantized or not."""

from __future__ import annotations

import pytest
import torch

from optkit.quantized import quantized_layers
from optkit.transforms import TransformContext
from optkit.weights import FEATURE_EXTRACTION, folder_task, load_folder, save_folder
from optkit_quantize.rtn import RTN

IDS = torch.tensor([[5, 200, 31, 7, 90, 12]])


def hidden(module):
    with torch.inference_mode():
        return module(input_ids=IDS).last_hidden_state


def test_it_is_saved_and_loaded_with_its_files(tiny_bert, tmp_path):
    model = tiny_bert()
    save_folder(model, tmp_path)
    loaded = load_folder(tmp_path)
    assert folder_task(tmp_path) == FEATURE_EXTRACTION
    assert type(loaded.module) is type(model.module)
    assert loaded.tags == model.tags
    assert FEATURE_EXTRACTION in loaded.tags
    assert loaded.files == model.files
    assert (tmp_path / "1_Pooling" / "config.json").read_text() == model.files["1_Pooling/config.json"]
    assert torch.equal(hidden(loaded.module), hidden(model.module))
    again = tmp_path / "again"
    save_folder(loaded, again)
    assert load_folder(again).files == model.files


@pytest.mark.parametrize(
    "scheme",
    [
        RTN(bits=8),
        RTN(bits=4, granularity="group", group_size=16),
        RTN(bits=8, granularity="group", group_size=16, symmetric=False),
        RTN(bits=8, ignore=("re:.*attention.*", "pooler.dense")),
    ],
)
def test_quantized_layers_are_those_that_were_saved(tiny_bert, tmp_path, scheme):
    from transformers import AutoModel

    model = scheme.apply(tiny_bert(), TransformContext(lambda *_: None))
    names = {name for name, _ in quantized_layers(model.module)}
    assert "encoder.layer.1.output.dense" in names
    assert ("pooler.dense" in names) == ("pooler.dense" not in scheme.ignore)
    save_folder(model, tmp_path)
    loaded = load_folder(tmp_path, tags=model.tags)
    assert {name for name, _ in quantized_layers(loaded.module)} == names
    assert loaded.files == model.files
    assert torch.equal(hidden(loaded.module), hidden(model.module))
    by_transformers = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    # `forward` itself, as sentence-transformers calls it.
    torch.testing.assert_close(hidden(by_transformers.forward), hidden(model.module), rtol=1e-5, atol=1e-5)
