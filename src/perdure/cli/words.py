"""How the command writes: results to stdout, everything else to stderr, and nothing that a terminal would obey.

Ids, errors and results come from other people's programs. Their control characters are shown, never sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

import click

from perdure.core.retry import length

_UNSAFE: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_SPACES: Final = re.compile(r"\s*[\r\n\t]\s*")


def safe(text: str) -> str:
    """`text` with its control characters as `\\u001b`; line ends and tabs stay."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def line(text: str) -> str:
    """The same as one line."""
    return _SPACES.sub(" ", safe(text)).rstrip()


def say(text: str = "") -> None:
    """A result."""
    click.echo(safe(text))


def tell(text: str) -> None:
    """Anything else."""
    click.echo(safe(text), err=True)


def complain(text: str) -> None:
    """What went wrong."""
    tell(f"perdure: {text}")


class Wrong(click.ClickException):
    """Wrong usage or input, said in our own words: exit 2, without click's lines about usage."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        complain(self.message)


class NoSuch(Wrong):
    """A workflow that is not there."""

    exit_code = 3


def json_text(value: Any) -> str:
    """A plain value as one line of JSON that people can read, safe to print."""
    # A control character can only be inside a string, where \u001b is JSON too.
    return safe(json.dumps(value, ensure_ascii=False))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, indent: str = "") -> list[str]:
    """Rows under a head, columns aligned; the last column is as long as it is."""
    cells = [list(head), *([line(cell) for cell in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(head))]
    return [
        indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    ]


def when(at: datetime | None) -> str:
    """A time, to the second, UTC."""
    return "-" if at is None else at.strftime("%Y-%m-%d %H:%M:%S")


def after(start: datetime | None, at: datetime | None) -> str:
    """A time as its distance from another."""
    if start is None or at is None:
        return "-"
    return f"+{length(at - start)}"
