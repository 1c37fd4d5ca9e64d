"""What a store says of a turn that it did not write: the same in every store that has rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from perdure.core.status import ENDED, MOVES, Status
from perdure.core.turn import Committed, Fenced, MoreMail, Turn, TurnVerdict, Unstorable

BEFORE: Final = {after.value: " ".join(before.value for before in Status if after in MOVES[before]) for after in Status}
"""For each status the words of those that may become it."""

ENDS: Final = frozenset(status.value for status in ENDED)
AT_WAKE: Final = frozenset({"scheduled", "running", "waiting", "blocked"})
"""Statuses in which an unowned run may be claimed at its `wake_at`."""


def verdict_on(turn: Turn, row: Sequence[Any] | None, unread: set[str]) -> TurnVerdict | None:
    """Why a turn is not to be written; None if nothing speaks against it.

    row: key, owner, whether that lives, epoch, version, last turn, status, number of events, time of the end.
    unread: ids of the run's unread mail.
    """
    if row is None:
        return Fenced(run=turn.run)
    _, owner, lives, epoch, version, last, status, events, ended_at = row
    if (last, version) == (turn.id, turn.version + 1):
        return Committed(run=turn.run)  # asked again: written the first time
    holds = (
        ended_at is None
        and (turn.epoch, turn.version, turn.last) == (epoch, version, last)
        and (turn.owner is None or (turn.owner == owner and lives))
    )
    if not holds:
        return Fenced(run=turn.run)
    if turn.status not in BEFORE:
        return Unstorable(run=turn.run, reason=f"{turn.status!r} is no status; expected one of {', '.join(BEFORE)}")
    if status not in BEFORE[turn.status].split():
        return Unstorable(run=turn.run, reason=f"a run that is {status} may not become {turn.status}")
    if turn.events and turn.first_seq != events + 1:
        reason = f"events from {turn.first_seq} on do not follow a history of {events}"
        return Unstorable(run=turn.run, reason=reason)
    if turn.closing and not turn.forced and not unread <= set(turn.consumed):
        return MoreMail(run=turn.run)
    return None
