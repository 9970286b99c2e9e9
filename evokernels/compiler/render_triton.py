"""Kinds → Triton: the update of an element, the scalars of a step, and the choice among kinds.

The text goes behind those of ``kernels/triton_language.py``, which has everything else (loops over
chunks and elements, formats, random bits), and of ``kernels/triton_functions.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from evokernels.compiler.expr import Line, assignments
from evokernels.compiler.ops import OPS
from evokernels.compiler.program import OPERANDS
from evokernels.compiler.spelling import DTYPES, Kind
from evokernels.compiler.structure import Structure, value_of
from evokernels.compiler.terms import GROUP_INPUTS, STEP_INPUTS, base_lr
from evokernels.compiler.words import GROUP, STATES

__all__ = ["render_module", "room_for_numbers", "vector_length"]

_VECTOR_BYTES = 16
# In the room for numbers: for which group and step they are, then each as float64 and as float32.
_WORDS_BEFORE = 2
_WORDS_A_NUMBER = 2


def render_module(kinds: Sequence[Kind]) -> str:
    """The kernels ``update(words, numbers)`` and ``squares(words)`` for tensors of these kinds.

    A tensor's kind is its place in `kinds`.
    """
    structures = list(dict.fromkeys(kind.structure for kind in kinds))
    names = {structure: f"{structure.name}_{i}" for i, structure in enumerate(structures)}
    parts = [
        *(_numbers(structure, name) for structure, name in names.items()),
        *(_update(kind, i) for i, kind in enumerate(kinds)),
        _COMPUTE.format(
            parts=_switch(kinds, lambda kind: f"numbers_{names[kind.structure]}({_NUMBERS})")
        ),
        _UPDATE.format(
            parts="".join(
                _branch(i, [i], f"update_chunk({_UPDATED}, {_how(kind, i)})")
                for i, kind in enumerate(kinds)
            )
        ),
        _CLEAR.format(
            parts=_switch(
                kinds, lambda kind: f"clear_chunk(words, number, {_memory_type(kind.parameter)})"
            )
        ),
        _SQUARES.format(
            parts=_switch(
                kinds,
                lambda kind: (
                    f"total = squares_of_chunk(words, number, tl.{kind.parameter}, "
                    f"{_memory_type(kind.parameter)})"
                ),
            )
        ),
        _KERNELS.format(room=room_for_numbers(kinds)),
    ]
    return "\n\n".join(parts)


def room_for_numbers(kinds: Sequence[Kind]) -> int:
    """How many words each block of ``update`` needs for the scalars of a rule."""
    return _WORDS_BEFORE + _WORDS_A_NUMBER * max(
        len(kind.structure.program.scalars) for kind in kinds
    )


_UPDATED = "words, number, t, numbers"
_NUMBERS = "words, group, t, weights, numbers"

_COMPUTE = """\
@triton.jit
def compute(kind, words, group, t, weights, numbers):
{parts}"""

_UPDATE = """\
@triton.jit
def update_kind(kind, words, number, t, numbers):
{parts}"""

_CLEAR = """\
@triton.jit
def clear_kind(kind, words, number):
{parts}"""

_SQUARES = """\
@triton.jit
def squares_of_kind(kind, words, number):
    total = constant(0.0)
{parts}    return total
"""

_KERNELS = """\
@triton.jit
def update(words, numbers):
    walk(words, numbers + tl.program_id(0) * {room}, compute, update_kind, clear_kind)


@triton.jit
def squares(words):
    add_squares(words, squares_of_kind)
"""


def _numbers(structure: Structure, name: str) -> str:
    """The function that computes them for a step: weighted sums of the structure's products."""
    products = structure.products
    lines, operands = assignments([value_of(product) for product in products])
    values = dict(zip(products, operands, strict=True))
    needed = {line.target: (line.args, _assignment(line)) for line in lines}
    for place, symbol in enumerate(GROUP_INPUTS, len(GROUP) - len(GROUP_INPUTS)):
        read = "learning_rate(group)" if symbol == base_lr else f"float64_in(group, {place})"
        needed[symbol.name] = ((), f"{symbol.name} = {read}")
    weights = iter(range(structure.weights))
    text: list[str] = []

    def value(operand: str) -> str:
        """An operand, computed where it is first used: registers are few."""
        args, assignment = needed.pop(operand, ((), None))
        for arg in args:
            value(arg)
        text.extend([assignment] if assignment else [])
        return _operand(operand)

    for i, products in enumerate(structure.sums):
        summands = [f"tl.load(weights + {next(weights)}) * {value(values[p])}" for p in products]
        text.append(f"store_number(numbers, {i}, {' + '.join(summands)})")
    return (
        "@triton.jit\n"
        f"def numbers_{name}({_NUMBERS}):\n"
        f"    {', '.join(symbol.name for symbol in STEP_INPUTS)} = step_inputs(words)\n"
        f"{_indented(text)}"
    )


