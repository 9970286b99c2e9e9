"""Steps of random optimizers, held against the definition in float64; one failure ends it.

A case is one optimizer of one or two random genomes over tensors of random shape, dtype and
arrangement in memory, trained for a few steps. Its number decides all of it: a failure prints the
command that repeats it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import itertools
import math
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from commandline import Bar, exit_code, positive, worker_count
from oracle import (
    DTYPES,
    allowed_distance,
    assert_near,
    eager_formulas,
    eager_step,
    exact_step,
    exact_update,
    precise,
    random_genome,
    undecided,
)

from evokernels import FusedEvolvedOptimizer, Genome
from evokernels.compiler.expr import Average, averages_of
from evokernels.compiler.linear import linear
from evokernels.compiler.lower import MOMENT_NAMES, kept_average, lower
from evokernels.compiler.terms import formula_of
from evokernels.evolution.executor import WorkerDied, WorkerProcesses
from evokernels.genome import CATALOGUES, add_own_term
from evokernels.kernels.plan import ARITHMETIC, Rounding
from evokernels.kernels.rounding import random_bits, round_to_bfloat16_stochastically
from evokernels.terms import (
    average,
    beta1,
    beta3,
    clip,
    eps,
    exp,
    g,
    log1p,
    m,
    m_before,
    p,
    progress,
    sqrt,
    tanh,
    v,
    v_hat,
    where,
)

__all__ = ["check_case", "first_failure"]

GUARD = 7.0  # what surrounds tensors in memory
MOMENTS = {name: operand for operand, name in MOMENT_NAMES.items()}
TOTAL_STEPS = 4  # of which a case takes up to all
BULK = 1000  # elements of the largest tensor of a rule, at least
BATCH = 50  # cases that a worker is given at once

# Rules of these and of the wide catalogue have as many structures: compiling takes its time.
STRUCTURES = 12
OWN = {
    "FUZZ_SLOW": progress * average(g, beta3) + p / 8,
    "FUZZ_SQUARES": average(g, 0.5) / (sqrt(average(g * g, beta1)) + eps),
    "FUZZ_MOMENTS": tanh(average(m_before + g, 0.99)) * exp(-abs(g)) + log1p(v_hat),
    "FUZZ_CHOICE": where(g > m_before, clip(m, -0.5, progress), g * exp(-progress)) + tanh(v) * p,
}


def main() -> int:
    """The command; its exit code: 1 after a failed case."""
    options = parse(sys.argv[1:])
    failures: list[str] = []

    def command() -> None:
        for failure in run(options):
            failures.append(failure)
            print(failure)

    return exit_code(command, "no case had failed") or (1 if failures else 0)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=positive, default=10_000, help="cases to run (10000)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--case", type=int, metavar="N", help="run this case alone")
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="processes (as many as there are cores)"
    )
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> Iterator[str]:
    """Run the cases asked for; yields the report of the first failure, if there is one."""
    if options.case is not None:
        check_case(options.case)  # with its whole traceback
        print(f"case {options.case} is right")
        return
    numbers = range(options.seed, options.seed + options.count)
    batches = [numbers[i : i + BATCH] for i in range(0, len(numbers), BATCH)]
    workers = worker_count(options, threads=1, device="cpu")
    with Bar() as bar, WorkerProcesses(min(workers, len(batches))) as executor:
        calls = {executor.submit(first_failure, batch): batch for batch in batches}
        for done, call in enumerate(concurrent.futures.as_completed(calls), start=1):
            bar.show(min(done * BATCH, len(numbers)), len(numbers), "fuzz")
            try:
                failure = call.result()
            except WorkerDied as death:
                first = calls[call][0]
                failure = (
                    f"{death}\npython bench/fuzz.py --seed {first} --count {BATCH} --workers 1"
                )
            if failure:
                executor.shutdown(wait=False, cancel_futures=True)
                yield failure
                return
    print(f"{len(numbers)} cases are right")


def first_failure(numbers: Iterable[int]) -> str | None:
    """What went wrong in the first of these cases that fails, and how to repeat it."""
    with torch_threads(1):
        for number in numbers:
            try:
                check_case(number)
            except Exception as error:  # whatever it is, it is what was looked for
                return f"{type(error).__name__}: {error}\npython bench/fuzz.py --case {number}"
    return None


def check_case(number: int) -> None:
    """Raises AssertionError, or what the optimizer raised, if the case of this number fails."""
    r = random.Random(number)
    options = {
        "maximize": r.random() < 0.3,
        "zero_grads": r.random() < 0.3,
        "state_dtype": r.choice((None, None, torch.bfloat16)),
        "backend": r.choice(("cpu",) * 7 + ("eager",)),
        "stochastic_rounding": r.random() < 0.2,
        "seed": r.getrandbits(64),
    }
    threads = r.randint(1, 3)
    rules: list[Rule] = []
    for _ in range(r.choice((1, 1, 2))):
        position = 1 + sum(len(rule.parameters) for rule in rules)  # the optimizer's first is 1
        rules.append(Rule(r, options, position))
    # in float64 the last bits of a norm show, which depend on the order of its sum
    if r.random() < 0.4 and all(rule.dtype != torch.float64 for rule in rules):
        typical = math.hypot(*(rule.typical_norm() for rule in rules))
        options["max_grad_norm"] = typical * r.uniform(0.3, 2)
    optimizer = FusedEvolvedOptimizer(
        [{"params": rule.parameters, "genome": rule.genome} for rule in rules],
        rules[0].genome,
        total_steps=TOTAL_STEPS,
        **options,
    )
    for _ in range(r.randint(1, TOTAL_STEPS)):
        for rule in rules:
            rule.set_gradients()
        with torch_threads(threads):
            optimizer.step()
        factor = gradient_factor(rules, options)
        for rule in rules:
            rule.check_memory(zeroed=options["zero_grads"])
            rule.check_values(optimizer, factor)


def gradient_factor(rules: Iterable[Rule], options: Mapping[str, Any]) -> float:
    """What a step multiplies all gradients with."""
    factor = -1.0 if options["maximize"] else 1.0
    if "max_grad_norm" not in options:
        return factor
    norm = math.sqrt(sum(rule.sum_of_squares() for rule in rules))
    return factor * min(1.0, options["max_grad_norm"] / (norm + 1e-6))


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch's threads, for a while: what is not under test is faster on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Rule:
    """A genome, the parameters that it updates, and the gradients that they have had."""

    def __init__(self, r: random.Random, options: Mapping[str, Any], position: int) -> None:
        """Draw all of it; `position` is that of the first parameter in the optimizer."""
        self._random = r
        self._values = torch.Generator().manual_seed(r.getrandbits(62))
        seed = r.getrandbits(62)
        # three of four are classic ones, and what they are
        self.genome = wide_genome(seed) if seed % 4 == 0 else random_genome(seed)
        self.dtype = r.choice(DTYPES)
        # float16 has no smaller ones to speak of; a quotient by zero would leave its range
        smallest = -3 if self.dtype == torch.float16 else -8
        self._scale = 10 ** r.uniform(smallest, 1)
        self._placed = [
            Placed(r, self._random_values(shape), arrangement(r, shape)) for shape in shapes(r)
        ]
        self.parameters = [placed.tensor.requires_grad_() for placed in self._placed]
        # gradients that are zero: sign(0), and 0 / (0 + eps)
        self._quiet = [p.numel() < BULK and r.random() < 0.1 for p in self.parameters]
        self._placed_gradients: list[Placed] = []
        self._gradient: torch.Tensor | None = None
        self._steps = 0
        p = flat(self.parameters)
        moment = torch.zeros_like(p, dtype=options["state_dtype"] or ARITHMETIC[p.dtype])
        self._averages = averages_by_name(self.genome)
        kept = [*MOMENTS, *dict.fromkeys(self._averages.values())]
        self._state = {"p": p, **dict.fromkeys(kept, moment)}
        named = {name: operand for operand, name in lower(self.genome).state_names.items()}
        self._operands = {"p": "p", **MOMENTS, **named}
        self._roundings = [
            Rounding(options["seed"], i)
            for i in range(position, position + len(self.parameters))
            if options["stochastic_rounding"]
        ]

    def _random_values(self, shape: Sequence[int]) -> torch.Tensor:
        # in float64 all digits differ: 24 of them would leave one rounding for all elements where a
        # clipped gradient makes the update constant
        return torch.randn(shape, generator=self._values, dtype=torch.float64).to(self.dtype)

    def typical_norm(self) -> float:
        """About the norm of the gradients."""
        return self._scale * math.sqrt(sum(p.numel() for p in self.parameters))

    def sum_of_squares(self) -> float:
        """Of the gradients of this step."""
        return 0.0 if self._gradient is None else float((precise(self._gradient) ** 2).sum())

    def set_gradients(self) -> None:
        """New gradients for one step, now and then none."""
        absent = self._random.random() < 0.1
        self._placed_gradients = [
            self._random_gradient(parameter, 0.0 if quiet else self._scale)
            for parameter, quiet in zip(self.parameters, self._quiet, strict=True)
            if not absent
        ]
        gradients = [placed.tensor for placed in self._placed_gradients]
        self._gradient = flat(gradients) if gradients else None
        for parameter, gradient in itertools.zip_longest(self.parameters, gradients):
            parameter.grad = gradient

    def _random_gradient(self, parameter: torch.Tensor, scale: float) -> Placed:
        r, shape = self._random, parameter.shape
        repeated = [r.random() < 0.5 for _ in shape] if r.random() < 0.1 else [False] * len(shape)
        own = [min(n, 1) if once else n for n, once in zip(shape, repeated, strict=True)]
        values = torch.randn(own, generator=self._values, dtype=torch.float64)
        # away from zero: with beta2 = 0, m / sqrt(v) near it would leave the range of float16, and
        # the luck of a single rounding would decide whether the largest error is twice another
        values += torch.full(own, 0.25, dtype=torch.float64).copysign(values)
        values = values.mul_(scale).to(self.dtype)
        alike = r.random() < 0.4 and not any(repeated)
        strides = parameter.stride() if alike else arrangement(r, own)
        return Placed(r, values, strides, shape)

    def check_memory(self, *, zeroed: bool) -> None:
        """Nothing is written around the tensors, gradients are as given or, if asked for, zero."""
        for placed in itertools.chain(self._placed, self._placed_gradients):
            placed.check_surroundings()
        if self._gradient is not None:
            after = flat(placed.tensor for placed in self._placed_gradients)
            expected = torch.zeros_like(after) if zeroed else self._gradient
            assert torch.equal(after, expected), f"gradients after the step: {self}"

    def check_values(self, optimizer: FusedEvolvedOptimizer, factor: float) -> None:
        """The step led from the state before it near to where the definition leads.

        Each step starts from what the optimizer itself has stored, so that no luck of earlier
        roundings counts.

        Args:
            factor: on all gradients.
        """
        before, stored = self._state, self._stored(optimizer)
        self._state = {**before, **stored}
        if self._gradient is None:
            assert all(torch.equal(stored[name], before[name]) for name in stored), str(self)
            return
        self._steps += 1
        arithmetic, t = ARITHMETIC[self.dtype], self._steps
        precisely = {name: precise(x) for name, x in before.items()}
        rounded = {name: x.to(arithmetic) for name, x in before.items()}
        exact, eager = self._exact(precisely, factor, t), self._eager(rounded, factor, t)
        decided = torch.from_numpy(self._decided(precisely, rounded, factor, t))
        assert decided.double().mean() > 0.99, f"hardly anything can be compared: {self}"
        for name in before:
            if name in stored:
                right, yardstick = exact[name][decided.numpy()], eager[name][decided]
                actual, what = stored[name][decided], f"{name} of {self}"
                assert actual.dtype == before[name].dtype, f"{actual.dtype} {what}"
                if self._roundings and actual.dtype == torch.bfloat16:
                    distance = allowed_distance(right, yardstick, arithmetic)
                    bits = self._random_bits(self._operands[name])[decided]
                    check_drawn(actual, right, distance, bits, what)
                else:
                    assert_near(actual, right, yardstick.to(actual.dtype), actual.dtype, what)

    def _exact(
        self, before: Mapping[str, np.ndarray], factor: float, t: int
    ) -> Mapping[str, np.ndarray]:
        """The state after step `t`, by the definition."""
        g = precise(self._gradient) * factor
        if not is_wide(self.genome):
            new = exact_step(self.genome, before["p"], g, *self._moments(before), t, TOTAL_STEPS)
            return dict(zip(before, new, strict=True))
        return self._by_name(exact_update(self.genome, self._inputs(before, g), t, TOTAL_STEPS))

    def _eager(
        self, before: Mapping[str, torch.Tensor], factor: float, t: int
    ) -> Mapping[str, torch.Tensor]:
        """The same in single torch calls, not yet rounded to what is stored."""
        g = self._gradient.to(before["p"].dtype) * factor
        if not is_wide(self.genome):
            new = eager_step(self.genome, before["p"], g, *self._moments(before), t, TOTAL_STEPS)
            return dict(zip(before, new, strict=True))
        return self._by_name(eager_formulas(self.genome, self._inputs(before, g), t, TOTAL_STEPS))

    def _decided(
        self,
        exact: Mapping[str, np.ndarray],
        eager: Mapping[str, torch.Tensor],
        factor: float,
        t: int,
    ) -> np.ndarray:
        """Elements that no rounding sends the other way at a switch."""
        if not is_wide(self.genome):  # whose only switch is the sign of the gradient itself
            return np.ones(exact["p"].shape, bool)
        g = self._inputs(exact, precise(self._gradient) * factor)
        near = self._inputs(eager, self._gradient.to(eager["p"].dtype) * factor)
        return ~undecided(self.genome, g, near, t, TOTAL_STEPS)

    def _moments(self, state: Mapping[str, Any]) -> list[Any]:
        return [state[name] for name in MOMENTS]

    def _inputs(self, state: Mapping[str, Any], g: Any) -> dict[str | Average, Any]:
        moments = {operand: state[name] for name, operand in MOMENTS.items()}
        averages = {each: state[name] for each, name in self._averages.items()}
        return {"p": state["p"], "g": g, **moments, **averages}

    def _by_name(self, new: Mapping[str | Average, Any]) -> dict[str, Any]:
        return {self._averages.get(key) or MOMENT_NAMES.get(key, key): x for key, x in new.items()}

    def _random_bits(self, operand: str) -> torch.Tensor:
        """Those by which this step rounds an operand."""
        return flat(
            random_bits(parameter, operand, rounding, self._steps)
            for parameter, rounding in zip(self.parameters, self._roundings, strict=True)
        )

    def _stored(self, optimizer: FusedEvolvedOptimizer) -> dict[str, torch.Tensor]:
        """Parameters and the moments that there are, by name."""
        states = [optimizer.state.get(parameter, {}) for parameter in self.parameters]
        moments = {
            name: flat(state[name] for state in states) for name in self._state if name in states[0]
        }
        return {"p": flat(self.parameters), **moments}

    def __str__(self) -> str:
        layouts = ", ".join(f"{tuple(p.shape)} by {p.stride()}" for p in self.parameters)
        return f"{self.dtype}, {layouts}, {self.genome}"


def check_drawn(
    actual: torch.Tensor, exact: np.ndarray, distance: np.ndarray, random: torch.Tensor, what: str
) -> None:
    """A value within `distance` of the exact one was rounded by these random bits.

    For given bits a larger value is never rounded lower, so the ends of the interval decide.
    """
    low, high = (
        # one step outwards: an array of more digits was rounded to float64
        torch.from_numpy(np.nextafter((exact + side * distance).astype(float), side * np.inf))
        for side in (-1, 1)
    )
    lowest, highest = (round_to_bfloat16_stochastically(end, random) for end in (low, high))
    assert ((lowest <= actual) & (actual <= highest)).all(), f"rounding of {what}"


def wide_genome(seed: int) -> Genome:
    """One of `STRUCTURES` of the wide catalogue's terms and `OWN`, with any numbers."""
    r = random.Random(seed)
    structure = random.Random(f"structure {r.randrange(STRUCTURES)}")
    own = [add_own_term(name, formula) for name, formula in OWN.items()]
    count = structure.randint(1, 4)
    # RMS_ABS divides by a first moment that may cross zero: luck again, of a single rounding
    wide = [term for term in CATALOGUES["wide"] if term.name != "RMS_ABS"]
    chosen = [structure.choice((*own, *own, *wide)) for _ in range(count)]
    # nor is a gradient clipped: of many elements with one value, one rounding decides
    flags = ("use_v", "use_bias_correction")
    return Genome(
        [structure.choice((*own, *wide[len(CATALOGUES["classic"]) :])), *chosen],
        # of one sign: where terms cancel, the luck of single roundings decides
        [r.uniform(0.1, 2) for _ in range(count + 1)],
        lr_log10=r.uniform(-5, -1),
        # BELIEF divides by g - m, which is zero without a first moment
        use_m=True,
        beta1=r.uniform(0.1, 0.999),
        beta2=r.choice([0.0, r.uniform(0.5, 0.9999)]),
        eps_log10=r.uniform(-10, -4),
        wd_log10=r.uniform(-6, -1) if structure.random() < 0.5 else -math.inf,
        use_cosine_decay=r.random() < 0.3,
        **{flag: structure.random() < 0.7 for flag in flags},
        beta3=r.choice([0.0, r.uniform(0.5, 0.9999)]),
    )


