"""Writes the model as an ONNX graph that ONNX Runtime's and OpenVINO's own tools know how to optimize.

Usage: python exported.py FOLDER GRAPH

Attention is `eager`, which is what their fusions look for.
"""

from __future__ import annotations

import sys
import warnings

import torch
import transformers


class Encoder(torch.nn.Module):
    """From token ids and mask to the last layer's output."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.module = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.module(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def main() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "batch", 1: "tokens"} for name in [*names, "last_hidden_state"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this exporter is deprecated, and the only one whose graphs get fused
        torch.onnx.export(
            Encoder(sys.argv[1]).eval(),
            (mask.clone(), mask),
            sys.argv[2],
            dynamo=False,
            opset_version=17,
            input_names=names,
            output_names=["last_hidden_state"],
            dynamic_axes=axes,
        )


if __name__ == "__main__":
    main()
