"""The genome: one optimizer update rule as plain, validated, immutable data.

What the fields mean for a training step is defined in ARCHITECTURE.md, "The rule".
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import numbers
import reprlib
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from evokernels.document import Document
from evokernels.errors import GenomeError, TermError, UnknownTermError

__all__ = [
    "CATALOGUES",
    "MOST_TERMS",
    "Genome",
    "OwnTerm",
    "Term",
    "add_own_term",
    "find_term",
    "own_terms",
]

MOST_TERMS = 256  # their sum must not be nested deeper than Python can go


class Term(enum.IntEnum):
    """The primitive terms; the codes are those of the source system."""

    GRAD = 0
    MOMENTUM = 1
    RMS_NORM = 2
    ADAM_TERM = 3
    SIGN_GRAD = 4
    SQRT_GRAD = 5
    NESTEROV = 6
    # the wide catalogue
    SIGN_MOMENTUM = 7
    LION = 8
    CAUTIOUS_MOMENTUM = 9
    CAUTIOUS_ADAM = 10
    BELIEF = 11
    TANH_GRAD = 12
    RMS_ABS = 13

    def __repr__(self) -> str:
        return repr(self.name)  # the name is what Genome accepts and JSON holds


# What a search draws from: the terms of the source system, or all.
CATALOGUES = {"classic": tuple(Term)[:7], "wide": tuple(Term)}


class Formula(Protocol):
    """What a term adds to the update: an expression of `evokernels.compiler`, immutable."""

    def reads(self, name: str) -> bool:
        """Whether a symbol of that name is anywhere in it."""


@dataclasses.dataclass(frozen=True)
class OwnTerm:
    """A term that a user has registered (`evokernels.terms.register`).

    It travels with its formula: a process that has never heard of it knows it when it is unpickled.
    """

    name: str
    formula: Formula

    def __repr__(self) -> str:
        return repr(self.name)

    @property
    def definition(self) -> str:
        """Name and formula, with all digits."""
        return f"{self.name} = {self.formula:full}"

    @functools.cached_property  # asked for each genome
    def reads_beta3(self) -> bool:
        """Whether the formula reads that number of the genome. No built-in term does."""
        return self.formula.reads("beta3")

    def __reduce__(self) -> tuple[Callable, tuple[str, Formula]]:
        return add_own_term, (self.name, self.formula)


_own_terms: dict[str, OwnTerm] = {}


def own_terms() -> Mapping[str, OwnTerm]:
    """Those that this process knows, by name."""
    return types.MappingProxyType(_own_terms)


def add_own_term(name: str, formula: Formula) -> OwnTerm:
    """The term of that name and formula; raises TermError if another one has the name.

    `evokernels.terms.register` is what users call: it checks the formula.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise TermError(
            f"a term's name is a word of letters, digits and underscores that begins with no "
            f"digit, got {name!r}"
        )
    if name in Term.__members__:
        raise TermError(f"{name} is a built-in term of another formula; give yours another name")
    term = _own_terms.setdefault(name, OwnTerm(name, formula))
    if term.formula != formula:
        raise TermError(f"{name} is {term.formula} already, not {formula}; give it another name")
    return term


def find_term(value: object) -> Term | OwnTerm:
    """A term from itself, its name or its integer code; raises UnknownTermError."""
    if isinstance(value, OwnTerm) and _own_terms.get(value.name) == value:
        return value
    if isinstance(value, str) and value in Term.__members__:
        return Term[value]
    if isinstance(value, str) and value in _own_terms:
        return _own_terms[value]
    is_code = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if is_code and int(value) in Term._value2member_map_:
        return Term(int(value))
    raise UnknownTermError(
        f"term_types holds {reprlib.repr(value)}, which is no term; use one of "
        f"{', '.join([*(f'{t.name} ({t.value})' for t in Term), *_own_terms])}, or register it "
        "before: evokernels.terms.register(name, formula), for commands in a file: --terms FILE"
    )


@dataclasses.dataclass(frozen=True)
class Interval:
    """The values a numeric field may take, printed the way a message needs it."""

    low: float
    high: float
    includes_low: bool = True
    includes_high: bool = True

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.includes_low else value > self.low
        below = value <= self.high if self.includes_high else value < self.high
        return above and below  # False for NaN

    def __str__(self) -> str:
        left, right = "(["[self.includes_low], ")]"[self.includes_high]
        return f"{left}{self.low:g}, {self.high:g}{right}"


# What a genome may hold. Wider than what the search explores (search/operators.py): a user may
# want no decay at all (wd_log10 = -inf) or a learning rate that no search would propose.
VALID = {
    "lr_log10": Interval(-12, 2),
    "beta1": Interval(0, 1, includes_high=False),
    "beta2": Interval(0, 1, includes_high=False),
    "beta3": Interval(0, 1, includes_high=False),
    "eps_log10": Interval(-16, 0),
    "wd_log10": Interval(-math.inf, 0),
    "clip_value": Interval(0, math.inf, includes_low=False, includes_high=False),
    "warmup_steps": Interval(0, 10**9),
}
VALID_ALPHA = Interval(-1e6, 1e6)


