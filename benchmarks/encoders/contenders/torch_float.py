"""The model in transformers, float32: what a user has before optimizing anything.

Usage: python torch_float.py SEQUENCES FOLDER
"""

from __future__ import annotations

import os
import sys

import torch
import transformers
from turns import Floats, sequences, sorted_batches, take_turns


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rows, model = sequences(), transformers.AutoModel.from_pretrained(sys.argv[2], dtype=torch.float32).eval()

    def run(ids: torch.Tensor, mask: torch.Tensor) -> Floats:
        hidden = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state
        found: Floats = hidden.numpy()
        return found

    about = {"torch": torch.__version__, "transformers": transformers.__version__}
    with torch.inference_mode():
        take_turns(lambda: sorted_batches(rows, run), about | {"attention": model.config._attn_implementation})


if __name__ == "__main__":
    main()
