"""Exported optimizers: the searched rule on random states, and what torch asks of an optimizer."""

import copy
import functools
import io
import pathlib
import pickle
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import TOTAL_STEPS, case, flat, layouts
from oracle import (
    DTYPES,
    assert_near,
    eager_formulas,
    eager_steps,
    exact_steps,
    exact_update,
    precise,
    random_genome,
)
from test_terms import random_own_genome

from evokernels import FusedEvolvedOptimizer, Genome, genome, terms, zoo
from evokernels.compiler.expr import Average
from evokernels.compiler.lower import lower
from evokernels.compiler.ops import OPS
from evokernels.compiler.render_torch import class_name, render_torch
from evokernels.compiler.statements import statements_of
from evokernels.errors import GenomeError
from evokernels.genome import CATALOGUES
from evokernels.kernels.plan import ARITHMETIC

NAMED = {**zoo.GENOMES, **zoo.WIDE}
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _no_terms_are_left(monkeypatch):
    monkeypatch.setattr(genome, "_own_terms", {})
    monkeypatch.setattr(terms, "_registered", {})


@functools.cache
def exported(rule):
    """The class that is written for a genome."""
    namespace = {"__name__": "exported"}
    exec(render_torch(rule, "Exported"), namespace)
    return namespace["Exported"]


def needs_length(rule):
    return rule.use_cosine_decay or lower(rule).reads_progress


def make(rule, params, **options):
    if needs_length(rule):
        options = {"total_steps": TOTAL_STEPS, **options}
    return exported(rule)(params, **options)


def fused(rule, params, **options):
    return FusedEvolvedOptimizer(params, rule, total_steps=TOTAL_STEPS, **options)


def train(optimizer, parameters, gradients):
    for step_gradients in gradients:
        for parameter, gradient in zip(parameters, step_gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()
    return optimizer


def trained(rule, start, gradients, make_optimizer=make, **options):
    """Parameters after these gradients, and the optimizer."""
    parameters = [p.clone().requires_grad_() for p in start]
    return parameters, train(make_optimizer(rule, parameters, **options), parameters, gradients)


def changes(rule):
    """Whether it ever changes a parameter: what does not is not exported."""
    try:
        return bool(render_torch(rule, "Exported"))
    except GenomeError:
        return False


@functools.cache
def random_rules(count):
    """The first random genomes that do anything."""
    found = []
    seed = 0
    while len(found) < count:
        if changes(random_genome(seed)):
            found.append(seed)
        seed += 1
    return found


def assert_equal(actual, expected, what=""):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num()), what
        assert torch.equal(a.isnan(), b.isnan()), what


# Against the definition


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_genomes_match_the_reference(dtype):
    """In every other tensor one gradient is missing."""
    for seed in random_rules(300):
        rule = random_genome(seed)
        start, gradients = case(seed, dtype)
        missing = [
            [None if step == seed % 5 and i % 2 else g for i, g in enumerate(each)]
            for step, each in enumerate(gradients)
        ]
        parameters, optimizer = trained(rule, start, missing, foreach=True)
        others, other = trained(rule, start, missing, foreach=False)
        beside, _ = trained(rule, start, missing, fused)
        assert_equal(others, parameters, rule)
        for odd in (0, 1):
            chosen = slice(odd, None, 2)
            states = [optimizer.state[p] for p in parameters[chosen]]
            seen = [
                flat(g for g in each[chosen] if g is not None)
                for each in missing
                if each[odd] is not None
            ]
            exact = exact_steps(rule, flat(start[chosen]), seen, TOTAL_STEPS)
            yardstick = eager_steps(rule, flat(start[chosen]), seen, TOTAL_STEPS)
            what = f"genome {seed}: {rule}"
            assert {state["step"] for state in states} == {len(seen)} == {5 - odd} or not odd
            assert_near(flat(parameters[chosen]), exact[0], yardstick[0], dtype, what)
            assert_near(flat(beside[chosen]), exact[0], yardstick[0], dtype, what)
            for name, moment in (("exp_avg", 1), ("exp_avg_sq", 2)):
                if name in states[0]:
                    kept = flat([state[name] for state in states])
                    assert kept.dtype == ARITHMETIC[dtype]
                    assert_near(kept, exact[moment], yardstick[moment], ARITHMETIC[dtype], what)
        for a, b in zip(others, parameters, strict=True):
            assert other.state[a].keys() == optimizer.state[b].keys()
            for name, value in optimizer.state[b].items():
                assert name == "step" or torch.equal(other.state[a][name], value)
