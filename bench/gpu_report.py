"""What gpu.py found, as JSON and as a page for people; the page is made of what is in the JSON."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable
from typing import Any

from commandline import markdown
from gpu_steps import OURS
from gpu_tests import ELSE
from microbench import duration

from evokernels.evolution.files import write_atomically

__all__ = ["problems", "write"]

Results = dict[str, Any]

# On a GPU whose name has this word: case, what of our rows, and what it should be.
AT_MOST, AT_LEAST = "≤", "≥"
EXPECTED = {
    "T4": (
        ("SmallCNN", "device, seconds", AT_MOST, 0.1e-3),
        ("64M", "device, seconds", AT_MOST, 6.6e-3),
        ("64M", "of the copy", AT_LEAST, 0.85),
        ("64M bfloat16, float32 state", "of the copy", AT_LEAST, 0.85),
        ("64M bfloat16, bfloat16 state", "of the copy", AT_LEAST, 0.85),
    )
}

HOW_STEPS = """\
Contestants of a case take turns; a time is the median over the passes of medians within a pass, and
the spread is that of the passes. *Device* is the time between two CUDA events around a step whose
launches were all queued before; the L2 cache was overwritten before each step, so tensors come from
memory. *Host* is the time of the call while the device is idle, without waiting for it, with newly
allocated gradients. Bytes are what the rule has to move; the copy is that of a float32 tensor into
another, beside each case. The first step of everybody was compared with single torch calls."""

HOW_FIRST_STEPS = """\
In a process of its own each time, beyond that of a rule that is compiled already: rendering,
compiling or reading, loading, and the step itself."""

HOW_EVALUATION = """\
The published genome, from the same weights and batches: `evaluate` replays a captured step, the
source's loop updates each tensor with single torch calls and reads the loss in every step. Both are
in full float32, with reproducible convolutions; dropout draws other numbers in each."""


def write(results: Results, folder: pathlib.Path) -> list[pathlib.Path]:
    """Both files, named after the GPU; those that are there are replaced."""
    name = re.sub("[^a-z0-9]+", "_", results["environment"]["gpu"].lower()).strip("_")
    texts = {
        folder / f"gpu_{name}.json": json.dumps(results, indent=1) + "\n",
        folder / f"gpu_{name}.md": "\n".join(page(results)) + "\n",
    }
    for path, text in texts.items():
        write_atomically(path, text.encode())
    return list(texts)


def problems(results: Results) -> list[str]:
    """What is not as it must be, one line each; slowness is none."""
    found = [f"{part} broke off: {last_line(text)}" for part, text in results["broken"].items()]
    for tests in results.get("tests", {}).values():
        if tests["command"]:
            found.append(last_line(tests["command"]))
        counts = tests.get("backends", {})
        found += [
            f"tests {of(backend)} failed: {counted['failed']}"
            for backend, counted in counts.items()
            if counted["failed"]
        ]
        found += [
            f"no test {of(backend)} passed"
            for backend in OURS
            if not counts.get(backend, {}).get("passed")
        ]
    for name, case in results.get("steps", {}).items():
        found += [f"{name}: {who}: {first_line(why)}" for who, why in case["failed"].items()]
    return found


def page(results: Results) -> Iterable[str]:
    """The report, line by line, in Markdown."""
    found = problems(results)
    yield f"# evokernels on {results['environment']['gpu']}"
    yield ""
    yield from (f"- **{line}**" for line in found)
    if not found:
        yield f"All that ran ({', '.join(p for p in PARTS if p in results)}) is right."
    yield from ("", "## Machine", "")
    yield from markdown(["", ""], [[k, str(v)] for k, v in results["environment"].items()])
    for part, section in PARTS.items():
        if part in results:
            yield from section(results)
    for part, text in results["broken"].items():
        yield from ("", f"## {part} broke off", "", *fenced(text))


def tests_section(results: Results) -> Iterable[str]:
    """Counts by backend, why tests were skipped, and failures."""
    (tests,) = results["tests"].values()
    yield from ("", "## Tests on the device", "")
    if tests["command"]:
        yield from fenced(tests["command"])
    if "backends" not in tests:
        return
    kinds = ("passed", "failed", "skipped")
    rows = [[name, *(str(c[kind]) for kind in kinds)] for name, c in tests["backends"].items()]
    yield from markdown(["backend", *kinds], rows)
    yield from ("", f"They took {tests['seconds']:.0f} s.")
    if tests["skips"]:
        yield from ("", "Skipped:", "")
        yield from (f"- {count} times: {reason}" for reason, count in tests["skips"].items())
    for name, text in tests["failures"].items():
        yield from ("", f"### {name}", "", *fenced(text))


def steps_section(results: Results) -> Iterable[str]:
    """A table for each case, and the figures that were expected of this GPU."""
    yield from ("", "## One update", "", HOW_STEPS)
    for name, case in results["steps"].items():
        tensors = "1 tensor" if case["tensors"] == 1 else f"{case['tensors']:,} tensors"
        copy = case["copy, bytes a second"] / 1e9
        yield from ("", f"### {name}", "")
        yield f"{case['elements']:,} elements in {tensors}; a copy moves {copy:.1f} GB/s."
        yield ""
        if case["contestants"]:
            first = case["contestants"][0]["contestant"]
            head = ["", "device", "spread", f"times {first}", "host", "bytes an element", "GB/s"]
            head += ["of the copy", "ran on"]
            yield from markdown(head, map(steps_row, case["contestants"]))
        missing = {**case["failed"], **case["absent"]}
        yield from ("" for _ in missing or ())
        yield from (f"- {who} was not measured: {why}" for who, why in missing.items())
        yield from ("", f"Afterwards: {said(case['afterwards']) or 'clocks unknown'}.")
    rows = list(expectations(results))
    if rows:
        yield from ("", "### Expected of this GPU", "")
        yield from markdown(["case", "contestant", "what", "expected", "measured", "met"], rows)


def steps_row(row: Results) -> list[str]:
    """One contestant of a case."""
    speed, share = row["bytes a second"], row["of the copy"]
    return [
        row["contestant"],
        duration(row["device, seconds"]),
        percent(row["spread"]),
        f"{row['times the first']:.3g}x",
        duration(row["host, seconds"]),
        "—" if speed is None else str(row["bytes an element"]),
        "—" if speed is None else f"{speed / 1e9:.1f}",
        "—" if share is None else percent(share),
        row["backend"],
    ]


def expectations(results: Results) -> Iterable[list[str]]:
    """For each figure expected of this GPU what our rows have."""
    words = results["environment"]["gpu"].split()
    expected = [limit for word, limits in EXPECTED.items() if word in words for limit in limits]
    rows = {
        (name, row["contestant"]): row
        for name, case in results["steps"].items()
        for row in case["contestants"]
    }
    for case, what, side, limit in expected:
        shown = duration if side == AT_MOST else percent
        for ours in OURS.values():
            if (case, ours) in rows:
                value = rows[case, ours][what]
                met = value <= limit if side == AT_MOST else value >= limit
                name = what.partition(",")[0]
                yield [
                    *(case, ours, name, f"{side} {shown(limit)}", shown(value)),
                    "yes" if met else "NO",
                ]


def first_steps_section(results: Results) -> Iterable[str]:
    """Seconds of each backend."""
    (found,) = results["first steps"].values()
    yield from ("", "## The first step of a rule of own terms", "", HOW_FIRST_STEPS, "")
    rows = [[name, *map(duration, times.values())] for name, times in found["seconds"].items()]
    yield from markdown(["", "compiled", "from disk"], rows)
    yield from ("" for _ in found["absent"] or ())
    yield from (f"- {who} was not measured: {why}" for who, why in found["absent"].items())


def evaluation_section(results: Results) -> Iterable[str]:
    """Seconds and fitness of both ways."""
    ((task, found),) = results["evaluation"].items()
    yield from ("", "## One evaluation", "", HOW_EVALUATION, "")
    yield (
        f"{task}: {found['steps']} steps of {found['batch size']} images, out of "
        f"{found['training images']:,}; the evaluator is {found['times as fast']:.3g} times as "
        "fast."
    )
    yield ""
    rows = [
        [name, f"{seconds:.2f} s", f"{found['fitness'][name]:.4f}"]
        for name, seconds in found["seconds"].items()
    ]
    yield from markdown(["", "training and test", "fitness"], rows)


PARTS = {
    "tests": tests_section,
    "steps": steps_section,
    "first steps": first_steps_section,
    "evaluation": evaluation_section,
}


def of(backend: str) -> str:
    """A backend, or no backend, in a sentence."""
    return backend if backend == ELSE else f"of backend {backend}"


def percent(share: float) -> str:
    """In whole percent, rounded down: what is missed by little is missed."""
    return f"{int(share * 100)} %"


def said(values: Results) -> str:
    """Names and values in a sentence."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def fenced(text: str) -> list[str]:
    """Text as it is."""
    return ["````", *text.strip().splitlines(), "````"]


def first_line(text: str) -> str:
    """Of a message."""
    return text.strip().partition("\n")[0]


def last_line(text: str) -> str:
    """Of a traceback: the error."""
    return text.strip().rpartition("\n")[2]
