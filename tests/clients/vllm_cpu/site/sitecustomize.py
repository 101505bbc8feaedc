"""Hides packages from vLLM and from the processes that it starts.

It requires them, but PyPI has only builds for CUDA, which cannot be imported beside a torch without. Text needs none.
"""

import sys

sys.modules |= dict.fromkeys(("torchaudio", "torchcodec", "torchvision"))
