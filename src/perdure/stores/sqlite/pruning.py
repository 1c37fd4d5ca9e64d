"""Removes ended runs, a few milliseconds of the file's single writer at a time."""

from __future__ import annotations

import json
from sqlite3 import Connection
from typing import Final

from perdure.core.turn import Key, Pruned, Retention
from perdure.stores import retention as shared
from perdure.stores.retention import EVERY_END, PIECE, Chosen, Seen
from perdure.stores.sqlite.queries import SQL

WHOLE: Final = ("forget_histories", "forget_mail", "forget_inputs", "forget_keys", "forget_runs")


def chosen(db: Connection, retention: Retention) -> Chosen:
    """What goes next."""
    statuses = json.dumps([str.__str__(status) for status in retention.statuses or EVERY_END])
    asked = (retention.namespace, retention.ended_before, statuses, retention.workflow)

    def look(after: Key, number: int) -> list[Seen]:
        return db.execute(SQL["may_go"], (*asked, after, number)).fetchall()

    return shared.chosen(look, retention)


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
