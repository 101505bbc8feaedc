"""Quantizers that run the model on a GPU: the same layers as on the CPU, and the model comes back to the CPU."""

from __future__ import annotations

import pytest
import torch

from optkit.blockwise import walk
from optkit.calibration import Calibration
from optkit.plugins import Plugins
from optkit.quantized import quantized_layers
from optkit.transforms import TransformContext

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
GROUP = {"granularity": "group", "group_size": 32}
STEPS = {
    "awq": {"quantize.awq": {"bits": 4, **GROUP}},
    "gptq": {"quantize.gptq": {"bits": 4, **GROUP}},
    "gptq with the head": {"quantize.gptq": {"bits": 4, **GROUP, "ignore": ()}},
    "int8_static": {"quantize.int8_static": {}},
    "int8_static histogram": {"quantize.int8_static": {"observer": "histogram"}},
    "int8_static mse": {"quantize.int8_static": {"observer": "mse"}},
    "fp8": {"quantize.fp8": {"activations": "static"}},
    "smoothquant": {"quantize.smoothquant": {}},
    "mixed": {"quantize.mixed": {"effective_bits": 6.0, "group_size": 32}},
    "mixed gptq": {"quantize.mixed": {"effective_bits": 6.0, "group_size": 32, "algorithm": "gptq"}},
    "kv_cache": {"quantize.kv_cache": {}},
}


def calibration() -> Calibration:
    random = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 250, (1, 64), generator=random) for _ in range(16)]
    return Calibration(tuple({"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids))


@pytest.mark.parametrize("name", STEPS)
def test_a_gpu_gives_the_model_that_the_cpu_gives(tiny_llama, name):
    [(plugin, options)] = STEPS[name].items()
    step = Plugins.load(third_party=False).get("transform", plugin)(**options)
    ids = calibration().inputs[0]["input_ids"]
    made = {}
    for device in ("cpu", "cuda"):
        context = TransformContext(lambda *_: None, calibration(), device=device)
        made[device] = step.apply(tiny_llama(), context).module
    assert {tensor.device.type for tensor in made["cuda"].state_dict().values()} == {"cpu"}
    ours, theirs = (dict(quantized_layers(module)) for module in made.values())
    assert ours.keys() == theirs.keys()
    float_logits = tiny_llama().module(ids).logits
    expected, found = (module(ids).logits for module in made.values())
    # Sums in another order move single numbers over a rounding boundary, not the distance to the float model.
    lost = (expected - float_logits).norm() / float_logits.norm()
    assert (found - float_logits).norm() / float_logits.norm() == pytest.approx(lost, rel=0.1, abs=1e-4)


def test_only_one_block_is_on_the_gpu_at_a_time(tiny_llama):
    module = tiny_llama(num_hidden_layers=4).module
    names = [name for name, layer in module.named_modules() if isinstance(layer, torch.nn.Linear)]
    for block in walk(module, TransformContext(lambda *_: None, calibration(), device="cuda"), names):
        there = {name for name, layer in module.model.layers.named_children() if layer.mlp.up_proj.weight.is_cuda}
        assert there == ({block.path.rpartition(".")[2]} if block.path else set())
        assert all(output.is_cuda for output in block.run())


def test_eight_bit_products_of_fp8_are_the_hardware_s(tiny_llama):
    """The reference rounding of E4M3 is that of the GPU: `torch._scaled_mm` over the same numbers agrees."""
    from optkit.quantized import round_activations
    from optkit.schemes import ActivationScheme, WeightScheme
    from optkit_quantize.rounding import round_weight

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no FP8 products")
    random = torch.Generator().manual_seed(1)
    weight, input = (torch.randn(256, 512, generator=random) for _ in range(2))
    stored, scale, _ = round_weight(weight, WeightScheme(8, None, symmetric=True, type="float"))
    token_scale = input.abs().amax(1, keepdim=True) / 448
    rounded = round_activations(input, ActivationScheme(dynamic=True, type="float"))
    expected = (rounded.double() @ (stored.double() * scale.double()).T).float()
    found = torch._scaled_mm(
        (input / token_scale).to(torch.float8_e4m3fn).cuda(),
        stored.cuda().t(),
        scale_a=token_scale.cuda(),
        scale_b=scale.cuda().t().contiguous(),
        out_dtype=torch.bfloat16,
    )
    torch.testing.assert_close(found.float().cpu(), expected, rtol=2e-2, atol=2e-1)
