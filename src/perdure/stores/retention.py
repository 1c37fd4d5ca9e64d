"""How much of a prune one call does, and what it chooses: the same in every store that has rows.

What may go is looked up without a lock: an ended run never lives again, and gets no new children.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from perdure.core.status import ENDED
from perdure.core.turn import Key, Retention

LOOKED_AT: Final = 1_000
"""Runs looked at by one call, about."""
PIECE: Final = 1_000
"""Events and messages removed by one call."""
EVERY_END: Final = tuple(sorted(status.value for status in ENDED))

Seen = tuple[Key, int, bool, int, int]
"""Of a run that was looked at: its key, when it was created, whether it may go, its events, its messages."""


class Chosen(NamedTuple):
    """What one call removes: whole runs, or a piece of one that is too large to go at once."""

    runs: list[Key]
    piece: tuple[Key, int, int] | None  # run, events, messages
    after: Key | None


def chosen(look: Callable[[Key, int], Sequence[Seen]], retention: Retention) -> Chosen:
    """What goes next. `look(after, number)` answers so many runs by key, which grows with time.

    Where all may go, it looks at one more than go; each further look is larger, to get past many that stay.
    """
    runs: list[Key] = []
    room = PIECE
    after, number, looked_at = retention.after, retention.limit + 1, 0
    while looked_at < LOOKED_AT:
        number = min(number, LOOKED_AT)
        seen = look(after, number)
        for key, _, goes, events, messages in seen:
            if not goes:
                continue
            if len(runs) == retention.limit:
                return Chosen(runs, None, runs[-1])
            if not retention.dry_run and events + messages > room:
                if runs:
                    return Chosen(runs, None, runs[-1])
                return Chosen([], (key, events, messages), key - 1)
            room -= events + messages
            runs.append(key)
        # One that was created after the time given ends the walk.
        if len(seen) < number or seen[-1][1] >= retention.ended_before:
            return Chosen(runs, None, None)
        after, looked_at, number = seen[-1][0], looked_at + number, 4 * number
    return Chosen(runs, None, after)
