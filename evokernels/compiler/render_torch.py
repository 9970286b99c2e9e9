"""Rule → the text of a `torch.optim.Optimizer` that stands alone: one file, which needs only torch.

The update is written twice, for one tensor and for lists of tensors (``torch._foreach_*``), both
from the same statements. The numbers of the genome, weights of terms apart, are default arguments.
"""

from __future__ import annotations

import keyword
import re
import textwrap
from collections.abc import Collection, Iterable, Sequence
from string import Template
from typing import NamedTuple

from evokernels.compiler import terms
from evokernels.compiler.describe import formula
from evokernels.compiler.expr import Expr, symbols_of
from evokernels.compiler.lower import Rule, lower
from evokernels.compiler.schedule import warms_up
from evokernels.compiler.spelling_torch import WIDTH, list_lines, tensor_lines
from evokernels.compiler.statements import Statement, statements_of
from evokernels.compiler.torch_template import FILE, HELPERS
from evokernels.errors import GenomeError
from evokernels.genome import Genome, OwnTerm

__all__ = ["class_name", "render_torch"]


_LONGEST_NAME = 40

# Names that the file has for something else, and which a class could have.
_TAKEN = ("Any", "Callable", "Iterable", "MOMENTS", "Tensor", "ValueError")


class _Option(NamedTuple):
    """An argument of the optimizer; its default is text, None where it must be given."""

    name: str
    type: str
    default: str | None
    meaning: str


def class_name(text: str) -> str:
    """A name for the class, from that of a file or genome: ``my_optimizer`` → ``MyOptimizer``.

    Longer ones are cut off, so that lines with it are not too long.
    """
    words = re.findall(r"[A-Za-z0-9]+", text)
    name = "".join(word[0].upper() + word[1:] for word in words)[:_LONGEST_NAME]
    if not name or name[0].isdigit() or keyword.iskeyword(name) or name in _TAKEN:
        name = f"Optimizer{name}"
    return name


def render_torch(genome: Genome, name: str) -> str:
    """The Python file, formatted as `ruff format` would with lines of 100 characters.

    Args:
        name: of the class.

    Raises:
        GenomeError: the genome's terms cancel, and nothing ever changes.
    """
    rule = lower(genome)
    statements = statements_of(rule)
    if not statements:
        raise GenomeError(
            "this genome leaves every parameter as it is, since its weights are zero or cancel; "
            "there is no optimizer to write"
        )
    read = {symbol.name for each in statements for e in _numbers(each) for symbol in symbols_of(e)}
    options = _options(genome, read)
    text = Template(_chosen(FILE, rule)).substitute(
        name=name,
        documentation=_indented(1, _documentation(name, rule, options)),
        arguments=_indented(2, _arguments(options)),
        options=_indented(3, (f'"{option.name}": {option.name},' for option in options)),
        checks=_indented(2, _checks(options)),
        moments=_moments(rule.state_names.values()),
        rates=_indented(3, _rates(genome, read)),
        numbers=_indented(4, (f'"{each}": {value},' for each, value in _values(read).items())),
        one=_function("_update", "Tensor", rule, read, tensor_lines(statements)),
        lists=_function("_update_lists", "list[Tensor]", rule, read, list_lines(statements)),
    )
    for function, helper in HELPERS.items():
        if f"{function}(" in text:
            text += helper
    return text


def _chosen(text: str, rule: Rule) -> str:
    """The lines of the template that the rule has a use for."""
    lines = text.splitlines(keepends=True)
    keeps = bool(rule.program.state)
    return "".join(line.removeprefix("~") for line in lines if keeps or not line.startswith("~"))


def _numbers(statement: Statement) -> Iterable[Expr]:
    return (arg for arg in statement.args if isinstance(arg, Expr))


