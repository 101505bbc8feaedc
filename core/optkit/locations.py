"""Where optkit keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

__all__ = ["cache_root"]


def cache_root() -> Path:
    """The folder of all caches: `OPTKIT_CACHE` if it is set, else this user's cache folder. It need not exist yet."""
    chosen = os.environ.get("OPTKIT_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("optkit", appauthor=False))
