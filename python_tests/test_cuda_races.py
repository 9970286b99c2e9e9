"""The CUDA kernels with real threads under ThreadSanitizer: barriers and fences are where they must
be."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

SANITIZER = pathlib.Path(
    subprocess.run(
        ["cc", "-print-file-name=libtsan.so"], capture_output=True, text=True
    ).stdout.strip()
)


@pytest.mark.skipif(not SANITIZER.is_absolute(), reason="the compiler has no ThreadSanitizer")
@pytest.mark.skipif(shutil.which("setarch") is None, reason="no setarch")
def test_no_two_threads_race():
    environment = {
        **os.environ,
        "LD_PRELOAD": str(SANITIZER),
        # of torch and Python, which are not compiled for it, nothing is to be said
        "TSAN_OPTIONS": "exitcode=66 ignore_noninstrumented_modules=1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    script = pathlib.Path(__file__).with_name("threaded_steps.py")
    done = subprocess.run(
        # it needs addresses where they would be without randomization
        ["setarch", "-R", sys.executable, script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,  # without a barrier, threads may wait for each other for ever
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "[2.0, 0.0, 2.0, 7.0, 2.0, 2.0, 2.0, 2.0] [0]\n"
