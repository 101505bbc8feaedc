"""A model on calibration data one block after another, so that only one block is worked on at a time.

Each block gets the outputs that the blocks before it give now, after what was done to them, as in GPTQ (Frantar et al.,
arXiv:2210.17323, section 4).

    for block in walk(model.module, context, chosen):
        ranges = {}
        block.watch(block.names, lambda name, input: ranges.update({name: input.abs().amax()}))
        for name in block.names:
            replace_module(model.module, name, ...)
"""

from optkit.blockwise.stacks import Stack, output_of, patched, stack_of
from optkit.blockwise.walking import Block, Call, walk

__all__ = ["Block", "Call", "Stack", "output_of", "patched", "stack_of", "walk"]
