"""What a store's tables are: which migrations made them, and which are still to come."""

from __future__ import annotations

import msgspec


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One migration. applied_at: microseconds since the epoch; None if it is still to come."""

    number: int
    name: str
    applied_at: int | None = None
    known: bool = True
    """False for one of a later version."""


class Schema(msgspec.Struct, frozen=True, kw_only=True):
    """The tables of a store. steps: by number, the applied and the missing ones; none where there are no migrations."""

    url: str
    steps: list[Step] = []

    @property
    def missing(self) -> list[Step]:
        """What `upgrade` would apply."""
        return [step for step in self.steps if step.applied_at is None]
