"""What a store's tables are: which migrations made them, which are still to come, and whether they are all there."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Final, NamedTuple, Protocol

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


class Known(Protocol):
    """A migration, as this version has it."""

    @property
    def number(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def checksum(self) -> str: ...


class Found(NamedTuple):
    """A migration, as a database has it. fits: whether a version that does not know it may go on beside it."""

    number: int
    name: str
    checksum: str
    applied_at: int
    fits: bool = False


def compared(url: str, found: Iterable[Found], migrations: Sequence[Known], tables: Collection[str]) -> Schema:
    """What a database has, beside what this version has. tables: the names of those that are there."""
    known = {migration.number: migration for migration in migrations}
    steps = []
    for one in found:
        mine = known.pop(one.number, None)
        if mine is None:
            trouble = "" if one.fits else LATER
        else:
            trouble = "" if one.checksum == mine.checksum else EDITED
        is_known = mine is not None
        steps.append(Step(number=one.number, name=one.name, applied_at=one.applied_at, known=is_known, trouble=trouble))
    made = [one.text for one in migrations if one.number not in known]
    gone = [table for text in made for table in _TABLE.findall(text) if table not in tables]
    steps += [Step(number=one.number, name=one.name) for one in known.values()]
    return Schema(url=url, steps=sorted(steps, key=lambda step: step.number), gone=gone)