def is_wide(genome: Genome) -> bool:
    """Whether it has terms that the source system has not."""
    return not set(genome.term_types) <= set(CATALOGUES["classic"])


def averages_by_name(genome: Genome) -> dict[Average, str]:
    """What the state of an optimizer calls each average of a genome's terms; one that is never
    stored has its own text."""
    found = {each for term in genome.term_types for each in averages_of(formula_of(term))}
    return {
        each: str(next(iter(linear(kept_average(genome, each))), each))
        for each in sorted(found, key=str)
    }


class Placed:
    """A tensor in the middle of a buffer of guard elements."""

    def __init__(
        self,
        r: random.Random,
        values: torch.Tensor,
        strides: Sequence[int],
        shape: Sequence[int] | None = None,
    ) -> None:
        """Place values by strides, and repeat them up to `shape`."""
        before, after = r.randint(0, 17), r.randint(0, 17)
        size = before + reach(values.shape, strides) + after
        self._buffer = torch.full((size,), GUARD, dtype=values.dtype)
        own = self._buffer.as_strided(values.shape, strides, before).copy_(values)
        self._around = torch.ones(size, dtype=torch.bool)
        self._around.as_strided(values.shape, strides, before).fill_(False)
        self.tensor = own if shape is None else own.expand(shape)

    def check_surroundings(self) -> None:
        """Raises AssertionError if an element around the tensor has changed."""
        around = self._buffer.detach()[self._around]
        layout = f"{tuple(self.tensor.shape)} by {self.tensor.stride()}"
        assert (around == GUARD).all(), f"written beside a tensor: {self._buffer.dtype}, {layout}"


