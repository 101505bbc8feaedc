"""The documentation says what the code says."""

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from optkit import hookspecs
from optkit.errors import DamagedError
from optkit.options import Options
from optkit.plugins import Plugins
from optkit.steps import Limits
from optkit.testing import check_backend
from optkit.transforms import TransformContext
from optkit_quantize.rtn import RTN

ROOT = Path(__file__).parents[2]
PLUGINS = Plugins.load(third_party=False)
HOOKS = [node for node in ast.parse(inspect.getsource(hookspecs)).body if isinstance(node, ast.FunctionDef)]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "changelog.d/README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "scripts/docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.name)
def test_every_hook_is_in_the_guide_with_its_exact_signature(hook):
    signature = f"def {hook.name}({ast.unparse(hook.args)}) -> {ast.unparse(hook.returns)}"
    assert signature in (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
    assert ast.get_docstring(hook)


@pytest.mark.parametrize("offer", PLUGINS.registered, ids=lambda offer: f"{offer.kind} {offer.name}")
def test_every_plugin_and_every_option_says_what_it_is(offer):
    cls = PLUGINS.get(offer.kind, offer.name)
    assert cls.__doc__, f"{cls.__name__} has no docstring"
    assert [name for name, field in cls.model_fields.items() if not field.description] == []


def test_no_plugin_of_ours_is_broken():
    assert PLUGINS.broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://|mailto:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def example(page, name):
    """The first Python of a page as a module, its source, and the plugins that it brings."""
    source = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)[0]
    module = type(sys)(name)
    exec(source, module.__dict__)
    plugins = Plugins()
    plugins.register(module, name)
    return source, plugins


def test_the_guides_example_is_a_backend(tiny_bert, tiny_llama, tmp_path):
    source, plugins = example("docs/backends.md", "exported")
    assert source.count("\n") < 100
    backend = plugins.get("backend", "exported")()
    check_backend(backend, tiny_bert())
    quantized = RTN(bits=8).apply(tiny_bert(), TransformContext(progress=lambda *_: None))
    check_backend(backend, quantized)
    with pytest.raises(AssertionError, match="cannot run task:causal-lm: only encoders run on it"):
        check_backend(backend, tiny_llama())
    (tmp_path / "encoder.pt2").write_bytes(b"not a program")
    with pytest.raises(DamagedError, match=r"cannot load it; compile it again"):
        backend.open(tmp_path, tmp_path, Limits(1, 8))


def test_the_guides_example_is_a_plugin(generator, tiny_llama):
    _, plugins = example("docs/plugins.md", "clip")
    clip = plugins.get("transform", "clip")(limit=0.05)
    model = clip.apply(tiny_llama(), TransformContext(progress=lambda *_: None))
    assert "weights-clipped" in model.tags
    assert model.module.model.layers[0].mlp.up_proj.weight.abs().max() == pytest.approx(0.05)


def test_the_quantizer_of_the_guide_quantizes(tiny_llama):
    import torch

    from optkit.calibration import Calibration
    from optkit.quantized import quantized_layers
    from optkit.transforms import TransformContext

    page = (ROOT / "docs/quantizing.md").read_text(encoding="utf-8")
    [source] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    namespace = type(sys)("clipped")
    exec(source, namespace.__dict__)
    ids = torch.arange(5, 25)[None]
    context = TransformContext(lambda *_: None, Calibration(({"input_ids": ids},)))
    for limit, all_of_them in ((1e9, True), (0.0, False)):
        model = namespace.Clipped(limit=limit).apply(tiny_llama(), context)
        layers = [name for name, layer in model.module.named_modules() if isinstance(layer, torch.nn.Linear)]
        assert (not layers) is all_of_them
        assert bool(dict(quantized_layers(model.module))) is all_of_them
        assert "weights:int8-channel" in model.tags


class Example(Options):
    """Options of every shape."""

    count: int
    """How many | how much."""
    mode: str | None = None
    """What
    for."""


def test_a_table_of_options_reads_as_the_recipe_does(generator):
    assert generator.section("`example`", Example).splitlines()[4:] == [
        "| option | value | default | |",
        "|---|---|---|---|",
        "| `count` | integer | required | How many \\| how much. |",
        "| `mode` | string or null | `null` | What for. |",
    ]


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"enum": [2, 4, 8]}, "`2`, `4`, `8`"),
        ({"const": "fp32"}, '`"fp32"`'),
        ({"type": "integer", "minimum": 1, "maximum": 4096}, "integer (at least 1, at most 4096)"),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, "number (above 0, below 0.5)"),
        ({"type": "array", "items": {"type": "string"}}, "list of string"),
        ({"type": "object", "additionalProperties": {"type": "number"}}, "map to number"),
        ({"anyOf": [{"$ref": "#/$defs/Part"}, {"type": "null"}]}, "Part or null"),
    ],
)
def test_a_value_in_words(generator, schema, words):
    assert generator.spelled(schema, {"Part": {"type": "object"}}) == words


def test_a_stale_page_is_one_line_with_the_command_to_run(generator, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generator, "ROOT", tmp_path)
    monkeypatch.setattr(generator, "pages", lambda root: {root / "docs/a.md": "new", root / "docs/b.md": "same"})
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/b.md").write_text("same")
    assert generator.main(["--check"]) == 1
    assert capsys.readouterr().err == "docs/a.md: not what the code says; run `make docs` and commit the result\n"
    assert not (tmp_path / "docs/a.md").exists()
    assert generator.main([]) == 0
    assert (tmp_path / "docs/a.md").read_text() == "new"
    assert generator.main(["--check"]) == 0


def test_a_guide_without_its_marks_is_refused(generator):
    with pytest.raises(SystemExit, match=r"docs/plugins.md: the marks .* put them back"):
        generator.with_hooks("no marks")


def test_the_pages_are_current():
    done = subprocess.run(
        [sys.executable, "scripts/docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
