"""The perplexity of a folder that transformers loads, whoever quantized it.

Usage: python judge.py FOLDER WINDOWS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from optkit.evaluate import ModelScorer

__all__ = ["perplexity"]


def perplexity(folder: Path, windows: Sequence[Sequence[int]]) -> float:
    """The perplexity of a causal language model in float32, by transformers' own code and compressed-tensors'.

    Args:
        folder: of Hugging Face, with float weights or in a format of compressed-tensors.
        windows: token ids; the first of a window is not predicted.
    """
    stored = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    groups = stored.get("config_groups", {}).values()
    # transformers 5.23 reads packed zero points only where it dequantizes at load. Then inputs would not be rounded.
    at_load = bool(groups) and not any(group["input_activations"] for group in groups)
    # Left out and not None, which would mean a model that is not quantized.
    further = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if at_load else {}
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **further).eval()
    scorer = ModelScorer(module)
    losses = []
    for window in windows:
        logits = torch.from_numpy(scorer.logits(tuple(window)))[:-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:]), reduction="none").numpy())
    return float(np.exp(np.concatenate(losses).mean()))


if __name__ == "__main__":
    print(json.dumps({"perplexity": perplexity(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))}))