def _options(genome: Genome, read: set[str]) -> list[_Option]:
    """What the rule has, besides `maximize` and `foreach`."""
    scheduled = warms_up(genome) or genome.use_cosine_decay
    options = {
        "lr": (
            "float | Tensor",
            genome.lr,
            "learning rate"
            + (", before warmup and decay; schedulers may change it." if scheduled else "."),
        ),
        "betas": (
            "tuple[float, float]",
            (genome.beta1, genome.beta2),
            "beta1 and beta2, in [0, 1): what stays of the moments from step to step.",
        ),
        "beta3": ("float", genome.beta3, "in [0, 1): what stays of the averages that read it."),
        "eps": ("float", genome.eps, "added to denominators."),
        "weight_decay": ("float", genome.weight_decay, "apart from the gradient, as in AdamW."),
        "clip_value": ("float", genome.clip_value, "limit of each element of a gradient."),
        "warmup_steps": ("int", genome.warmup_steps, "steps until the full learning rate, from 1."),
        "total_steps": ("int", None, "length of the training in steps."),
    }
    has = {
        "lr": True,
        "betas": bool(read & {"beta1", "beta2", "bias1", "bias2"}),
        "beta3": bool(read & {"beta3", "bias3"}),
        "eps": "eps" in read,
        "weight_decay": "weight_decay" in read,
        "clip_value": "clip" in read,
        "warmup_steps": warms_up(genome),
        "total_steps": genome.use_cosine_decay or "progress" in read,
    }
    return [
        _Option(name, type_, None if default is None else repr(default), meaning)
        for name, (type_, default, meaning) in options.items()
        if has[name]
    ]


def _arguments(options: Sequence[_Option]) -> Iterable[str]:
    with_default = [option for option in options if option.default is not None]
    yield from (f"{each.name}: {each.type} = {each.default}," for each in with_default)
    yield "*,"
    yield from (f"{each.name}: {each.type}," for each in options if each.default is None)


def _checks(options: Sequence[_Option]) -> Iterable[str]:
    """Of "group", the options that an added group will have."""
    names = {option.name for option in options}
    for checked, wrong, allowed in (
        (("lr", "eps", "weight_decay"), "not _is_number({})", "a number from 0 on"),
        (("betas",), "not _are_betas({})", "two numbers in [0, 1)"),
        (("beta3",), "not _is_number({}, below=1.0)", "a number in [0, 1)"),
        (("clip_value",), "not _is_number({0}) or {0} == 0.0", "a number above 0"),
        (("warmup_steps", "total_steps"), "not _is_count({})", "a whole number from 1 on"),
        (("maximize", "foreach"), "{} not in (True, False, None)", "True or False"),
    ):
        there = [name for name in checked if name in names or name in ("maximize", "foreach")]
        if len(there) > 1:
            yield f"for name in {_tuple(there)}:"
            yield f"    if {wrong.format('group[name]')}:"
            yield f'        raise ValueError(f"{{name}} must be {allowed}, got {{group[name]!r}}")'
        for name in there if len(there) == 1 else ():
            yield f'{name} = group["{name}"]'
            yield f"if {wrong.format(name)}:"
            yield f'    raise ValueError(f"{name} must be {allowed}, got {{{name}!r}}")'


def _moments(names: Collection[str]) -> str:
    """The tuple of their names, in several lines if it must be."""
    if len(line := _tuple(names)) <= WIDTH - len("MOMENTS = "):
        return line
    lines = (f'    "{name}",' for name in names)
    noted = (line if len(line) <= WIDTH else f"{line}  # noqa: E501" for line in lines)
    return "\n".join(["(", *noted, ")"])


def _rates(genome: Genome, read: set[str]) -> Iterable[str]:
    """Numbers of a step that have a name there."""
    if {"beta1", "bias1"} & read and {"beta2", "bias2"} & read:
        yield 'beta1, beta2 = group["betas"]'
    else:
        for i in (1, 2):
            if {f"beta{i}", f"bias{i}"} & read:
                yield f'beta{i} = group["betas"][{i - 1}]'
    if {"beta3", "bias3"} & read:
        yield 'beta3 = group["beta3"]'
    yield 'lr = float(group["lr"])'
    if warms_up(genome):
        yield 'lr *= min(1.0, t / group["warmup_steps"])'
    if genome.use_cosine_decay:
        yield 'past = min(t - 1, group["total_steps"]) / group["total_steps"]'
        yield "lr *= (1.0 + math.cos(math.pi * past)) / 2.0"


