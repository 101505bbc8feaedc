"""Other projects' clients, each in a virtual environment of its own, and the artifacts that they talk to."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.serving import TOOL_TEMPLATE, folder_artifact, serve  # noqa: F401

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_DONE = "installed"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.clients)


@pytest.fixture(scope="session")
def environment(pytestconfig: pytest.Config) -> Callable[[str], Path]:
    """`environment(name)`: the Python of the virtual environment of `NAME/requirements.txt`, made when it is missing.

    It is in `.cache/clients`, under a name that changes with the requirements. These hold torch fast, as a free one
    would bring gigabytes of CUDA, and go by `constraints.txt` where their project lets them.
    """
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def make(name: str) -> Path:
        requirements = _HERE / name / "requirements.txt"
        digest = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
        place = _ROOT / ".cache/clients" / f"{name}-{digest}"
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(place.with_suffix(".lock")), capture.global_and_fixture_disabled():
            if not (place / _DONE).is_file():
                print(f"\n== Installing {requirements.relative_to(_ROOT)} into {place.relative_to(_ROOT)}", flush=True)
                shutil.rmtree(place, ignore_errors=True)
                _install(place, requirements)
                (place / _DONE).touch()
        return place / "bin/python"

    return make


def _install(place: Path, requirements: Path) -> None:
    venv.create(place, symlinks=True, with_pip=True)
    pip = [place / "bin/python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--retries", "5"]
    done = subprocess.run([*pip, "-r", requirements], check=False)
    if done.returncode:
        pytest.fail(f"pip cannot install {requirements}; its lines above say why", pytrace=False)


@pytest.fixture(scope="session")
def client(environment: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`client(name, *words)` runs `python *words` in the environment of `NAME`; what it wrote to standard output.

    It works in an empty directory, and its home is there too: nothing that a user has set counts.
    """

    def run(name: str, *words: str | Path, **variables: str) -> str:
        python = environment(name)
        home = tmp_path_factory.mktemp(name)
        plain = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(home), "HF_HUB_OFFLINE": "1"}
        quiet = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [python, *map(str, words)]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=home, env=plain | quiet | variables, check=False
        )
        assert done.returncode == 0, f"{name} failed:\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def smollm2_artifact(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in float32, for eight requests of 2048 tokens; named `smollm2`."""
    from optkit.builtin.gguf import GGUF
    from optkit.weights import save_folder

    directory = tmp_path_factory.mktemp("smollm2")
    model = GGUF(file=str(smollm2)).load()
    save_folder(model, directory / "model")
    made = folder_artifact(
        directory, "smollm2", directory / "model", max_batch_size=8, max_length=2048, tags=sorted(model.tags)
    )
    shutil.rmtree(directory / "model")
    return made


@pytest.fixture(scope="session")
def minilm_artifact(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """all-MiniLM-L6-v2, named `minilm`."""
    tags = ["task:feature-extraction", "arch:bert", "weights:float"]
    directory = tmp_path_factory.mktemp("minilm")
    return folder_artifact(directory, "minilm", minilm, max_batch_size=16, max_length=256, tags=tags)


@pytest.fixture(scope="session")
def tiny_artifact(tiny_llama: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random Llama for eight requests of 1024 tokens; its chat template takes tools. Named `tiny`."""
    from optkit.weights import save_folder

    directory = tmp_path_factory.mktemp("tiny-served")
    model = tiny_llama(max_position_embeddings=1024)
    save_folder(model, directory / "model")
    (directory / "model/chat_template.jinja").write_text(TOOL_TEMPLATE)
    return folder_artifact(
        directory, "tiny", directory / "model", max_batch_size=8, max_length=1024, tags=sorted(model.tags)
    )
