"""Walking a model block by block: every block sees what the one before gives, and a killed walk goes on."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from optkit.blockwise import walk
from optkit.calibration import Calibration
from optkit.checkpoints import Checkpoint
from optkit.errors import OptkitError
from optkit.quantized import ActivationScheme, QuantizedLinear, WeightScheme, replace_module
from optkit.transforms import TransformContext
from tests.calibrating import context, texts


def linears(module: nn.Module) -> list[str]:
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]


def outputs(module: nn.Module, calibration: Calibration) -> list[torch.Tensor]:
    return [module(**batch)[0] for batch in calibration.inputs]


def coarse(layer: nn.Linear, *, activations: bool = False) -> QuantizedLinear:
    """A quantized layer that changes what the blocks after it see."""
    scale = layer.weight.abs().amax(1, keepdim=True) / 3
    weight = (layer.weight / scale).round().to(torch.int8)
    rounded = ActivationScheme(dynamic=False) if activations else None
    step = torch.tensor([0.1]) if activations else None
    return QuantizedLinear(weight, scale, None, layer.bias, WeightScheme(4, None, True), rounded, step)


def tiny_mpnet() -> nn.Module:
    """Its blocks give tuples."""
    torch.manual_seed(0)
    config = transformers.MPNetConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return transformers.MPNetModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["llama", "bert", "mpnet"])
def test_the_blocks_and_what_is_around_them_compute_what_the_model_does(kind, tiny_llama, tiny_bert):
    module = tiny_mpnet() if kind == "mpnet" else (tiny_llama if kind == "llama" else tiny_bert)().module
    calibration = texts(12, 20, 7)
    expected = outputs(module, calibration)
    seen: dict[str, torch.Tensor] = {}
    for name in linears(module):
        module.get_submodule(name).register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0]}))
    module(**calibration.inputs[-1])
    whole, last = dict(seen), {}
    paths = []
    for block in walk(module, context(calibration), linears(module)):
        paths.append(block.path)
        block.watch(block.names, lambda name, input: last.update({name: input}))
        if not block.path:
            for given, wanted in zip(block.run(), expected, strict=True):
                torch.testing.assert_close(given, wanted)
    stem = "model.layers" if kind == "llama" else "encoder.layer"
    assert paths == [f"{stem}.0", f"{stem}.1", ""]
    assert list(last) == linears(module)
    for name, input in whole.items():
        torch.testing.assert_close(last[name], input)


def test_a_block_sees_what_was_done_to_the_blocks_before_it(tiny_llama):
    module, calibration = tiny_llama().module, texts(9, 5)
    reached = []
    for block in walk(module, context(calibration), linears(module)):
        for name in block.names:
            replace_module(module, name, coarse(module.get_submodule(name)))
        if not block.path:
            reached = list(block.run())
    for given, wanted in zip(reached, outputs(module, calibration), strict=True):
        torch.testing.assert_close(given, wanted)


@pytest.mark.parametrize("activations", [False, True])
def test_a_walk_that_was_cut_off_goes_on_at_the_block_where_it_was(tiny_llama, tmp_path, activations):
    calibration = texts(9, 5)

    def worked_on(stop: str | None) -> tuple[nn.Module, list[str]]:
        module, visited = tiny_llama(num_hidden_layers=4).module, []
        for block in walk(module, context(calibration, Checkpoint(tmp_path)), linears(module)):
            visited.append(block.path)
            if block.path == stop:
                return module, visited
            for name in block.names:
                replace_module(module, name, coarse(module.get_submodule(name), activations=activations))
        return module, visited

    assert worked_on("model.layers.2")[1] == ["model.layers.0", "model.layers.1", "model.layers.2"]
    resumed, visited = worked_on(None)
    assert visited == ["model.layers.2", "model.layers.3", ""]
    whole = tiny_llama(num_hidden_layers=4).module
    for block in walk(whole, context(calibration), linears(whole)):
        for name in block.names:
            replace_module(whole, name, coarse(whole.get_submodule(name), activations=activations))
    for given, wanted in zip(outputs(resumed, calibration), outputs(whole, calibration), strict=True):
        assert torch.equal(given, wanted)


def test_blocks_without_a_chosen_layer_are_passed_through_and_those_after_the_last_not_run(tiny_llama):
    module = tiny_llama(num_hidden_layers=4).module
    ran = []
    for index, layer in enumerate(module.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    chosen = ["model.layers.1.mlp.up_proj"]
    walked = walk(module, context(texts(6)), chosen)
    assert [(block.path, block.names) for block in walked] == [("model.layers.1", tuple(chosen))]
    assert ran == [0, 1, 2, 3, 0]  # all for a few tokens, to find the blocks; then only what leads to the chosen one


def test_a_block_that_stays_as_it_is_runs_once_while_it_is_watched(tiny_llama):
    module, calibration = tiny_llama(num_hidden_layers=4).module, texts(9, 5)
    ran: list[int] = []
    for index, layer in enumerate(module.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    last = []
    for block in walk(module, context(calibration), linears(module), changed=False):
        if block.path == "model.layers.2":
            continue  # not watched: it is run to go on
        block.watch(block.names, lambda *_: None)
        last = block.watched
    assert ran == [0, 1, 2, 3, *(index for index in range(4) for _ in calibration.inputs)]  # first, to find the blocks
    for given, wanted in zip(last, outputs(module, calibration), strict=True):
        torch.testing.assert_close(given, wanted)


def test_a_call_can_be_made_again(tiny_llama):
    module = tiny_llama().module
    for block in walk(module, context(texts(9, 5)), linears(module)):
        if block.path:
            attention = module.get_submodule(f"{block.path}.self_attn")
            made = []
            with torch.no_grad():
                hook = attention.register_forward_hook(lambda _, __, output: made.append(output[0]))  # noqa: B023
                calls = block.calls(f"{block.path}.self_attn")
                hook.remove()
                for call, wanted in zip(calls, made, strict=True):
                    assert torch.equal(attention(*call.args, **call.kwargs)[0], wanted)


@pytest.mark.parametrize(("most", "lengths"), [(None, [9, 5, 8, 7, 6]), (5, [9, 5, 8, 7, 6]), (3, [9, 8, 6]), (1, [9])])
def test_calls_of_some_of_the_batches_are_evenly_spaced(tiny_llama, most, lengths):
    module = tiny_llama().module
    block = next(walk(module, context(texts(9, 5, 8, 7, 6)), linears(module)))
    found = block.calls(f"{block.path}.self_attn.o_proj", most)
    assert [call.args[0].shape[1] for call in found] == lengths


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU())
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(pixels).flatten(1))


class Ladder(nn.Module):
    """A list of modules that do not follow each other."""

    def __init__(self) -> None:
        super().__init__()
        self.rungs = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.rungs[0](pixels) + self.rungs[1](pixels)


@pytest.mark.parametrize(("module", "shape"), [(Convolutional(), (2, 1, 8, 8)), (Ladder(), (2, 4))])
def test_a_model_without_blocks_is_one_block(module, shape):
    batches = Calibration(({"pixels": torch.randn(shape)}, {"pixels": torch.randn(shape)}))
    assert (batches.samples, batches.tokens) == (4, 0)
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    seen = []
    for block in walk(module, context(batches), names):
        assert (block.path, block.module, list(block.names)) == ("", module, names)
        block.watch(block.names, lambda name, input: seen.append(name))
        for given, batch in zip(block.run(), batches.inputs, strict=True):
            assert torch.equal(given, module(**batch))
    assert sorted(seen) == sorted(names * 2)


def test_progress_tells_of_every_batch_and_of_the_end(tiny_llama):
    module, told = tiny_llama().module, []
    walked = walk(module, TransformContext(lambda *news: told.append(news), texts(6, 6)), linears(module))
    for block in walked:
        list(block.run())
    assert told[0] == (0, 3, "model.layers.0")
    assert told[-1] == (3, 3, "done")
    assert len(told) == 2 * 2 * 2 + 2 + 1  # run by us and by the walk, around the blocks by us only, and the end


def test_no_data_is_refused(tiny_llama):
    module = tiny_llama().module
    with pytest.raises(OptkitError, match="no calibration data"):
        next(walk(module, TransformContext(lambda *_: None), linears(module)))


def test_a_block_that_gives_nan_is_named(tiny_llama):
    module = tiny_llama().module
    module.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(OptkitError, match=r"model\.layers\.0: gives NaN"):
        list(walk(module, context(texts(6)), linears(module)))


def test_a_checkpoint_holds_what_was_saved_whole_or_nothing(tmp_path):
    kept = Checkpoint(tmp_path / "new")
    assert kept.load("one") is None
    shared = torch.arange(4.0)
    kept.save("one", {"a": shared, "b": shared[1:]}, {"n": 1})
    tensors, facts = kept.load("one")
    assert facts == {"n": 1}
    assert torch.equal(tensors["b"], shared[1:])
    (tmp_path / "new" / "two.part").write_bytes(b"half")
    assert kept.load("two") is None
    assert Checkpoint().load("one") is None
