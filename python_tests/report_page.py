"""A report as tests read it."""

import html
import re

MACHINE = '<section id="machine"'


def lasting(page):
    """What two runs of one history have in common: all but machine, versions and times."""
    before, found, after = page.partition(MACHINE)
    assert found
    return before + after[after.index("</section>") :]


def section(page, anchor):
    """The markup of one section."""
    (found,) = re.findall(rf'<section id="{anchor}">(.*?)</section>', page, re.DOTALL)
    return found


def tables(markup):
    """Every table as a list of rows, the head first, each a list of the text of its cells."""
    return [
        [
            [text(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
            for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
        ]
        for table in re.findall(r"<table>(.*?)</table>", markup, re.DOTALL)
    ]


def text(markup):
    """What one reads of markup."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split())