@dataclasses.dataclass(frozen=True)
class Genome(Document):
    """One optimizer update rule: immutable, hashable, validated on construction.

    Args:
        term_types: terms added up in the update: ``Term`` members, names or codes; names of terms
            that were registered (`evokernels.terms`).
        alphas: weight of each term, as many as ``term_types``; finite, within ±1e6.
        lr_log10: learning rate, as a power of ten, in [-12, 2].
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        beta3: by keyword; decay of the averages that read it (`evokernels.terms.average`), in
            [0, 1). A genome none of whose terms reads it has the default, whatever is given.
        eps_log10: added to denominators, as a power of ten, in [-16, 0].
        wd_log10: decoupled weight decay, as a power of ten, in [-inf, 0]; ``-inf`` is no decay.
        use_m: keep a first moment; otherwise terms see the gradient in its place.
        use_v: keep a second moment; otherwise terms see the squared gradient in its place.
        use_bias_correction: divide the moments by ``1 - beta ** t``.
        use_gradient_clipping: clamp every gradient element to ±``clip_value``.
        clip_value: positive and finite.
        use_warmup: raise the learning rate linearly over the first ``warmup_steps`` steps.
        warmup_steps: a whole number of steps, at least 0.
        use_cosine_decay: lower the learning rate along half a cosine over the whole training.

    Raises:
        GenomeError: naming the field, the value given and the values allowed.
    """

    NOUN: ClassVar[str] = "genome"
    ERROR: ClassVar[type[GenomeError]] = GenomeError
    NO_CONSTANT: ClassVar[str] = "no weight decay is null"
    SOMETIMES: ClassVar[Collection[str]] = ("beta3",)

    term_types: Sequence[Term | OwnTerm | str | int] = (Term.GRAD,)
    alphas: Sequence[float] = (1.0,)
    lr_log10: float = -3.0
    beta1: float = 0.9
    beta2: float = 0.999
    beta3: float = dataclasses.field(default=0.99, kw_only=True)
    eps_log10: float = -8.0
    wd_log10: float = -4.0
    use_m: bool = True
    use_v: bool = True
    use_bias_correction: bool = True
    use_gradient_clipping: bool = False
    clip_value: float = 1.0
    use_warmup: bool = False
    warmup_steps: int = 100
    use_cosine_decay: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _normalised(field, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if not self.term_types:
            raise GenomeError("term_types is empty; a genome needs at least one term")
        if len(self.term_types) > MOST_TERMS:
            raise GenomeError(
                f"term_types has {len(self.term_types)} entries; a genome has at most {MOST_TERMS}"
            )
        if len(self.alphas) != len(self.term_types):
            raise GenomeError(
                f"alphas has {len(self.alphas)} entries for {len(self.term_types)} term_types; "
                "give one weight for each term"
            )
        if not self.reads_beta3:  # so that genomes which mean the same are equal
            object.__setattr__(self, "beta3", type(self).beta3)

    @property
    def reads_beta3(self) -> bool:
        """Whether any of its terms reads ``beta3``."""
        return any(isinstance(term, OwnTerm) and term.reads_beta3 for term in self.term_types)

    @property
    def lr(self) -> float:
        """Learning rate before warmup and cosine."""
        return 10.0**self.lr_log10

    @property
    def eps(self) -> float:
        """The constant added to denominators."""
        return 10.0**self.eps_log10

    @property
    def weight_decay(self) -> float:
        """Decoupled weight decay."""
        return 10.0**self.wd_log10

    @property
    def definitions(self) -> list[str]:
        """Those of its terms that are a user's own."""
        return [term.definition for term in self.term_types if isinstance(term, OwnTerm)]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict: terms by name, no decay (``wd_log10 = -inf``) as None.

        It has ``beta3`` exactly where a term reads it.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["term_types"] = [term.name for term in self.term_types]
        fields["alphas"] = list(self.alphas)
        fields["wd_log10"] = None if self.wd_log10 == -math.inf else self.wd_log10
        if not self.reads_beta3:
            del fields["beta3"]
        return {"schema_version": self.SCHEMA_VERSION, **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Genome:
        """The inverse of `to_dict`; also takes the dicts of the source system.

        A dict without ``schema_version`` is one of the source system: fields that it leaves out
        have their defaults. With a version every field must be there, so that an export which
        lost a flag cannot come back as another optimizer; ``beta3`` only where a term reads it.

        Raises:
            GenomeError: unknown or missing field, unknown version, or an invalid value.
        """
        fields = cls._fields(data, versioned=False)
        if fields.get("wd_log10", 0) is None:
            fields["wd_log10"] = -math.inf
        genome = cls(**fields)
        if "beta3" in fields and not genome.reads_beta3:
            raise GenomeError("genome has beta3, which none of its terms reads; leave it out")
        if "beta3" not in fields and genome.reads_beta3 and "schema_version" in data:
            raise GenomeError("genome lacks beta3, which one of its terms reads; say what it is")
        return genome


def _normalised(field: dataclasses.Field, value: Any) -> Any:
    """The value in the one type its field is stored in, or a GenomeError."""
    if field.name == "term_types":
        return tuple(find_term(term) for term in _items(field.name, value))
    if field.name == "alphas":
        return tuple(_number("alphas", alpha, VALID_ALPHA) for alpha in _items(field.name, value))
    if field.type == "bool":
        if not isinstance(value, bool):
            raise GenomeError(f"{field.name} must be True or False, got {value!r}")
        return value
    number = _number(field.name, value, VALID[field.name])
    if field.type == "int":
        if not number.is_integer():
            raise GenomeError(f"{field.name} must be a whole number of steps, got {value!r}")
        return int(number)
    return number


def _items(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise GenomeError(f"{name} must be a list or tuple, got {value!r}")
    return value


def _number(name: str, value: Any, allowed: Interval) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise GenomeError(f"{name} must be a number in {allowed}, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond all floats
        number = math.nan
    if number not in allowed:
        raise GenomeError(f"{name} must lie in {allowed}, got {reprlib.repr(value)}")
    return number
