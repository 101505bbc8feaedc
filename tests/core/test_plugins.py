"""Discovery: lazy, in order, and never taken down by one bad plugin."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from optkit.batching import Batcher
from optkit.errors import MissingError, RecipeError
from optkit.hookspecs import hookimpl
from optkit.plugins import Plugins
from optkit.transforms import Transform
from optkit_quantize.rtn import RTN


class Offers:
    """A plugin that offers what it is given."""

    def __init__(self, **transforms):
        self._transforms = transforms

    @hookimpl
    def register_transforms(self):
        return self._transforms


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder on the path where distributions can be put: `site(name, module text)`."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        info = tmp_path / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[optkit]\n{name} = {name}\n")

    yield add
    for name in [
        name
        for name, module in sys.modules.items()
        if getattr(module, "__file__", "") and str(tmp_path) in str(module.__file__)
    ]:
        del sys.modules[name]


GOOD = """
    from optkit.hookspecs import hookimpl
    @hookimpl
    def register_transforms():
        return {"good.rtn": "optkit_quantize.rtn:RTN"}
"""


def test_ours_are_found():
    plugins = Plugins.load()
    assert plugins.broken == []
    assert {"quantize.rtn", "prune.magnitude"} <= set(plugins.names("transform"))
    assert {"torch", "onnxruntime"} <= set(plugins.names("backend"))
    assert plugins.get("transform", "quantize.rtn") is RTN
    for offer in plugins.registered:
        plugins.get(offer.kind, offer.name)


def test_a_strangers_plugin_comes_through_the_same_door(site):
    site("optkit_good", GOOD)
    found = Plugins.load().find("transform", "good.rtn")
    assert (found.plugin, found.distribution, found.version) == ("optkit_good", "optkit_good", "1.2")


def test_a_broken_plugin_is_named_and_the_rest_works(site):
    site("optkit_good", GOOD)
    site("optkit_bad", "raise ImportError('no\\nluck')")
    plugins = Plugins.load()
    (broken,) = plugins.broken
    assert (broken.plugin, broken.distribution, broken.version) == ("optkit_bad", "optkit_bad", "1.2")
    assert broken.reason == "ImportError: no luck"
    assert "good.rtn" in plugins.names("transform")
    with pytest.raises(RecipeError, match=r"not loaded: optkit_bad of optkit_bad"):
        plugins.get("transform", "bad.thing")


@pytest.mark.parametrize(
    "text",
    [
        "from optkit.hookspecs import hookimpl\n@hookimpl\ndef register_transfroms(): return {}",
        "from optkit.hookspecs import hookimpl\n@hookimpl\ndef register_transforms(extra): return {}",
        "from optkit.hookspecs import hookimpl\n@hookimpl\ndef register_transforms(): return ['rtn']",
        "from optkit.hookspecs import hookimpl\n@hookimpl\ndef register_transforms(): return {'a': 3}",
        "from optkit.hookspecs import hookimpl\n@hookimpl\ndef register_transforms(): raise KeyError('x')",
    ],
)
def test_a_wrong_registration_breaks_only_its_plugin(site, text):
    site("optkit_bad", text)
    plugins = Plugins.load()
    assert [broken.plugin for broken in plugins.broken] == ["optkit_bad"]
    assert "quantize.rtn" in plugins.names("transform")


def test_plugins_can_be_left_out(site, monkeypatch):
    site("optkit_good", GOOD)
    site("optkit_other", GOOD.replace("good.rtn", "other.rtn"))

    def offered(**options):
        return {
            name for name in Plugins.load(**options).names("transform") if name.endswith("d.rtn") or name == "other.rtn"
        }

    assert offered() == {"good.rtn", "other.rtn"}
    assert offered(third_party=False) == set()
    assert offered(block=["optkit_good"]) == {"other.rtn"}
    monkeypatch.setenv("OPTKIT_PLUGINS", "optkit_good, ")
    assert offered() == {"good.rtn"}
    monkeypatch.setenv("OPTKIT_PLUGINS", "")
    assert offered() == set()
    assert "quantize.rtn" in Plugins.load().names("transform")
    assert "quantize.rtn" not in Plugins.load(block=["quantize"]).names("transform")


def test_two_plugins_of_one_name_are_an_error_for_who_uses_it():
    plugins = Plugins()
    plugins.register(Offers(**{"a.one": RTN, "a.two": RTN}), "first", "dist-one", "1")
    plugins.register(Offers(**{"a.one": RTN}), "second", "dist-two", "2")
    assert plugins.get("transform", "a.two") is RTN
    with pytest.raises(
        RecipeError, match=r"'a.one' is offered by two plugins, first \(dist-one\) and second \(dist-two\)"
    ):
        plugins.get("transform", "a.one")


def test_unknown_names_come_with_a_suggestion():
    with pytest.raises(
        RecipeError, match=r"^r.yaml:3:5: unknown transform, found 'quantise.rtn'; did you mean 'quantize.rtn'\?$"
    ):
        Plugins.load().get("transform", "quantise.rtn", where="r.yaml:3:5")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("optkit_nowhere:Thing", "failed to load 'optkit_nowhere:Thing': ModuleNotFoundError"),
        ("optkit.batching:Nothing", "failed to load .* AttributeError"),
        ("optkit.batching:Batcher", "but it is no Transform"),
        (Batcher, "but it is no Transform"),
    ],
)
def test_a_target_that_is_not_there_is_the_plugins_fault(target, words):
    plugins = Plugins()
    plugins.register(Offers(**{"a.one": target}), "first", "dist-one", "1")
    with pytest.raises(MissingError, match=f"plugin 'first' of dist-one 1 .*{words}"):
        plugins.get("transform", "a.one")
    assert plugins.state(plugins.find("transform", "a.one")) is not None
    assert issubclass(RTN, Transform)


def test_discovery_imports_no_runtime():
    code = (
        "import sys; from optkit.plugins import Plugins; p = Plugins.load(); assert p.names('backend');"
        "print([m for m in ('torch', 'transformers', 'onnxruntime', 'onnx') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
