"""Kinds of tensors → CUDA C++: what ``csrc/update.cuh`` and ``csrc/squares.cuh`` build on.

That is the records that a host fills (`compiler/words.py`), for each structure its numbers in a
step, and for each kind how elements are stored and the update of one of them. Loop shape, loads,
stores and launches are in ``csrc/``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

from evokernels.compiler import schedule, terms
from evokernels.compiler.expr import Line, assignments
from evokernels.compiler.linear import Monomial
from evokernels.compiler.program import OPERANDS
from evokernels.compiler.spelling import DTYPES, Kind, assignment, indented
from evokernels.compiler.structure import Structure, value_of
from evokernels.compiler.words import CHUNK, DENSE, GROUP, HEADER, STATES, TENSOR

__all__ = ["THREADS", "render_cuda"]

# Of a block.
THREADS = 256

_WARP = 32
# Of an access to memory; a thread has as many elements as fill it in the narrowest tensor.
_VECTOR_BYTES = 16

_TYPES = {"int64": "int64_t", "uint64": "uint64_t", "float64": "double", "pointer": "void *"}

# Fields that follow one another, which kernels index.
_ARRAYS = {
    **dict.fromkeys(STATES, "states"),
    **{f"{operand}_layout": "layouts" for operand in OPERANDS},
}

_FORMATS = {
    "float32": "Float32",
    "float64": "Float64",
    "bfloat16": "Bfloat16",
    "float16": "Float16",
}

# Literals of C are finite.
_NOT_FINITE = {"inf": "(1 / 0.0)", "-inf": "(-1 / 0.0)", "nan": "(0 / 0.0)"}

# What a step has besides the hyperparameters of a group, or in their place.
_STEP = tuple(symbol.name for symbol in (schedule.t, terms.base_lr, *terms.STEP_INPUTS))


def render_cuda(kinds: Sequence[Kind], words: int) -> str:
    """The source of a kernel, which includes ``csrc/``.

    Args:
        kinds: those of the tensors it can update; a record's ``kind`` is the place in here.
        words: 64-bit words that a launch can take.
    """
    structures = list(dict.fromkeys(kind.structure for kind in kinds))
    numbers = {
        "EVK_THREADS": THREADS,
        "EVK_WARP": _WARP,
        "EVK_DENSE": f"({DENSE})",
        **{f"EVK_OPERAND_{name.upper()}": OPERANDS.index(name) for name in "pg"},
        "EVK_FIRST_STATE": OPERANDS.index(STATES[0]),
        "EVK_STATES": max(len(structure.program.state) for structure in structures),
        "EVK_PRODUCTS": max(len(structure.products) for structure in structures),
        "EVK_SCALARS": max(len(structure.sums) for structure in structures),
    }
    return "\n".join(
        (
            "".join(f"#define {name} {value}\n" for name, value in numbers.items()),
            '#include "device.cuh"\n',
            _records(words),
            *(_structure(f"Structure{i}", structure) for i, structure in enumerate(structures)),
            *(
                _kind(f"Kind{i}", kind, f"Structure{structures.index(kind.structure)}")
                for i, kind in enumerate(kinds)
            ),
            _with_kind(len(kinds)),
            '#include "update.cuh"\n#include "squares.cuh"\n',
        )
    )


def _records(words: int) -> str:
    """What the host hands over."""
    given = {"Header": HEADER, "Group": GROUP, "Tensor": TENSOR, "Chunk": CHUNK}
    structs = {**given, "Step": dict.fromkeys(_STEP, "float64")}
    return (
        f"{''.join(_struct(name, fields) for name, fields in structs.items())}"
        "struct Words {\n"
        "    Header header;\n"
        f"    int64_t rest[{words - len(HEADER)}]; /* groups, then the addresses of gradients */\n"
        "};\n"
    )


def _struct(name: str, fields: Mapping[str, str]) -> str:
    members = [f"{_TYPES[type_]} {_ARRAYS.get(field, field)}" for field, type_ in fields.items()]
    counted = ((member, len(list(same))) for member, same in itertools.groupby(members))
    lines = (f"{member}{f'[{count}]' if count > 1 else ''};" for member, count in counted)
    return f"struct {name} {{\n{indented(1, lines)}}};\n"


def _structure(name: str, structure: Structure) -> str:
    """The numbers of a rule's step: products of what comes in, and their weighted sums."""
    products = structure.products
    places = {product: i for i, product in enumerate(products)}
    sums, first = [], 0
    for role, summands in zip(structure.program.scalars, structure.sums, strict=True):
        weighted = " + ".join(
            f"weights[{first + i}] * products[{places[product]}]"
            for i, product in enumerate(summands)
        )
        sums.append([f"return {weighted}; /* {role} */"])
        first += len(summands)
    return (
        f"struct {name} {{ /* {structure.name} */\n"
        f"    static constexpr int PRODUCTS = {len(products)}, SCALARS = {len(sums)};\n"
        "    EVK_APART double product(int i, const Group &group, const Step &step) {\n"
        f"{_choice(map(_product, products))}"
        "    }\n"
        "    EVK_APART double scalar(int i, const double *weights, const double *products) {\n"
        f"{_choice(sums)}"
        "    }\n"
        "};\n"
    )


