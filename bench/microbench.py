"""One update, side by side: ours, torch's fused AdamW, torch.compile, the source's eager code.

    python bench/microbench.py                         # the table
    python bench/microbench.py --cases MLP SmallCNN    # some of its rows
    python bench/microbench.py --plot out.png          # and a picture over sizes and counts
    python -m pytest bench/microbench.py --benchmark-json=out.json

The contestants of a case take turns: every pass times each of them, with gradients that are newly
allocated in every step, as backward does after zero_grad, and with the same ones. Only the step is
timed. A ratio is the median over the passes of the ratio of medians within a pass, so that a slow
phase of the machine meets both sides alike.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import platform
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import scaling
import torch
import torchvision
from commandline import Bar, exit_code, markdown, positive
from contestants import (
    COMPILED,
    CONTESTANTS,
    FUSED,
    NATIVE,
    OURS,
    SOURCE,
    Contestant,
    Work,
    adamw,
    enter,
    ours,
    ours_as_adam,
)
from oracle import exact_step, precise
from timing import NEW, SAME, WALL, Measured, measure

from evokernels import FusedEvolvedOptimizer, Genome, Term, zoo
from evokernels.evolution.machine import processor
from evokernels.genome import CATALOGUES
from evokernels.tasks import CifarCNN, SmallCNN

__all__ = ["CASES", "Case"]

ADAM = "ours, Adam genome"


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        target: how many times as long `against` should take as ours.
        but: what one should know about the row.
    """

    work: Work
    target: float
    contestants: dict[str, Callable[[Work], Contestant]]
    against: str = FUSED
    but: str = ""


def case(target: float, *left_out: str, but: str = "", **work: object) -> Case:
    """A case with all contestants but some."""
    entrants = {name: make for name, make in CONTESTANTS.items() if name not in left_out}
    return Case(Work(**work), target, entrants, but=but)


def shapes_of(model: torch.nn.Module) -> tuple[tuple[int, ...], ...]:
    """The shapes of the parameters of a model."""
    return tuple(tuple(parameter.shape) for parameter in model.parameters())


def resnet() -> torch.nn.Module:
    """A ResNet-18 whose classifier makes it 12.5 million parameters."""
    with torch.device("meta"):
        return torchvision.models.resnet18(num_classes=2560)


def small_shapes() -> tuple[tuple[int], ...]:
    """1,000 tensors of 64 to 1,024 elements."""
    r = random.Random(0)
    return tuple((r.randint(64, 1024),) for _ in range(1000))


ONE_64M = ((64_000_000,),)
SIXTEEN_1M = ((1_000_000,),) * 16
SIGN = Genome([Term.SIGN_GRAD], use_m=False, use_v=False, use_bias_correction=False)
SEVEN_TERMS = Genome(
    CATALOGUES["classic"],
    [0.3, 0.2, 0.1, 1.0, 0.4, 0.1, 0.2],
    use_bias_correction=False,
    wd_log10=-2.0,
)

CASES = {
    "SmallCNN": case(1.5, shapes=shapes_of(SmallCNN())),
    "CIFAR net": case(1.35, shapes=shapes_of(CifarCNN())),
    "ResNet-18 of 12.5M": case(1.15, SOURCE, shapes=shapes_of(resnet())),
    "64M": case(1.05, SOURCE, shapes=ONE_64M),
    "64M, bfloat16 state": case(1.4, SOURCE, shapes=ONE_64M, state_dtype=torch.bfloat16),
    "64M bfloat16, float32 state": case(2.0, SOURCE, shapes=ONE_64M, dtype=torch.bfloat16),
    "MLP of 100K": case(4.0, shapes=((128, 784), (128,), (10, 128), (10,))),
    "100 x 64": case(20.0, shapes=((64,),) * 100),
    "1,000 x 64 to 1,024": case(
        20.0,
        COMPILED,
        shapes=small_shapes(),
        but="torch.compile is left out, it compiles for minutes",
    ),
    "unscale, clip, step, zero: 16M": Case(
        Work(SIXTEEN_1M, zoo.adamw, max_grad_norm=1.0),
        2.0,
        {OURS: ours, FUSED: functools.partial(adamw, fused=True)},
        but="against four calls: unscale_, clip_grad_norm_, step, zero_grad",
    ),
    "64M, sign (no state)": case(2.2, SOURCE, shapes=ONE_64M, genome=SIGN),
    "64M, momentum (one moment)": case(1.35, SOURCE, shapes=ONE_64M, genome=zoo.sgd_momentum),
    "16M, seven terms": Case(
        Work(SIXTEEN_1M, SEVEN_TERMS),
        1 / 1.05,
        {OURS: ours, ADAM: ours_as_adam, COMPILED: CONTESTANTS[COMPILED]},
        against=ADAM,
        but="against our own Adam genome",
    ),
}


