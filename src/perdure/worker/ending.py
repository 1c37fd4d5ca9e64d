"""Ends without code: terminate, run timeout, quarantine. A closing turn made by whoever acts.

Read the row and its live children, write the status, the message to the parent, and a request to cancel to the
children that end with it; fenced by version and epoch, so that a worker's own end may come first.
"""

from __future__ import annotations

import msgspec

from perdure.core import events as ev
from perdure.core import failure, stored
from perdure.core.failure import RecordedError
from perdure.core.status import ENDED
from perdure.core.turn import Row, Turn
from perdure.core.waits import Waits, read_waits, waits_text
from perdure.stores.contract import Store
from perdure.worker.remote_end import cancelling, policy_of, telling_parent

STRIKES = 3
"""So often a run may kill its worker (the last time executed alone) before it is quarantined."""


def what_it_did(row: Row) -> str:
    """Why a run with three strikes is put aside, as a sentence."""
    restless = read_waits(row.waits).restless
    if restless:
        return f"Its code did not rest and was stopped, or killed its worker, {row.strikes} times, at last {restless}."
    return f"It killed its worker {row.strikes} times, the last time executed alone."


def end_without_code(store: Store, row: Row, status: str, *, reason: str, turn_id: str) -> Turn:
    """The turn that ends this run as it is now; `Fenced` or `MoreMail` if it changes before the turn is written."""
    names = {"terminated": "Terminated", "timed_out": "TimedOut", "quarantined": "Quarantined"}
    error = RecordedError(type=names[status], message=reason)
    if row.kind == "activity" and status == "timed_out":
        error = failure.out_of_time(failure.NO_TIME_LEFT)
    unread = tuple(mail.id for mail in store.mailbox(row.key))
    ended = status in ENDED
    events = []
    if ended and row.kind == "workflow":
        events.append(stored.encode(ev.Ended(status=status, unread=unread, at=store.now())))
    sends = [
        cancelling(row.key, child.parent_step, reason or "its parent has ended")
        for child in store.children(row.key)
        if child.parent_close == "cancel" and child.parent_step is not None
    ]
    if row.parent is not None and row.parent_step is not None and policy_of(row.policy).awaited:
        sends.append(
            telling_parent(
                kind=row.kind,
                parent=row.parent,
                step=row.parent_step,
                run=row.id,
                status=status,
                result=None,
                error=error,
                attempts=row.attempt,
            )
        )
    return Turn(
        run=row.key,
        owner=None,
        epoch=row.epoch,
        version=row.version,
        last=row.turn,
        id=turn_id,
        first_seq=row.history_events + 1,
        events=events,
        # Taken, because `ended` lists them: what comes after this look must be listed too, so it is not forced.
        consumed=unread if ended else (),
        status=status,
        closing=ended,
        waits="" if ended else waits_text(Waits(restless=reason)),
        error=msgspec.json.encode(error).decode(),
        sends=sends,
    )
