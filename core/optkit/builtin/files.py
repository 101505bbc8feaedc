"""Files that a source reads: paths, and files inside installed packages."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from optkit.errors import MissingError

__all__ = ["locate", "sha256"]


def locate(path: str) -> Path:
    """The file or folder that `path` names.

    Args:
        path: a path, `~` allowed, or `package:NAME/inner/path` for a file that an installed Python package carries.
            The package is looked up, not imported.

    Raises:
        MissingError: it is not there.
    """
    if not path.startswith("package:"):
        found = Path(path).expanduser()
        if not found.exists():
            others = [other.name for other in found.parent.glob("*")]
            near = difflib.get_close_matches(found.name, others, n=1)
            remedy = f"did you mean {found.with_name(near[0])}?" if near else "check the path"
            raise MissingError("no such file or folder", where=path, remedy=remedy)
        return found
    package, _, inner = path.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise MissingError(f"the Python package {package!r} is not installed", where=path, remedy="pip install it")
    for root in spec.submodule_search_locations:
        found = Path(root, inner)
        if found.exists() and found.resolve().is_relative_to(Path(root).resolve()):
            return found
    raise MissingError(f"the Python package {package!r} holds no {inner!r}", where=path, remedy="check its version")


def sha256(files: Iterable[Path]) -> str:
    """SHA-256 over the names and bytes of `files`, in the given order, in hexadecimal."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\0".encode())
    return digest.hexdigest()
