"""What a store's tables are: which migrations made them, which are still to come, and whether they are all there."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Final

import msgspec

_TABLE: Final = re.compile(r"^CREATE TABLE (?:perdure\.)?(\w+)", re.MULTILINE)


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One migration. applied_at: microseconds since the epoch; None if it is still to come."""

    number: int
    name: str
    applied_at: int | None = None
    known: bool = True
    """False for one of a later version."""
    trouble: str = ""
    """Why this version must not touch the tables, as the end of a sentence that begins with its name."""


class Schema(msgspec.Struct, frozen=True, kw_only=True):
    """The tables of a store. steps: by number, the applied and the missing ones; none where there are no migrations.

    gone: tables that its migrations have made and that are not there.
    """

    url: str
    steps: list[Step] = []
    gone: list[str] = []

    @property
    def missing(self) -> list[Step]:
        """What `upgrade` would apply."""
        return [step for step in self.steps if step.applied_at is None]

    @property
    def current(self) -> bool:
        """Whether this version can work with it as it is."""
        return not self.missing and not self.gone and not any(step.trouble for step in self.steps)


EDITED: Final = "was applied with another text than this version has"
LATER: Final = "is of a later version, beside which this one cannot work"


def gone(texts: Iterable[str], there: Collection[str]) -> list[str]:
    """The tables that these migrations make and that are not among those that are there."""
    return [table for text in texts for table in _TABLE.findall(text) if table not in there]
