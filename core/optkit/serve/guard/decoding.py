"""Bodies of requests that come compressed, a piece at a time: no more is ever decompressed than asked for."""

from __future__ import annotations

import zlib

from optkit.serve.errors import ApiError

__all__ = ["Decoder"]

_WINDOWS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


class Decoder:
    """Of one body.

    Args:
        encoding: what Content-Encoding says.

    Raises:
        ApiError: 415, the encoding is not gzip or deflate.
    """

    def __init__(self, encoding: str) -> None:
        window = _WINDOWS.get(encoding.strip().lower())
        if window is None:
            raise ApiError(
                415,
                "the Content-Encoding is not supported; send gzip, deflate or none",
                headers={"accept-encoding": "gzip, deflate"},
            )
        self._stream = zlib.decompressobj(window)
        self._waiting = b""

    @property
    def hungry(self) -> bool:
        """Whether nothing more can come out before something goes in."""
        return not self._waiting

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the body."""
        self._waiting += data

    def take(self, limit: int) -> bytes:
        """At most `limit` decompressed bytes.

        Raises:
            ApiError: 400, the body is not what its encoding says.
        """
        try:
            piece = self._stream.decompress(self._waiting, limit)
        except zlib.error:
            raise _malformed() from None
        if self._stream.unused_data:
            raise _malformed()
        self._waiting = self._stream.unconsumed_tail
        return piece

    def end(self) -> None:
        """Say that the body is over.

        Raises:
            ApiError: 400, it is not over.
        """
        if not self._stream.eof:
            raise _malformed()


def _malformed() -> ApiError:
    return ApiError(400, "the body is not what its Content-Encoding says")
