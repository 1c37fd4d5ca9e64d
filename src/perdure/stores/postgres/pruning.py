"""Which ended runs go, and how much of that is done at once: a few milliseconds.

What may go is looked up without a lock: an ended run never lives again, and gets no new children.
"""

from __future__ import annotations

from perdure.core.turn import Key, Pruned, Retention
from perdure.stores.postgres.judging import Ask
from perdure.stores.retention import EVERY_END, LOOKED_AT, PIECE, WHOLE, Chosen


def chosen(ask: Ask, retention: Retention) -> Chosen:
    """What goes next."""
    seen = ask(
        "may_go",
        namespace=retention.namespace,
        ended_before=retention.ended_before,
        statuses=[str.__str__(status) for status in retention.statuses or EVERY_END],
        workflow=retention.workflow,
        after=retention.after,
        number=LOOKED_AT,
    )
    # One that was created after the time given ends the walk.
    more = len(seen) == LOOKED_AT and seen[-1][1] < retention.ended_before
    runs: list[Key] = []
    room = PIECE
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
    return Chosen(runs, None, seen[-1][0] if more else None)


def remove(ask: Ask, chosen: Chosen) -> Pruned:
    """Inside a transaction."""
    if chosen.piece is not None:
        run, events, messages = chosen.piece
        if not ask("hold_ended", keys=[run]):
            return Pruned(runs=0, after=run)
        if events > PIECE // 2:
            # From the end: what is left of a history is a beginning of it.
            ask("forget_events", run=run, after=max(events - PIECE, 0))
        else:
            ask("forget_messages", run=run, number=min(messages, PIECE))
        return Pruned(runs=0, after=chosen.after)
    keys = [key for (key,) in ask("hold_ended", keys=chosen.runs)]
    for statement in WHOLE:
        ask(statement, keys=keys)
    return Pruned(runs=len(keys), after=chosen.after)
