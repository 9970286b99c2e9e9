"""The guides: their commands run, top to bottom, as they stand there."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_commands_of_a_guide_run(guide, tmp_path):
    commands = re.findall(r"^```sh\n(.*?)^```", guide.read_text(), re.MULTILINE | re.DOTALL)
    assert commands
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    paths = [os.path.dirname(sys.executable), os.environ["PATH"]]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(paths),
        "PYTHONPATH": str(ROOT),
        "EVOKERNELS_CACHE_DIR": str(tmp_path / "cache"),
    }
    run = subprocess.run(
        ["bash", "-eu"],
        input="\n".join(commands),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_guide_is_named_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert all(f"docs/{guide.name}" in readme for guide in GUIDES)
