"""A report as one HTML page without scripts, made of sections: text, tables, charts, a formula.

`run`, `coevolution` and `contest` say what is in it;
``templates/report.html.j2`` says how it looks.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from evokernels.compiler.describe import formula
from evokernels.errors import ReportWarning
from evokernels.evolution.files import write_atomically
from evokernels.evolution.html_report.family import Family
from evokernels.evolution.html_report.formula import mathml
from evokernels.genome import Genome

__all__ = [
    "REPORT",
    "Drawing",
    "Listing",
    "Page",
    "Picture",
    "Rule",
    "Section",
    "Table",
    "Text",
    "write",
]

REPORT = "report.html"


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text: names to the left, numbers to the right.

    Attributes:
        title: what one opens to see it; empty: it is always seen.
        words: how many of its columns, from the first, hold words.
    """

    kind: ClassVar[str] = "table"
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    words: int = 1


@dataclasses.dataclass(frozen=True)
class Picture:
    """A chart of `pictures`.

    Attributes:
        title: above it, also for those who cannot see it.
        svg: markup.
        legend: for each colour of the page what it means.
    """

    kind: ClassVar[str] = "picture"
    title: str
    svg: str
    legend: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A family tree, and whose it is."""

    kind: ClassVar[str] = "drawing"
    family: Family
    subject: str


@dataclasses.dataclass(frozen=True)
class Rule:
    """A genome as a formula, and as the text that it was typeset from."""

    kind: ClassVar[str] = "rule"
    genome: Genome

    @property
    def text(self) -> str:
        """The formula."""
        return formula(self.genome)

    @property
    def mathml(self) -> str:
        """The same as markup."""
        return mathml(self.text)


@dataclasses.dataclass(frozen=True)
class Listing:
    """Text whose lines stay as they are; ``title`` as of a table."""

    kind: ClassVar[str] = "listing"
    text: str
    title: str = ""


Item = Text | Table | Picture | Drawing | Rule | Listing


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page; pictures that follow each other lie side by side."""

    anchor: str
    title: str
    items: Sequence[Item]

    @property
    def blocks(self) -> list[list[Item]]:
        """Pictures that follow each other together, everything else alone."""
        blocks: list[list[Item]] = []
        for item in self.items:
            if blocks and item.kind == blocks[-1][-1].kind == "picture":
                blocks[-1].append(item)
            else:
                blocks.append([item])
        return blocks


@dataclasses.dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        facts: what matters most, each with what it is and a note.
        running: of a run that is not complete, what is to be said of that.
    """

    title: str
    subtitle: str
    facts: Sequence[tuple[str, str, str]]
    sections: Sequence[Section]
    running: str = ""


def write(
    folder: pathlib.Path,
    make: Callable[[], Page],
    consequence: str = "all else is there, and the same command tries again",
) -> None:
    """Write ``report.html``.

    Args:
        folder: of a run, whose other files are written.
        make: makes the page.
        consequence: of a page that cannot be written.

    Warns:
        ReportWarning: it cannot be made or written. What was computed is not lost for a picture,
            so the run ends as one that has its report.
    """
    try:
        text = _template().render(page=make())
        # names of files need not be text
        write_atomically(folder / REPORT, text.encode(errors="replace"))
    except Exception as error:
        warnings.warn(
            f"{folder / REPORT} could not be written ({type(error).__name__}: {error}); "
            f"{consequence}",
            ReportWarning,
            stacklevel=2,
        )


@functools.cache
def _template():  # noqa: ANN202 (jinja2 is imported here alone)
    # imported here: workers and `--help` would pay for it
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("evokernels.evolution.html_report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2")
