"""An uploaded form, written to its file as it comes: neither memory nor the temporary directory ever holds it."""

from __future__ import annotations

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from optkit.serve.batches.files import Files, Writer
from optkit.serve.errors import ApiError

__all__ = ["Upload"]

_PARTS = 8
_VALUE = 256
"""Bytes of a field that is no file."""
_NAME = 255
"""Characters of a file's name."""


class Upload:
    """Takes a `multipart/form-data` body piece by piece. It blocks, so it is called in threads.

    Args:
        content_type: of the request.
        files: where the file goes.
        most: bytes that it may have.

    Raises:
        ApiError: that is no form.
    """

    def __init__(self, content_type: str | None, files: Files, most: int) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            raise ApiError(400, "the body is not multipart/form-data")
        self.filename = ""
        """The client's word for it."""
        self.fields: dict[str, str] = {}
        self.file: Writer | None = None
        self._files, self._most = files, most
        self._parts = 0
        self._ended = False
        self._header, self._headers = [b"", b""], dict[bytes, bytes]()
        self._name: str | None = None
        """Of the field that comes now; None: it is the file."""
        self._value = bytearray()
        try:
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._part_begins,
                    "on_header_field": lambda data, start, end: self._add_header(0, data[start:end]),
                    "on_header_value": lambda data, start, end: self._add_header(1, data[start:end]),
                    "on_header_end": self._header_ends,
                    "on_headers_finished": self._headers_end,
                    "on_part_data": lambda data, start, end: self._add(data[start:end]),
                    "on_part_end": self._part_ends,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise ApiError(400, "the body's boundary is not one of a form") from error

    def feed(self, data: bytes) -> None:
        """Take what came.

        Raises:
            ApiError: it is no form, or there is too much of it.
            MachineError: there is no room for the file.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise ApiError(400, "the body is no whole form") from error

    def end(self) -> Writer:
        """All has come.

        Returns:
            The file, which has no name yet.

        Raises:
            ApiError: something is missing.
        """
        if not self._ended:
            raise ApiError(400, "the body is no whole form")
        if self.file is None:
            raise ApiError(400, "file is missing", param="file")
        return self.file

    def discard(self) -> None:
        """Remove what there is of the file."""
        if self.file is not None:
            self.file.discard()

    def _part_begins(self) -> None:
        self._parts += 1
        if self._parts > _PARTS:
            raise ApiError(400, f"the form has more than {_PARTS} parts")
        self._headers.clear()
        self._value.clear()

    def _add_header(self, half: int, data: bytes) -> None:
        self._header[half] += data  # the parser bounds it

    def _header_ends(self) -> None:
        name, value = self._header
        self._headers[name.lower()] = value
        self._header = [b"", b""]

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name != "file":
            self._name = name
            return
        if self.file is not None:
            raise ApiError(400, "there is more than one file", param="file")
        self._name = None
        self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
        if not 0 < len(self.filename) <= _NAME:
            raise ApiError(400, f"the file has no name of 1 to {_NAME} characters", param="file")
        self.file = self._files.begin()

    def _add(self, data: bytes) -> None:
        if self._name is None and self.file is not None:
            if self.file.size + len(data) > self._most:
                raise ApiError(413, f"the file has more than {self._most} bytes", param="file", code="file_too_large")
            self.file.write(data)
            return
        self._value += data
        if len(self._value) > _VALUE:
            raise ApiError(400, f"a field has more than {_VALUE} bytes")

    def _part_ends(self) -> None:
        if self._name is not None:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self._ended = True
