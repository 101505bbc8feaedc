"""Where keys come from, which are refused, and what a tenant tells."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from optkit.errors import RecipeError
from optkit.serve.guard.keys import Keys, check_address

ONE, TWO, THREE = "one-0123456789abcdef", "two-0123456789abcdef", "three-0123456789abcdef"


def written(directory: Path, text: str, mode: int = 0o600) -> Path:
    file = directory / "keys"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_no_key_anywhere_gives_none() -> None:
    assert Keys.load({}) is None


def test_keys_come_from_both_variables_and_a_file(tmp_path: Path) -> None:
    file = written(
        tmp_path, f"# ours\n\nalice: {THREE}\nadmin bob: bob-0123456789abcdef\nadmin root-0123456789abcdef\n"
    )
    keys = Keys.load({"OPTKIT_API_KEYS": f"{ONE}, {TWO}", "OPTKIT_ADMIN_KEYS": "admin-0123456789abcdef"}, file)
    assert keys is not None
    found = {key: keys.tenant(key) for key in (ONE, TWO, THREE, "bob-0123456789abcdef", "root-0123456789abcdef")}
    assert [tenant.admin for tenant in found.values() if tenant] == [False, False, False, True, True]
    assert found[THREE] is not None
    assert found[THREE].name == "alice"
    admin = keys.tenant("admin-0123456789abcdef")
    assert admin is not None
    assert admin.admin


@pytest.mark.parametrize("presented", ["", ONE[:-1], ONE + " ", ONE.upper(), "é" * 20, "\udcff" * 20, "x" * 30_000])
def test_what_is_no_key_belongs_to_nobody(presented: str) -> None:
    keys = Keys.load({"OPTKIT_API_KEYS": ONE})
    assert keys is not None
    assert keys.tenant(presented) is None


def test_salts_differ_between_keys_last_over_restarts_and_tell_nothing() -> None:
    first = Keys.load({"OPTKIT_API_KEYS": f"{ONE} {TWO}"})
    second = Keys.load({"OPTKIT_API_KEYS": TWO})
    assert first is not None
    assert second is not None
    one, two, again = first.tenant(ONE), first.tenant(TWO), second.tenant(TWO)
    assert one is not None
    assert two is not None
    assert one.salt != two.salt
    assert two == again
    assert ONE not in repr(one)
    assert one.salt not in repr(one)
    assert not one.name.removeprefix("key-").startswith(one.salt[:4])


def test_two_keys_of_one_name_are_one_tenant(tmp_path: Path) -> None:
    keys = Keys.load({}, written(tmp_path, f"alice: {ONE}\nalice: {TWO}"))
    assert keys is not None
    assert [tenant.name for key in (ONE, TWO) if (tenant := keys.tenant(key))] == ["alice", "alice"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alice: secret-short", ":1: an API key has 12 characters, not 16 to 256"),
        ("\nsecret-" + "x" * 300, ":2: an API key has 307 characters, not 16 to 256"),
        ("secret-0123456789é", ":1: an API key has characters other than printable ASCII"),
        ("alice: secret:0123456789abcdef", ":1: an API key has characters other than printable ASCII, or a comma or"),
        ("alice smith: secret-0123456789abcdef", ":1: is not a line of a key file; write KEY, NAME: KEY or admin NAME"),
        ("admin: secret-0123456789abcdef", ":1: a key named admin is not an admin's; write admin NAME: KEY"),
        (f"alice: {ONE}\nbob: {ONE}", "keys:2: this API key is also in "),
        (f"{TWO}\n{TWO}", "keys:2: this API key is also in "),
        ("# nothing\n", "keys: the file of API keys holds none; write one key a line"),
    ],
)
def test_a_wrong_file_says_where_and_what_and_never_a_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as raised:
        Keys.load({}, written(tmp_path, text))
    line = str(raised.value)
    assert message in line
    assert str(tmp_path / "keys") in line
    assert "secret-" not in line
    assert ONE not in line
    assert TWO not in line


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"OPTKIT_API_KEYS": " , "}, "OPTKIT_API_KEYS: is set and holds no API key; unset it"),
        ({"OPTKIT_API_KEYS": f"{ONE} short"}, "key 2 of OPTKIT_API_KEYS: an API key has 5 characters"),
        (
            {"OPTKIT_API_KEYS": ONE, "OPTKIT_ADMIN_KEYS": ONE},
            "key 1 of OPTKIT_ADMIN_KEYS: this API key is also in key 1 of OPTKIT_API_KEYS; keep it in one place",
        ),
    ],
)
def test_wrong_variables_say_which(environment: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Keys.load(environment)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644])
def test_a_file_that_others_may_read_or_write_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(RecipeError, match=f"found 'mode {mode:04o}'; run chmod 600 "):
        Keys.load({}, written(tmp_path, ONE, mode))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_owner_is_taken_as_it_is(tmp_path: Path) -> None:
    file = written(tmp_path, ONE, 0o644)
    os.chown(file, 12345, 12345)
    assert Keys.load({}, file) is not None


def test_a_missing_or_binary_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="missing: the file of API keys cannot be read: No such file or directory"):
        Keys.load({}, tmp_path / "missing")
    file = written(tmp_path, "")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="cannot be read: it is not UTF-8 text"):
        Keys.load({}, file)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "LOCALHOST"])
def test_loopback_needs_no_key(host: str) -> None:
    check_address(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.2", "127.1", "localhost.example", "example.com"])
def test_other_addresses_need_a_key(host: str) -> None:
    with pytest.raises(RecipeError, match="--host: without API keys only this machine may reach the server, found "):
        check_address(host, None)
    check_address(host, Keys.load({"OPTKIT_API_KEYS": ONE}))
