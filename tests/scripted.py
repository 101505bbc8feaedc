"""The plugin of a backend that needs no runtime, for processes that tests start."""

from __future__ import annotations

import shutil
from pathlib import Path


def install_scripted(site: Path) -> None:
    """Install the plugin of `core/engine/optkit_scripted.py` into a directory, for who has it in its path."""
    info = site / "optkit_scripted-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "core/engine/optkit_scripted.py", site)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: optkit_scripted\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[optkit]\noptkit_scripted = optkit_scripted\n")
