"""What a quick command must not pay for: importing a runtime takes seconds."""

import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "transformers",
    "onnxruntime",
    "onnx",
    "accelerate",
    "compressed_tensors",
    "gguf",
    "tokenizers",
    "scipy",
}
COMMAND = """
import sys
from optkit.cli import main
sys.argv = {arguments}
try:
    main()
except SystemExit as end:
    assert not end.code
"""


def imported(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after `code`."""
    report = "import sys; print('\\n' + ' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_importing_optkit_imports_nothing_else():
    assert not imported("import optkit") & (HEAVY | {"numpy", "pydantic", "pluggy", "typer", "rich"})


@pytest.mark.parametrize(
    "code",
    [
        "from optkit.plugins import Plugins; plugins = Plugins.load(third_party=False); assert not plugins.broken",
        "import optkit.engine, optkit.artifact, optkit.recipe, optkit.weights",
        "from optkit.hardware import machine; machine()",
    ],
)
def test_planning_needs_no_runtime(code):
    assert not imported(code) & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["apply", "--help"], ["plugins", "list"]])
def test_a_quick_command_needs_no_runtime(arguments):
    code = COMMAND.format(arguments=["optkit", *arguments])
    assert not imported(code) & HEAVY


def test_the_plugin_packages_register_by_path():
    code = "import optkit_quantize, optkit_prune, optkit_backends, optkit_batching, optkit.builtin"
    assert not imported(code) & HEAVY