def shapes(r: random.Random) -> list[tuple[int, ...]]:
    """Shapes of one to five tensors, one of them of `BULK` elements or more.

    With few elements the luck of single roundings would decide whether a tolerance holds that is a
    multiple of another error.
    """
    small = [
        (),
        (0,),
        (1,),
        (r.randint(2, 300),),
        (r.randint(1, 30), r.randint(1, 30)),
        (r.randint(0, 3), r.randint(1, 20), r.randint(1, 5)),
        (r.randint(1, 5), r.randint(1, 5), r.randint(1, 4), r.randint(1, 4)),
    ]
    # beyond 2^15 elements a step takes more than one thread
    rows = BULK // 40 * (r.randint(36, 44) if r.random() < 0.02 else 1) + r.randint(0, 15)
    large = r.choice(((rows * 40,), (rows, 40), (40, rows), (rows, 2, 4, 5)))
    chosen = [*r.choices(small, k=r.randint(0, 4)), large]
    r.shuffle(chosen)
    return chosen


def arrangement(r: random.Random, shape: Sequence[int]) -> list[int]:
    """Strides: half of them contiguous; else dimensions in any order (transposed, channels last),
    with or without gaps between (sliced)."""
    order = list(range(len(shape)))
    gaps = (0,)
    if r.random() < 0.5:
        r.shuffle(order)
        gaps = r.choice(((0,), (0, 1, 3)))
    strides = [1] * len(shape)
    length = 1
    for dimension in reversed(order):
        strides[dimension] = length + r.choice(gaps)
        length += max(shape[dimension] - 1, 0) * strides[dimension]
    return strides


def reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last in memory, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The elements of all tensors, in their logical order."""
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


if __name__ == "__main__":
    sys.exit(main())
