"""What a scenario left behind, read once: the tables, what triggers saw of every change, and the ledger of effects.

Each kind of store reads its own (`sqlite.py`, `postgres.py`); the audit sees only this.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the ledger: a function began or ended."""

    what: str
    run: str
    step: str
    attempt: int
    key: str
    pid: int
    epoch: int
    at: int
    mono: float = 0.0
    """By a clock that nobody sets."""


@dataclass(frozen=True, kw_only=True)
class Fence:
    """One change of a run's fence or status, as a trigger saw it. progress: events and attempts recorded by then."""

    run: int
    old_owner: str | None
    owner: str | None
    old_epoch: int
    epoch: int
    old_version: int
    version: int
    old_status: str
    status: str
    old_progress: int
    progress: int
    old_strikes: int
    strikes: int

    @property
    def strikes_it(self) -> bool:
        """Whether it is the death of a holder, for which the run may be to blame."""
        return self.old_owner is not None and self.strikes > self.old_strikes

    @property
    def interrupts(self) -> bool:
        """Whether a holder lost the run in the middle of its work: reaped, retired, a stray, or struck."""
        lost = self.old_owner is not None and self.owner != self.old_owner and self.old_status == "running"
        return (
            lost and self.progress == self.old_progress and (self.status == "ready" or self.strikes > self.old_strikes)
        )


@dataclass(kw_only=True)
class Facts:
    """Everything the audit looks at. runs and what belongs to them: by the run's key."""

    runs: dict[int, dict[str, Any]]
    history: dict[int, list[dict[str, Any]]]
    fences: dict[int, list[Fence]]
    epochs: dict[tuple[int, int], int]
    """(run, seq) of an event -> the epoch under which it was written."""
    broken: list[str]
    """Changes that must never be seen at all."""
    workers: dict[str, tuple[str, bool]]
    """incarnation -> the name of its process, and whether the store has buried it."""
    mail: list[dict[str, Any]]
    orphans: list[str]
    """Rows that belong to no run."""
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(run id, step) -> rows that a transaction step wrote."""
    begun: list[Line] = field(default_factory=list)
    ended: list[Line] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.keys = {run["id"]: key for key, run in self.runs.items()}

    def is_activity(self, line: Line) -> bool:
        """Whether the function ran as a dispatched activity, a run of its own."""
        return f"{line.run}/{line.step}" in self.keys

    def executor(self, line: Line) -> int:
        """The key of the run whose claim an execution needs: the run itself, or the dispatched activity."""
        return self.keys.get(f"{line.run}/{line.step}", self.keys[line.run])


def ledger(path: Path, what: str) -> list[Line]:
    """What was done, oldest first."""
    with open(path, encoding="utf-8") as file:
        return [line for line in (Line(**json.loads(text)) for text in file) if line.what == what]
