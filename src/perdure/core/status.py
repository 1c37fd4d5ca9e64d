"""What a run can be, and every legal move between two of these: one table, printed by `python -m perdure.core.status`.

A status says what is, an event what happened. Stores keep the plain word; code compares with the enum,
which is a `str`, so that plain words work everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final


class Status(str, Enum):
    """The status of a run; equal to its plain word."""

    SCHEDULED = "scheduled"  # starts later
    READY = "ready"  # waits for a worker
    HELD = "held"  # over a limit
    RUNNING = "running"  # its code or a local step is active
    WAITING = "waiting"  # parked until a message or a timer
    BLOCKED = "blocked"  # the code differs from the history
    QUARANTINED = "quarantined"  # it killed its workers
    PAUSED = "paused"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TERMINATED = "terminated"
    TIMED_OUT = "timed_out"
    CONTINUED = "continued"

    def __str__(self) -> str:
        return self.value

    @property
    def ended(self) -> bool:
        """True for the statuses that never change again."""
        return self in ENDED


ENDED: Final = frozenset(
    {
        Status.COMPLETED,
        Status.FAILED,
        Status.CANCELLED,
        Status.TERMINATED,
        Status.TIMED_OUT,
        Status.CONTINUED,
    }
)

_OUTSIDE: Final = frozenset({Status.TERMINATED, Status.TIMED_OUT})  # what anybody may do to a live run
_TURN: Final = frozenset(
    {
        Status.RUNNING,
        Status.WAITING,
        Status.READY,
        Status.BLOCKED,
        Status.COMPLETED,
        Status.FAILED,
        Status.CANCELLED,
        Status.CONTINUED,
    }
)

MOVES: Final[Mapping[Status, frozenset[Status]]] = {
    Status.SCHEDULED: frozenset({Status.RUNNING}) | _OUTSIDE,
    Status.READY: frozenset({Status.RUNNING, Status.HELD, Status.QUARANTINED}) | _OUTSIDE,
    Status.HELD: frozenset({Status.READY}) | _OUTSIDE,
    Status.RUNNING: _TURN | _OUTSIDE | {Status.QUARANTINED},
    # Code that never rests is put aside from its pause.
    Status.WAITING: _TURN | _OUTSIDE | {Status.QUARANTINED},
    Status.BLOCKED: frozenset({Status.RUNNING, Status.BLOCKED}) | _OUTSIDE,
    Status.QUARANTINED: frozenset({Status.READY}) | _OUTSIDE,
    Status.PAUSED: frozenset({Status.READY}) | _OUTSIDE,
    **{status: frozenset() for status in ENDED},
}


def may_become(before: Status, after: Status) -> bool:
    """Whether a run may go from one status to the other."""
    return after in MOVES[before]


if __name__ == "__main__":
    for before, after in MOVES.items():
        print(f"{before:<12} -> {', '.join(sorted(after)) or 'for ever'}")
