"""The tests that need a GPU, run by pytest in a process of their own, and what became of them."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile
from collections import Counter
from typing import Any
from xml.etree import ElementTree

__all__ = ["ELSE", "MARKER", "ROOT", "TESTS", "run_tests"]

ROOT = pathlib.Path(__file__).parents[1]
TESTS = ROOT / "python_tests"
MARKER = "gpu"
ELSE = "of no backend"  # tests that name none
TAIL = 2000  # characters of what pytest printed, where it left no results
NOT_WHOLE = {2: "did not finish", 3: "broke down", 4: "was called wrongly", 5: "found no tests"}


def run_tests(folder: pathlib.Path = TESTS) -> dict[str, Any]:
    """Run the marked tests of a folder.

    Returns:
        For each backend how many passed, failed and were skipped; the text of failures, the
        reasons of skips with how many have them; and what went wrong with pytest itself, or None.
    """
    with tempfile.TemporaryDirectory() as scratch:
        results = pathlib.Path(scratch) / "results.xml"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-m", MARKER, str(folder)),
                *("-c", "pyproject.toml", f"--junitxml={results}"),
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not results.exists():
            return {"command": f"pytest ended with {done.returncode}: {done.stdout[-TAIL:]}"}
        found = summary(ElementTree.parse(results).getroot())
    broken = done.returncode not in (0, 1)
    how = NOT_WHOLE.get(done.returncode, f"ended with {done.returncode}")
    return {**found, "command": f"pytest {how}: {done.stdout[-TAIL:]}" if broken else None}


def summary(results: ElementTree.Element) -> dict[str, Any]:
    """Counts by backend, failures and reasons of skips of a file of results."""
    counts: dict[str, Counter[str]] = {}
    failures, skips = {}, Counter()
    for case in results.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        counted = counts.setdefault(_backend(case), Counter(passed=0, failed=0, skipped=0))
        wrong = [*case.findall("failure"), *case.findall("error")]
        skipped = case.find("skipped")
        if wrong:
            counted["failed"] += 1
            failures[name] = "\n".join(element.text or "" for element in wrong)
        elif skipped is not None:
            counted["skipped"] += 1
            skips[skipped.get("message")] += 1
        else:
            counted["passed"] += 1
    return {
        "backends": {name: dict(counted) for name, counted in counts.items()},
        "failures": failures,
        "skips": dict(skips),
        "seconds": sum(float(suite.get("time", 0)) for suite in results.iter("testsuite")),
    }


def _backend(case: ElementTree.Element) -> str:
    """That of a test, which python_tests/conftest.py writes down."""
    for entry in case.iterfind("properties/property"):
        if entry.get("name") == "backend":
            return entry.get("value")
    return ELSE