def main() -> int:
    """The command; its exit code."""
    options = parse(sys.argv[1:])
    return exit_code(lambda: run(options), "nothing is written before all is measured")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases",
        nargs="*",
        default=list(CASES),
        choices=list(CASES),
        metavar="CASE",
        help=f"rows of the table: {'; '.join(CASES)} (all)",
    )
    parser.add_argument("--passes", type=positive, default=9, help="passes over each case (9)")
    parser.add_argument("--threads", type=positive, default=2, help="torch threads (2)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="all medians")
    parser.add_argument(
        "--plot",
        type=pathlib.Path,
        metavar="FILE",
        help="measure over sizes and numbers of tensors too, and draw it",
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure, print, write."""
    torch.set_num_threads(options.threads)
    measured: dict[str, Measured] = {}
    with Bar() as bar:
        for name in options.cases:
            bar.show(len(measured), len(options.cases), name)
            measured[name] = measure(CASES[name].work, CASES[name].contestants, options.passes)
    print(machine())
    if measured:
        print("\n".join(report(measured)))
    if "64M bfloat16, float32 state" in measured:
        print(accuracy())
    if options.json:
        options.json.write_text(as_json(measured), encoding="utf-8")
    if options.plot:
        scaling.draw(options.plot, scaling.sweep(options.passes))


def report(measured: dict[str, Measured]) -> Iterable[str]:
    """The tables, in Markdown."""
    threads = torch.get_num_threads()
    for kind, title in ((NEW, "new gradients in every step"), (SAME, "the same gradients")):
        names = [name for name in (COMPILED, SOURCE, NATIVE) if kind == SAME or name != NATIVE]
        head = [f"{title}, {threads} threads", OURS, "against", "ratio", "target", "met", *names]
        yield from ("", *markdown(head, [row(n, m, kind, names) for n, m in measured.items()]))
    large = {name: m for name, m in measured.items() if m.seconds(WALL, SAME)}
    if large:
        head = ["memory", "bytes an element", "GB/s", "bytes against", "GB/s", "GB/s of mul_"]
        yield from ("", *markdown(head, [memory_row(n, m) for n, m in large.items()]))
    yield ""
    for name in measured:
        if CASES[name].but:
            yield f"{name}: {CASES[name].but}."
    yield from sorted({f"ours ran on {m.backends[OURS]}" for m in measured.values()})


def row(name: str, measured: Measured, kind: str, others: Sequence[str]) -> list[str]:
    """One case of one kind: times, ratio and target, and the times of others with their ratios."""
    target, against = CASES[name].target, CASES[name].against
    ratio = measured.ratio(against, OURS, kind)
    cells = [
        duration(measured.seconds(OURS, kind)),
        duration(measured.seconds(against, kind)),
        f"{ratio:.3g}x",
        f"{target:.3g}x",
        "yes" if ratio >= target else "NO",
    ]
    for other in others:
        seconds = measured.seconds(other, kind)
        relative = f" ({measured.ratio(against, other, kind):.3g}x)" if seconds else ""
        cells.append(duration(seconds) + relative)
    return [name, *cells]


def memory_row(name: str, measured: Measured) -> list[str]:
    """Bytes that a step moves and how fast, beside the same for a multiplication in place."""
    elements = CASES[name].work.elements

    def moved(contestant: str) -> list[str]:
        count = measured.traffic[contestant]
        return [f"{count}", f"{count * elements / measured.seconds(contestant, SAME) / 1e9:.1f}"]

    wall = 2 * torch.float32.itemsize * elements / measured.seconds(WALL, SAME) / 1e9
    return [name, *moved(OURS), *moved(CASES[name].against), f"{wall:.1f}"]


def duration(seconds: float | None) -> str:
    """A time with its unit; a dash for none."""
    if seconds is None:
        return "—"
    return f"{seconds * 1e6:.3g} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def accuracy() -> str:
    """200 steps of AdamW on bfloat16 weights: errors against float64 of ours and torch's."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50_000, generator=generator).mul_(0.02).bfloat16()
    gradients = [torch.randn(50_000, generator=generator).bfloat16() for _ in range(200)]
    norm = np.linalg.norm
    p = precise(start)
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, gradient in enumerate(gradients, start=1):
        p, m, v = exact_step(zoo.adamw, p, precise(gradient), m, v, t, len(gradients))

    def errors(make: Callable[[list[torch.Tensor]], torch.optim.Optimizer]) -> str:
        parameter = torch.nn.Parameter(start.clone())
        optimizer = make([parameter])
        for parameter.grad in gradients:
            optimizer.step()
        second = precise(optimizer.state[parameter]["exp_avg_sq"])
        missed = norm(precise(parameter.detach()) - p) / norm(p - precise(start))
        return f"{missed:.2%}, {norm(second - v) / norm(v):.2g}"

    mine = errors(lambda parameters: FusedEvolvedOptimizer(parameters, zoo.adamw))
    theirs = errors(
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-2, fused=True)
    )
    return (
        "bfloat16 weights after 200 steps of AdamW, errors against float64 (of the weights as a "
        f"share of the way, of the second moment): ours {mine}; {FUSED} {theirs}"
    )


def machine() -> str:
    """What it was measured on."""
    return (
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def as_json(measured: dict[str, Measured]) -> str:
    """Everything that was measured, with targets, backends and the machine."""
    rows = {
        name: {
            "target": CASES[name].target,
            "against": CASES[name].against,
            "elements": CASES[name].work.elements,
            "tensors": len(CASES[name].work.shapes),
            "seconds": m.passes,
            "bytes_per_element": m.traffic,
            "backends": m.backends,
        }
        for name, m in measured.items()
    }
    return json.dumps({"machine": machine(), "cases": rows}, indent=1) + "\n"


@pytest.mark.parametrize(
    ("name", "contestant"),
    [(name, contestant) for name, case in CASES.items() for contestant in case.contestants],
)
def test_update(benchmark: object, name: str, contestant: str) -> None:
    """For pytest-benchmark: one contestant alone, with the same gradients in every step."""
    entrant = enter(CASES[name].contestants[contestant], CASES[name].work)
    benchmark.group = name
    benchmark.extra_info.update(backend=entrant.backend, threads=torch.get_num_threads())
    setup = functools.partial(entrant.prepare, new=False)
    benchmark.pedantic(entrant.step, setup=setup, rounds=10, warmup_rounds=2)


if __name__ == "__main__":
    sys.exit(main())