def _update(kind: Kind, place: int) -> str:
    """The function that updates elements."""
    program = kind.structure.program
    dtypes = {**dict.fromkeys("pg", kind.parameter), **dict.fromkeys(program.state, kind.state)}

    def load(value: str) -> str:
        return f"{value} = load({value}_at, inside, tl.{dtypes[value]}, tl.{kind.arithmetic})"

    def store(value: str, result: str) -> str:
        if kind.stochastic and dtypes[value] == "bfloat16":
            random = f"draw(where, {OPERANDS.index(value)}, stream, tile)"
            return f"store_stochastically({value}_at, inside, {result}, {random})"
        return f"store({value}_at, inside, {result}, tl.{dtypes[value]})"

    def assignment(line: Line) -> Iterable[str]:
        # registers are few: a scalar, which comes from the nearest cache, is loaded where it is
        # first used, and a result is stored as soon as it is known
        for arg in [arg for arg in dict.fromkeys(line.args) if arg in scalars]:
            number, role = scalars.pop(arg)
            yield f"{arg} = load_number(numbers, {number}, tl.{kind.arithmetic})  # {role}"
        yield _assignment(line)
        for value, result in program.results:
            if result == line.target:
                yield store(value, result)

    scalars = {f"k{i}": (i, role) for i, role in enumerate(program.scalars)}
    lines = [
        *(f"{state}_at = states_at[{i}]" for i, state in enumerate(program.state)),
        *map(load, program.inputs),
        f"tl.store(g_at, tl.zeros([tile], {_memory_type(kind.parameter)}), mask=inside & clear)",
        *(text for line in program.lines for text in assignment(line)),
    ]
    return (
        "@triton.jit\n"
        f"def update_{place}(\n"
        "    p_at, g_at, states_at, inside, clear, numbers, draw: tl.constexpr, where, stream,\n"
        "    tile: tl.constexpr,\n"
        f"):\n{_indented(lines)}"
    )


def _how(kind: Kind, place: int) -> str:
    """The function that updates elements of a kind, as what they are read, which states there are,
    and how many elements at once."""
    memory = _memory_type(kind.parameter), _memory_type(kind.state)
    states = tuple(map(STATES.index, kind.structure.program.state))
    return f"update_{place}, {', '.join(memory)}, {states}, {vector_length(kind)}"


def vector_length(kind: Kind) -> int:
    """Elements a thread updates at a time: 16 bytes of the widest operand.

    A thread has the same elements of all operands, and what has more than 16 bytes Triton stores by
    way of shared memory.
    """
    return _VECTOR_BYTES // max(DTYPES[dtype].bytes for dtype in kind.stored)


def _switch(kinds: Sequence[Kind], call: Callable[[Kind], str]) -> str:
    """What is called for each kind; kinds that call the same share a branch."""
    calls: dict[str, list[int]] = {}
    for i, kind in enumerate(kinds):
        calls.setdefault(call(kind), []).append(i)
    return "".join(_branch(n, places, text) for n, (text, places) in enumerate(calls.items()))


def _branch(number: int, places: Sequence[int], text: str) -> str:
    condition = " | ".join(f"(kind == {place})" for place in places)
    return f"    {'if' if number == 0 else 'elif'} {condition}:\n        {text}\n"


def _assignment(line: Line) -> str:
    return f"{line.target} = {OPS[line.op].triton.format(*map(_operand, line.args))}"


def _operand(text: str) -> str:
    """A name, or a number in float64."""
    if text in ("inf", "-inf", "nan"):
        return f'constant(float("{text}"))'
    return text if text.isidentifier() else f"constant({text})"


def _memory_type(dtype: str) -> str:
    """As what elements are read: bfloat16 as its bits."""
    return "tl.uint16" if dtype == "bfloat16" else f"tl.{dtype}"


def _indented(lines: Iterable[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)
