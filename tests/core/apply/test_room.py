"""An output that cannot be written: said in one line, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from optkit.artifact import hash_files
from optkit.errors import MachineError

LIMITED = """
import resource, sys
from optkit.cli import main
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
main()
"""


@pytest.mark.parametrize(("limit", "what"), [(100_000, "weights"), (300, "recipe")])
def test_a_disk_that_fills_while_the_artifact_is_written(desk, finished, run, limit, what):
    """All steps are cached; no file may have more bytes than the limit."""
    recipe, out = desk.recipe(), desk.folder / "out"
    command = [sys.executable, "-c", LIMITED, str(limit), "apply", recipe, "--output", out]
    for earlier in (False, True):
        if earlier:
            run(recipe, out)
        before = hash_files(out)
        done = subprocess.run([*command, *["--overwrite"] * earlier], capture_output=True, text=True, check=False)
        assert done.returncode == 5, done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith(f"optkit: {out}: cannot be written (")
        assert "File too large" in last
        assert last.endswith("; choose another output")
        assert hash_files(out) == before
        assert sorted(os.listdir(desk.folder)) == ["cache", *["out"] * earlier, "recipe.yaml"]
        assert not os.listdir(desk.folder / "cache" / "work")


def test_an_output_below_a_file(desk, run, events):
    (desk.folder / "file").write_text("in the way")
    told = events()
    with pytest.raises(
        MachineError, match=r"file/out: cannot be written \(a file is in the way\); choose another output"
    ):
        run(desk.recipe(), desk.folder / "file" / "out", [told])
    assert not told.started  # before the work
    with pytest.raises(MachineError, match=r"file/deep/out: cannot be written \(Not a directory\)"):
        run(desk.recipe(), desk.folder / "file" / "deep" / "out", [told])