def _product(product: Monomial) -> list[str]:
    lines, (result,) = assignments([value_of(product)])
    statements = (
        assignment(Line(line.target, line.op, tuple(map(_operand, line.args))), "double")
        for line in lines
    )
    return [*statements, f"return {_operand(result)};"]


def _operand(name: str) -> str:
    """A target of an earlier line or a number as it is, a symbol in its record."""
    if name in _STEP:
        return f"step.{name}"
    return f"group.{name}" if name in GROUP else _NOT_FINITE.get(name, name)


def _choice(cases: Iterable[Sequence[str]]) -> str:
    """One of several results, the last one where there is no such case."""
    *cases, last = cases
    text = "".join(
        f"        case {i}: {{\n{indented(3, case)}        }}\n" for i, case in enumerate(cases)
    )
    text += f"        default: {{\n{indented(3, last)}        }}\n"
    return f"        switch (i) {{\n{text}        }}\n"


def _kind(name: str, kind: Kind, structure: str) -> str:
    program = kind.structure.program
    real = DTYPES[kind.parameter].real
    sizes = (DTYPES[dtype].bytes for dtype in kind.stored)
    operands = [str(OPERANDS.index(state)) for state in program.state]
    body = [f"const {real} {state} = states[{i}];" for i, state in enumerate(program.state)]
    places = {"p": "p", **{state: f"states[{i}]" for i, state in enumerate(program.state)}}
    read = set()
    for line in program.lines:  # numbers where they are needed: registers are scarce
        for i, role in enumerate(program.scalars):
            if f"k{i}" in line.args and i not in read:
                read.add(i)
                body.append(f"const {real} k{i} = k[{i}]; /* {role} */")
        body.append(assignment(line, real))
    results = (f"{places[value]} = {result};" for value, result in program.results)
    return (
        f"struct {name} {{\n"
        f"    using Structure = {structure};\n"
        f"    using Real = {real};\n"
        f"    using Parameter = {_format(kind.parameter, kind.stochastic)};\n"
        f"    using State = {_format(kind.state, kind.stochastic)};\n"
        f"    static constexpr int WIDTH = {_VECTOR_BYTES // min(sizes)};\n"
        "    /* how many states there are, and places in arrays of them: no array is empty */\n"
        f"    static constexpr int STATES = {len(operands)}, ROOM = {max(1, len(operands))};\n"
        "    EVK_INLINE constexpr int operand(int state) {\n"
        f"        constexpr int operands[] = {{{', '.join(operands or '0')}}};\n"
        "        return operands[state];\n"
        "    }\n"
        "    template <typename Scalars>\n"
        "    EVK_INLINE void update(const Scalars &k, Real &p, Real g, Real (&states)[ROOM]) {\n"
        f"{indented(2, body)}"
        f"{indented(2, results)}"
        "    }\n"
        "};\n"
    )


def _format(dtype: str, stochastic: bool) -> str:
    return ("Stochastic" if stochastic and dtype == "bfloat16" else "") + _FORMATS[dtype]


def _with_kind(count: int) -> str:
    """A macro: a statement in which ``Kind`` is the kind of that number."""
    lines = [
        "#define EVK_WITH_KIND(number, ...)",
        "    switch (number) {",
        *(
            f"        case {i}: {{ using Kind = Kind{i}; __VA_ARGS__; }} break;"
            for i in range(count)
        ),
        "    }",
    ]
    return " \\\n".join(lines) + "\n"
