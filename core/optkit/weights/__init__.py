"""The `weights/` folder: a standard Hugging Face folder, integer weights in compressed-tensors' formats.

transformers loads it as it is, and sentence-transformers that of a sentence encoder.
"""

from optkit.weights.facts import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    IMAGE_CLASSIFICATION,
    files_beside,
    folder_task,
    sentence_files,
    tags_of,
    task_tag,
)
from optkit.weights.folders import load_folder, quiet_transformers, save_folder
from optkit.weights.images import ImagePreparation

__all__ = [
    "CAUSAL_LM",
    "FEATURE_EXTRACTION",
    "IMAGE_CLASSIFICATION",
    "ImagePreparation",
    "files_beside",
    "folder_task",
    "load_folder",
    "quiet_transformers",
    "save_folder",
    "sentence_files",
    "tags_of",
    "task_tag",
]