def _values(read: set[str]) -> dict[str, str]:
    """The numbers that an update is given, and what they are in `step`."""
    values = {
        "lr": "lr",
        **{beta.name: beta.name for beta in terms.BIASES},
        **{bias.name: f"1.0 - {beta}**t" for beta, bias in terms.BIASES.items()},
        "eps": 'group["eps"]',
        "weight_decay": 'group["weight_decay"]',
        "clip": 'group["clip_value"]',
        "progress": 'min(t, group["total_steps"]) / group["total_steps"]',
        "t": "t",
    }
    return {_argument(name): value for name, value in values.items() if name in read}


def _argument(name: str) -> str:
    return "clip_value" if name == "clip" else name


def _function(name: str, kind: str, rule: Rule, read: set[str], lines: Sequence[str]) -> str:
    """The update as a function of tensors, or lists of tensors."""
    types = {each: "int" if each == "t" else "float" for each in _values(read)}
    meaning = {
        "_update": "One step of one parameter, in place.",
        "_update_lists": "The same for lists of parameters.",
    }[name]
    return "\n".join(
        [
            f"def {name}(",
            *(f"    {tensor}: {kind}," for tensor in ("p", "g", *rule.program.state)),
            "    *,",
            *(f"    {number}: {type_}," for number, type_ in types.items()),
            ") -> None:",
            f'    """{meaning}"""',
            _indented(1, "\n".join(lines).splitlines()),
        ]
    )


def _documentation(name: str, rule: Rule, options: Sequence[_Option]) -> Iterable[str]:
    """Of the class."""
    given = "".join(f", {option.name}=..." for option in options if option.default is None)
    own = [term for term in dict.fromkeys(rule.genome.term_types) if isinstance(term, OwnTerm)]
    state = {"m": "``exp_avg`` (m)", "v": "``exp_avg_sq`` (v)"}
    kept = [state.get(key, f"``{value}`` ({key})") for key, value in rule.state_names.items()]
    yield from (
        '"""An evolved update rule.',
        "",
        f"Used as ``{name}(model.parameters(){given})``.",
        "",
        "Step t = 1, 2, … of a parameter p with gradient g, for each element::",
        "",
        *(f"    {line}" for line in _broken(formula(rule.genome, named=True))),
        "",
        *_wrapped(
            "t counts the steps in which the parameter had a gradient. Arithmetic and moments are "
            "float32 for 16-bit parameters too, float64 for float64 ones. A NaN in a gradient "
            "always reaches the parameter."
        ),
        "",
        *_wrapped(
            f"State of each parameter: {', '.join(['``step`` (t)', *kept])}; checkpoints of "
            "evokernels.FusedEvolvedOptimizer load, and the other way round."
        ),
        "",
        "Args:",
        "    params: parameters, (name, parameter) pairs or groups, as for every torch optimizer.",
        *(f"    {option.name}: {option.meaning}" for option in options),
        "    maximize: go up the gradient instead of down.",
        "    foreach: update lists of tensors at once, not one after the other; None: on CUDA",
        "        devices, but for subclasses of tensors.",
        "",
        "Raises:",
        "    ValueError: an option, or in a step a gradient, that it cannot use.",
        "",
        "Written by ``python -m evokernels export`` from this genome::",
        "",
        *(f"    {line}" for line in rule.genome.to_json().splitlines()),
    )
    if own:
        yield from ("", "It has terms of its own::", "")
        for term in own:
            yield from (f"    {line}" for line in _broken(f"{term.name} = {term.formula}"))
    yield '"""'


def _broken(text: str) -> Iterable[str]:
    """Lines that are short enough, those of sums broken before a plus."""
    kept = "\u00a0"  # no place to break at
    for line in text.replace(" + -", " - ").splitlines():
        together = line.replace(" * ", f"{kept}*{kept}").replace(" / ", f"{kept}/{kept}")
        parts = textwrap.wrap(together, WIDTH - 8, subsequent_indent="    ")
        yield from (part.replace(kept, " ") for part in parts)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH - 4, break_long_words=False, break_on_hyphens=False)


def _tuple(items: Iterable[str]) -> str:
    texts = [f'"{item}"' for item in items]
    return f"({', '.join(texts)}{',' * (len(texts) == 1)})"


def _indented(depth: int, lines: Iterable[str]) -> str:
    """Lines behind the place where they are put, each with its newline but for the last."""
    return "\n".join(f"{'    ' * depth}{line}" if line else "" for line in lines)
