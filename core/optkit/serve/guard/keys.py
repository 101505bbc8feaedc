"""API keys: where they are read, and whom a presented one belongs to."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from optkit.errors import RecipeError

__all__ = ["LOCAL", "Keys", "Tenant", "check_address", "is_loopback"]

API_VARIABLE = "OPTKIT_API_KEYS"
ADMIN_VARIABLE = "OPTKIT_ADMIN_KEYS"

_SHORTEST, _LONGEST = 16, 256
_SEPARATORS = re.compile(r"[,\s]+")
_KEY = re.compile(r"[!-~]+")
_LINE = re.compile(r"(?:(?P<admin>admin)\s+)?(?:(?P<name>[A-Za-z0-9._-]{1,64})\s*:\s*)?(?P<key>\S+)")


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who sends a request.

    Args:
        name: for logs and for who owns what: the name that the key was given, or one derived from the key.
        salt: keeps the prefix caches of tenants apart. Says nothing about the key, and is the same after a restart.
        admin: may load and unload models.
    """

    name: str
    salt: str = field(repr=False)
    admin: bool


LOCAL = Tenant("local", "", True)
"""Everybody, where there are no keys."""


class _Entry(NamedTuple):
    where: str
    key: str
    name: str | None
    admin: bool


class Keys:
    """All keys of a server, as digests. Two keys of one name are one tenant, so that a key can be replaced in peace."""

    def __init__(self, entries: Iterable[_Entry]) -> None:
        self._tenants: list[tuple[bytes, Tenant]] = []
        seen: dict[bytes, str] = {}
        for entry in entries:
            digest = _digest(entry.key)
            if digest in seen:
                raise RecipeError(
                    f"this API key is also in {seen[digest]}", where=entry.where, remedy="keep it in one place"
                )
            seen[digest] = entry.where
            self._tenants.append((digest, _tenant(entry)))

    @classmethod
    def load(cls, environment: Mapping[str, str], file: Path | None = None) -> Keys | None:
        """Those of OPTKIT_API_KEYS, OPTKIT_ADMIN_KEYS (commas or spaces between them) and `file`; None without any.

        A line of the file is `KEY` or `NAME: KEY`, with `admin` before it for a key that may load and unload models.
        Lines that begin with # are comments.

        Raises:
            RecipeError: a key is too short, has characters that keys may not have, or is there twice; a place that is
                named holds none; the file belongs to the user of the server and others may read it.
        """
        entries: list[_Entry] = []
        for variable, admin in ((API_VARIABLE, False), (ADMIN_VARIABLE, True)):
            if variable in environment:
                entries += _of_variable(variable, environment[variable], admin=admin)
        if file is not None:
            entries += _of_file(file)
        return cls(entries) if entries else None

    def tenant(self, presented: str) -> Tenant | None:
        """Whose key this is. Compares with all keys in constant time, whichever matches."""
        digest = _digest(presented)
        found = None
        for known, tenant in self._tenants:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found


def check_address(host: str, keys: Keys | None) -> None:
    """Refuse to listen to other machines without a key.

    Raises:
        RecipeError: `host` is not a loopback address and there are no keys.
    """
    if keys is None and not is_loopback(host):
        raise RecipeError(
            "without API keys only this machine may reach the server",
            where="--host",
            found=host,
            remedy=f"set {API_VARIABLE} or give a file of keys, or bind 127.0.0.1",
        )


def is_loopback(host: str) -> bool:
    """Whether a name or an address, without a port, is this machine's own."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _of_variable(variable: str, text: str, *, admin: bool) -> list[_Entry]:
    keys = [key for key in _SEPARATORS.split(text) if key]
    if not keys:
        raise RecipeError("is set and holds no API key", where=variable, remedy="unset it, or put a key into it")
    entries = [_Entry(f"key {number} of {variable}", key, None, admin) for number, key in enumerate(keys, 1)]
    for entry in entries:
        _check(entry)
    return entries


def _of_file(file: Path) -> list[_Entry]:
    try:
        # Of the opened file, so that nobody swaps it between the look at its mode and the reading.
        with file.open(encoding="utf-8") as stream:
            _check_mode(file, os.fstat(stream.fileno()))
            lines = stream.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RecipeError(f"the file of API keys cannot be read: {reason}", where=str(file)) from None
    entries = [
        _of_line(f"{file}:{number}", line.strip())
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.strip().startswith("#")
    ]
    if not entries:
        raise RecipeError("the file of API keys holds none", where=str(file), remedy="write one key a line")
    return entries


def _of_line(where: str, line: str) -> _Entry:
    match = _LINE.fullmatch(line)
    if match is None:
        raise RecipeError("is not a line of a key file", where=where, remedy="write KEY, NAME: KEY or admin NAME: KEY")
    name = match["name"]
    if name == "admin":
        raise RecipeError(
            "a key named admin is not an admin's", where=where, remedy="write admin NAME: KEY, or take another name"
        )
    entry = _Entry(where, match["key"], name, match["admin"] is not None)
    _check(entry)
    return entry


def _check(entry: _Entry) -> None:
    # Never `found=`: a message must not carry a key, and the length of one is enough to repair it.
    remedy = "take one from: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
    if not _KEY.fullmatch(entry.key) or ":" in entry.key or "," in entry.key:
        what = "an API key has characters other than printable ASCII, or a comma or colon"
        raise RecipeError(what, where=entry.where, remedy=remedy)
    if not _SHORTEST <= len(entry.key) <= _LONGEST:
        what = f"an API key has {len(entry.key)} characters, not {_SHORTEST} to {_LONGEST}"
        raise RecipeError(what, where=entry.where, remedy=remedy)


def _check_mode(file: Path, status: os.stat_result) -> None:
    # A file of another owner, such as a secret that Kubernetes mounts, is not ours to change: who gave it decided.
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and status.st_mode & 0o077:
        raise RecipeError(
            "other users may read or write the API keys",
            where=str(file),
            found=f"mode {stat.S_IMODE(status.st_mode):04o}",
            remedy=f"run chmod 600 {file}",
        )


def _tenant(entry: _Entry) -> Tenant:
    name = entry.name or "key-" + _derived(entry.key, b"optkit tenant name")[:8]
    return Tenant(name, _derived(entry.key, b"optkit prefix cache"), entry.admin)


def _derived(key: str, purpose: bytes) -> str:
    return hmac.new(key.encode(), purpose, hashlib.sha256).hexdigest()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
