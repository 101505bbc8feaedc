"""The `weights/` folder: a standard Hugging Face folder, integer weights in compressed-tensors' formats.

transformers loads it as it is, and sentence-transformers that of a sentence encoder.
"""

from optkit.weights.facts import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    causal_lm_tags,
    holds_encoder,
    is_encoder,
    sentence_files,
)
from optkit.weights.folders import load_folder, quiet_transformers, save_folder

__all__ = [
    "CAUSAL_LM",
    "FEATURE_EXTRACTION",
    "causal_lm_tags",
    "holds_encoder",
    "is_encoder",
    "load_folder",
    "quiet_transformers",
    "save_folder",
    "sentence_files",
]
