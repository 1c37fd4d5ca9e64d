"""Which ended runs go, and how much of that is done at once: a few milliseconds of the file's single writer.

What may go is looked up without the write lock: an ended run never lives again, and gets no new children.
"""

from __future__ import annotations

import json
from sqlite3 import Connection

from perdure.core.turn import Key, Pruned, Retention
from perdure.stores.retention import EVERY_END, LOOKED_AT, PIECE, WHOLE, Chosen
from perdure.stores.sqlite.queries import SQL


def chosen(db: Connection, retention: Retention) -> Chosen:
    """What goes next."""
    statuses = json.dumps([str.__str__(status) for status in retention.statuses or EVERY_END])
    before = retention.ended_before
    last, seen, late, found = db.execute(
        SQL["may_go"],
        (
            before,
            *(retention.namespace, before, statuses, retention.workflow),
            *(retention.after, LOOKED_AT),
        ),
    ).fetchone()
    going = sorted(json.loads(found)) if found else []
    end = None if seen < LOOKED_AT or late else last
    runs: list[Key] = []
    room = PIECE
    for key, events, messages in going:
        if len(runs) == retention.limit:
            return Chosen(runs, None, runs[-1])
        if not retention.dry_run and events + messages > room:
            if runs:
                return Chosen(runs, None, runs[-1])
            return Chosen([], (key, events, messages), key - 1)
        room -= events + messages
        runs.append(key)
    return Chosen(runs, None, end)


def remove(db: Connection, chosen: Chosen) -> Pruned:
    """Inside a write transaction."""
    if chosen.piece is not None:
        run, events, messages = chosen.piece
        if events > PIECE // 2:
            # From the end: what is left of a history is a beginning of it.
            db.execute(SQL["forget_events"], (run, max(events - PIECE, 0)))
        else:
            db.execute(SQL["forget_messages"], (run, run, min(messages, PIECE)))
        return Pruned(runs=0, after=chosen.after)
    keys = json.dumps(chosen.runs)
    removed = 0
    for statement in WHOLE:
        removed = db.execute(SQL[statement], (keys,)).rowcount
    return Pruned(runs=removed, after=chosen.after)
