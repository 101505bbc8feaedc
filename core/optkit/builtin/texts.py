"""Datasets of plain text."""

from __future__ import annotations

from collections.abc import Iterator

from optkit.builtin.files import locate
from optkit.datasets import TextDataset
from optkit.errors import DamagedError

__all__ = ["PythonReference", "TextFile"]


class PythonReference(TextDataset):
    """The English reference text of the Python language that every CPython carries (`pydoc_data.topics`).

    About 450,000 characters of technical prose: enough to compare a model with its optimized self on any machine
    without a download, not to rank models. The text differs a little between versions of Python.
    """

    def texts(self) -> Iterator[str]:
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))


class TextFile(TextDataset):
    """A UTF-8 text file; paragraphs that an empty line separates are the documents."""

    path: str
    """The file: a path, or `package:NAME/inner/path` for a file of an installed Python package."""

    def texts(self) -> Iterator[str]:
        file = locate(self.path)
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            what = f"not a readable UTF-8 text file (byte {error.start} is 0x{error.object[error.start]:02x})"
            raise DamagedError(what, where=self.path, remedy="save it as UTF-8") from error
        except OSError as error:
            raise DamagedError(
                f"not a readable UTF-8 text file ({error.strerror})", where=self.path, remedy="check the path"
            ) from error
        yield from (paragraph for paragraph in text.split("\n\n") if paragraph.strip())
