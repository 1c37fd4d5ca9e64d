"""What became of those items of a batch that were not written: asked after the commit, and only then.

The answer may be of a moment later than the commit, and is true all the same: a fence that failed never holds again,
an id that is taken stays taken. Where nothing stands in the way any more, the item is to be written again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from perdure.core.turn import (
    Begun,
    Busy,
    Conflict,
    Duplicate,
    Existing,
    Finished,
    Key,
    MailboxFull,
    NotFound,
    Send,
    SendVerdict,
    Start,
    StartVerdict,
    Taken,
    Turn,
    TurnVerdict,
)
from perdure.stores.postgres.batch import addressed
from perdure.stores.verdicts import verdict_on

Ask = Callable[..., list[tuple[Any, ...]]]
"""Executes the statement of a name with these parameters; its rows."""


def judge_turns(ask: Ask, turns: Sequence[Turn]) -> list[TurnVerdict]:
    """Why these turns were not written."""
    keys = sorted({turn.run for turn in turns})
    rows = {row[0]: row for row in ask("judge_turns", run=keys)}
    unread: dict[Key, set[str]] = {}
    for run, id in ask("judge_mail", run=keys):
        unread.setdefault(run, set()).add(id)
    return [
        # What nothing speaks against was held up by somebody's lock.
        verdict_on(turn, rows.get(turn.run), unread.get(turn.run, set())) or Busy(run=turn.run)
        for turn in turns
    ]


def judge_starts(ask: Ask, starts: Sequence[Start], now: int) -> list[StartVerdict | None]:
    """What these starts found, their own rows too; None: nothing, so that they must be written again."""
    found: dict[int, list[tuple[Any, ...]]] = {}
    for place, *row in ask(
        "judge_starts",
        now=now,
        namespace=[start.namespace for start in starts],
        id=[start.id for start in starts],
        scope=[start.idempotency_scope for start in starts],
        idempotency_key=[start.idempotency_key for start in starts],
    ):
        found.setdefault(place - 1, []).append(tuple(row))
    return [_start(start, found.get(place, ())) for place, start in enumerate(starts)]


def _start(start: Start, found: Sequence[tuple[Any, ...]]) -> StartVerdict | None:
    link = None if start.parent is None else (start.parent.run, start.parent.step)
    for key, id, _, _, seed, parent, step, at, _ in found:
        if seed == start.seed or (link is not None and link == (parent, step)):
            # As it was at the start: a starter that asks again must not get a newer holder's epoch.
            return Begun(run=key, id=id, epoch=0 if start.owner is None else 1, version=0, at=at)
    if not found:
        return None
    key, id, workflow, digest, _, _, _, _, by_key = found[0]
    if start.parent is not None or start.if_exists == "fail":
        return Taken(id=id)
    if (workflow, digest) != (start.workflow, start.digest):
        return Conflict(id=id, key=start.idempotency_key if by_key else None)
    return Existing(run=key, id=id)


def judge_sends(ask: Ask, sends: Sequence[Send], kept: Mapping[int, Key]) -> list[SendVerdict | None]:
    """Why the messages that are not among `kept` were not kept; None: they must be written again."""
    places = [place for place in range(len(sends)) if place not in kept]
    where = [addressed(sends[place]) for place in places]
    rows = {
        places[row[0] - 1]: row[1:]
        for row in ask(
            "judge_sends",
            to_run=[to[0] for to in where],
            to_parent=[to[1] for to in where],
            to_namespace=[to[2] for to in where],
            to_id=[to[3] for to in where],
            id=[sends[place].id for place in places],
        )
    }
    # One that this batch has kept was not there yet for those of the same id before it.
    written = {(run, sends[place].id): place for place, run in kept.items()}
    return [_send(sends[place], rows.get(place), place, written) for place in places]


def _send(
    send: Send, row: Sequence[Any] | None, place: int, written: Mapping[tuple[Key, str], int]
) -> SendVerdict | None:
    if row is None:
        return NotFound()
    run, status, is_there, unread = row
    if is_there:
        if send.limit is not None and written.get((run, send.id), place) > place:
            return MailboxFull(run=run, limit=send.limit)
        return Duplicate(run=run)
    if status is not None:
        return Finished(run=run, status=status)
    if send.limit is not None and unread >= send.limit:
        return MailboxFull(run=run, limit=send.limit)
    return None
