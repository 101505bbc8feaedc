"""Caches lie where the user says, or where the system keeps them."""

from pathlib import Path

import platformdirs

from optkit.locations import cache_root


def test_the_environment_decides(monkeypatch, tmp_path):
    monkeypatch.setenv("OPTKIT_CACHE", str(tmp_path))
    assert cache_root() == tmp_path


def test_a_home_folder_is_spelt_out(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OPTKIT_CACHE", "~/kept")
    assert cache_root() == tmp_path / "kept"


def test_without_a_choice_it_is_the_users_cache_folder(monkeypatch):
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("OPTKIT_CACHE")
        else:
            monkeypatch.setenv("OPTKIT_CACHE", unset)
        assert cache_root() == Path(platformdirs.user_cache_dir("optkit", appauthor=False))
