"""One update, side by side: ours, torch's fused AdamW, the source's eager code, torch.compile.

Run it as a script for the table, or through pytest for pytest-benchmark's options::

    python bench/microbench.py
    python -m pytest bench/microbench.py --benchmark-json=out.json

All contestants of a case first take one step from the same state and must agree with each other
(AdamW: with the genome ``adamw``). Then they take turns: every pass over a case times each of
them. A ratio is the median over the passes of the ratio of medians within a pass, so that a slow
phase of the machine meets both sides alike. The rule is evolved_2025: both moments and a sign, the
work of AdamW and more.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from eager import eager_update

from evokernels import FusedEvolvedOptimizer, Genome, zoo
from evokernels.tasks import CifarCNN, SmallCNN

GENOME = zoo.evolved_2025
TOTAL_STEPS = 10_000


def shapes_of(model: torch.nn.Module) -> list[torch.Size]:
    """The shapes of the parameters of a model."""
    return [parameter.shape for parameter in model.parameters()]


# case: shapes, passes, timed updates in each pass; the longer an update, the shorter a pass
CASES: dict[str, tuple[list, int, int]] = {
    "SmallCNN": (shapes_of(SmallCNN()), 9, 40),
    "CIFAR net": (shapes_of(CifarCNN()), 9, 20),
    "100 x 64": ([torch.Size([64])] * 100, 9, 40),
    "64M": ([torch.Size([64_000_000])], 9, 2),
}


class Contestant:
    """Parameters with fixed gradients, and a function that updates them once."""

    def __init__(self, shapes: list[torch.Size]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = [
            torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes
        ]
        for parameter in self.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.backend = "torch"
        self.step: Callable[[], object]


def ours(shapes: list[torch.Size], genome: Genome = GENOME, backend: str = "cpu") -> Contestant:
    """The whole ``step()`` of our optimizer, as its user calls it."""
    contestant = Contestant(shapes)
    optimizer = FusedEvolvedOptimizer(
        contestant.parameters, genome, total_steps=TOTAL_STEPS, backend=backend
    )
    contestant.backend, contestant.step = backend, optimizer.step
    return contestant


def our_native_call(shapes: list[torch.Size]) -> Contestant:
    """The native call alone, without what Python does around it."""
    contestant = ours(shapes)
    optimizer = contestant.step.__self__
    optimizer.step()
    ((plan, _),) = optimizer._binding.plans
    contestant.step = plan.launch
    return contestant


def torch_fused(shapes: list[torch.Size]) -> Contestant:
    """Torch's fused AdamW."""
    contestant = Contestant(shapes)
    contestant.step = torch.optim.AdamW(
        contestant.parameters, lr=1e-3, weight_decay=1e-2, fused=True
    ).step
    return contestant


def source_eager(shapes: list[torch.Size], compiled: bool = False) -> Contestant:
    """The source's update of every tensor, as it is or through torch.compile.

    The step number stays at 1: as a Python number it would make torch.compile start anew each time.
    """
    contestant = Contestant(shapes)
    parameters = [parameter.detach() for parameter in contestant.parameters]
    gradients = [parameter.grad for parameter in contestant.parameters]
    m = [torch.zeros_like(p) for p in parameters]
    v = [torch.zeros_like(p) for p in parameters]
    lr = GENOME.lr / GENOME.warmup_steps

    def update(parameters: list, gradients: list, m: list, v: list) -> None:
        for tensors in zip(parameters, gradients, m, v, strict=True):
            eager_update(GENOME, *tensors, 1, lr)

    if compiled:
        torch._dynamo.reset()
        update = torch.compile(update)
    contestant.step = functools.partial(update, parameters, gradients, m, v)
    return contestant


CONTESTANTS: dict[str, Callable[[list[torch.Size]], Contestant]] = {
    "ours": ours,
    "ours, native call": our_native_call,
    "AdamW(fused=True)": torch_fused,
    "torch.compile": functools.partial(source_eager, compiled=True),
    "ours, eager backend": functools.partial(ours, backend="eager"),
    "source eager": source_eager,
}
REFERENCE = "AdamW(fused=True)"


@functools.lru_cache(maxsize=1)
def contestants(case: str) -> dict[str, Contestant]:
    """The contestants of a case, after the step that shows that they compute the same."""
    shapes, _, _ = CASES[case]
    made = {name: make(shapes) for name, make in CONTESTANTS.items()}
    for name, contestant in made.items():
        if name != "ours, native call":  # its step was taken already
            contestant.step()
    check_agreement(made["ours"], made["source eager"])
    check_agreement(made["ours, native call"], made["source eager"])
    check_agreement(made["ours, eager backend"], made["source eager"])
    check_agreement(made["torch.compile"], made["source eager"])
    adamw = ours(shapes, zoo.adamw)
    adamw.step()
    check_agreement(made[REFERENCE], adamw)
    del made["ours, native call"].parameters
    return made


def check_agreement(one: Contestant, other: Contestant) -> None:
    """Fail if two contestants have come to other parameters."""
    for a, b in zip(one.parameters, other.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# case, contestant: the median of each pass, in seconds
MEDIANS: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))


@pytest.mark.parametrize(
    ("case", "attempt", "contestant"),
    [
        (case, attempt, contestant)
        for case, (_, passes, _) in CASES.items()
        for attempt in range(passes)
        for contestant in CONTESTANTS
    ],
)
def test_update(benchmark: object, case: str, attempt: int, contestant: str) -> None:
    """Time one contestant in one pass over one case."""
    entrant = contestants(case)[contestant]
    benchmark.group = case
    benchmark.extra_info.update(backend=entrant.backend, threads=torch.get_num_threads())
    rounds = CASES[case][2]
    benchmark.pedantic(entrant.step, rounds=rounds, warmup_rounds=min(3, rounds - 1))
    MEDIANS[case][contestant].append(benchmark.stats.stats.median)


def table() -> str:
    """Medians and ratios to torch's fused AdamW, as a Markdown table."""
    head = [f"update of one step, {torch.get_num_threads()} threads", *MEDIANS]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for contestant in CONTESTANTS:
        cells = []
        for case, medians in MEDIANS.items():
            median = _duration(statistics.median(medians[contestant]))
            cells.append(f"{median} ({ratio(case, REFERENCE, contestant):.3g}x)")
        lines.append(f"| {contestant} | {' | '.join(cells)} |")
    source = (f"{ratio(case, 'source eager', 'ours'):.3g}x" for case in MEDIANS)
    return "\n".join([*lines, f"| source eager / ours | {' | '.join(source)} |"])


def ratio(case: str, one: str, other: str) -> float:
    """How many times longer one contestant takes than another: the median over the passes."""
    pairs = zip(MEDIANS[case][one], MEDIANS[case][other], strict=True)
    return statistics.median(a / b for a, b in pairs)


def _duration(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


class Report:
    """Prints the table when pytest has printed its own."""

    def pytest_terminal_summary(self, terminalreporter: object) -> None:
        """Called by pytest."""
        if MEDIANS:
            terminalreporter.write_line(f"\nMedians; in brackets: {REFERENCE} / this")
            terminalreporter.write_line(table())


if __name__ == "__main__":
    import microbench  # pytest fills the tables of the module that it imports, not of this script

    options = ["-q", "--benchmark-columns=median,iqr", *sys.argv[1:]]
    sys.exit(pytest.main([__file__, *options], [microbench.Report()]))
