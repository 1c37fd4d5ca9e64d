"""One batch, inside one transaction: starts, turns, then mail, a fixed list of statements over many rows each.

First it is taken for granted that every start is new and every fence holds, and the statements that write say
whether that was so: they count. If they count short, `Short` is raised, the transaction rolled back, and the batch
written again with `judged=True`: now it looks first, with the same statements behind it. Where the data itself
cannot be stored, `singly=True` takes turns one by one. So a usual batch asks nothing, an unusual one costs twice, and
no answer depends on which way it went.

Mail comes last, to whoever is still live then: a run that ends in this batch gets none of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from perdure.core.turn import (
    Address,
    Batch,
    Begun,
    Committed,
    Conflict,
    Duplicate,
    Existing,
    Finished,
    Kept,
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
    Unstorable,
    Verdict,
)
from perdure.stores.refused import child_refused
from perdure.stores.sqlite.errors import DATA_ERRORS
from perdure.stores.sqlite.queries import SQL, Database, Rows
from perdure.stores.verdicts import AT_WAKE, BEFORE, ENDS, verdict_on

INLINE: Final = 1_000
"""Characters of an input that are kept in the run's own row, which every turn writes anew."""

NOW: Final = frozenset({"ready"})

insert_runs: Final = Rows("insert_runs")
insert_inputs: Final = Rows("insert_inputs")
insert_keys: Final = Rows("insert_keys")
insert_events: Final = Rows("insert_events")
commit_turns: Final = Rows("commit_turns")
consume_mail: Final = Rows("consume_mail")
insert_mail: Final = Rows("insert_mail")


class Short(Exception):
    """Fewer rows were written than taken for granted: look first."""


class Unfit(Exception):
    """Something in the batch cannot be stored at all; the driver's error is the cause."""


class Writing:
    """A batch on its way into the database. The caller has begun the transaction and ends it."""

    def __init__(self, db: Database, now: int, *, judged: bool = False, singly: bool = False) -> None:
        self.db = db
        self.now = now
        self.judged = judged
        self.singly = singly
        self.news = False
        """Whether somebody may wait for what was written."""
        self._by: str | None = None
        self._events: list[Any] = []
        self._letters: list[Send] = []

    def write(self, batch: Batch) -> list[Verdict]:
        """The verdicts; `Short` or `Unfit` if it must be written in another way."""
        try:
            return self._write(batch)
        except DATA_ERRORS as error:
            raise Unfit(str(error)) from error

    def verdict(self, turn: Turn) -> TurnVerdict | None:
        """Why this turn is not to be written; None if it is."""
        [verdict], good = self._judge((turn,))
        return None if good else verdict

    def _write(self, batch: Batch) -> list[Verdict]:
        self._by = batch.by
        starts = self._start_all(batch.starts) if batch.starts else ()
        turns: Sequence[TurnVerdict] = ()
        if batch.turns:
            turns = self._take_singly(batch.turns) if self.singly else self._take(batch.turns)
        if self._events:
            insert_events.run(self.db, self._events)
        sends = self._send(batch.sends) if batch.sends else ()
        if self._letters:
            self._send(self._letters)
        return [*starts, *sends, *turns]

    # --- starts ---

    def _start_all(self, starts: Sequence[Start]) -> Sequence[StartVerdict]:
        if self.judged:
            return [self._start_judged(start) for start in starts]
        keys = self._insert(starts)
        now = self.now
        return [
            Begun(run=key, id=start.id, epoch=0 if start.owner is None else 1, version=0, at=now)
            for key, start in zip(keys, starts, strict=True)
        ]

    def _insert(self, starts: Sequence[Start]) -> Sequence[Key]:
        """Write new runs; `Short` if one of them is not new."""
        now = self.now
        values: list[Any] = []
        append = values.extend
        keyed = large = False
        for start in starts:
            event = start.event
            later = start.start_at
            if later is not None and later <= now:
                later = None
            if later is not None or start.owner is None:
                self.news = True
            if start.idempotency_key is not None:
                keyed = True
            input: str | None = start.input
            if len(start.input) > INLINE:
                input = None
                large = True
            parent = start.parent
            append(
                (
                    start.namespace,
                    start.id,
                    start.kind,
                    start.workflow,
                    start.queue,
                    start.priority,
                    start.owner,
                    later,
                    now,
                    start.deadline_at,
                    None if parent is None else parent.run,
                    None if parent is None else parent.step,
                    start.parent_close,
                    1 if event else 0,
                    _size(event),
                    start.seed,
                    start.digest,
                    start.language,
                    start.dialect,
                    start.policy,
                    start.tags,
                    input,
                )
            )
        count = len(starts)
        if insert_runs.run(self.db, values) != count:
            raise Short
        # One writer at a time and no row left out: the keys of this transaction follow each other.
        last = self.db.execute("SELECT last_insert_rowid()").fetchone()[0]
        keys = range(last - count + 1, last + 1)
        events = self._events
        for key, start in zip(keys, starts, strict=True):
            if start.event:
                events += (key, 1, start.event)
        if large:
            pairs: list[Any] = []
            for key, start in zip(keys, starts, strict=True):
                if len(start.input) > INLINE:
                    pairs += (key, start.input)
            insert_inputs.run(self.db, pairs)
        if keyed:
            self._insert_keys(keys, starts)
        return keys

    def _insert_keys(self, keys: Sequence[Key], starts: Sequence[Start]) -> None:
        values: list[Any] = []
        for key, start in zip(keys, starts, strict=True):
            if start.idempotency_key is not None:
                values += (
                    start.namespace,
                    start.idempotency_scope,
                    start.idempotency_key,
                    key,
                    start.idempotency_until,
                )
        if insert_keys.run(self.db, values, last=(self.now,)) != len(values) // insert_keys.width:
            raise Short

    def _start_judged(self, start: Start) -> StartVerdict:
        """Begin a run unless its id or key is taken: its own earlier row, the key's run, or the id's."""
        found = self.db.execute(
            SQL["judge_start"],
            (start.namespace, start.idempotency_scope, start.idempotency_key, self.now, start.namespace, start.id),
        ).fetchall()
        epoch = 0 if start.owner is None else 1
        link = None if start.parent is None else (start.parent.run, start.parent.step)
        for key, _, _, _, seed, parent, step, at, _ in found:
            if seed == start.seed or (link is not None and link == (parent, step)):
                # As it was at the start: a starter that asks again must not get a newer holder's epoch.
                return Begun(run=key, id=start.id, epoch=epoch, version=0, at=at)
        if not found:
            return Begun(run=self._insert((start,))[0], id=start.id, epoch=epoch, version=0, at=self.now)
        key, id, workflow, digest, _, _, _, _, by_key = found[0]
        if start.parent is not None:
            if start.awaited:
                self._letters.append(child_refused(start))
            return Taken(id=id)
        if start.if_exists == "fail":
            return Taken(id=id)
        if (workflow, digest) != (start.workflow, start.digest):
            return Conflict(id=id, key=start.idempotency_key if by_key else None)
        return Existing(run=key, id=id)

    # --- turns ---

    def _take(self, turns: Sequence[Turn]) -> list[TurnVerdict]:
        if not self.judged:
            self._commit(turns)
            return [Committed(run=turn.run) for turn in turns]
        verdicts, good = self._judge(turns)
        if good:
            self._commit(good)
        return verdicts

    def _take_singly(self, turns: Sequence[Turn]) -> list[TurnVerdict]:
        verdicts: list[TurnVerdict] = []
        for turn in turns:
            self.db.execute("SAVEPOINT perdure_turn")
            events, letters = len(self._events), len(self._letters)
            try:
                verdict = self._take((turn,))[0]
                insert_events.run(self.db, self._events[events:]) if len(self._events) > events else None
                del self._events[events:]
                for send in turn.sends:
                    _check_text(send)
            except DATA_ERRORS as error:
                self.db.execute("ROLLBACK TO perdure_turn")
                del self._events[events:], self._letters[letters:]
                verdict = Unstorable(run=turn.run, reason=str(error))
            self.db.execute("RELEASE perdure_turn")
            verdicts.append(verdict)
        return verdicts

    def _commit(self, turns: Sequence[Turn]) -> None:
        """Write turns whose fences hold; `Short` if one does not."""
        now = self.now
        values: list[Any] = []
        append = values.extend
        events = self._events
        consumed: list[Any] = []
        released: list[Key] = []
        starts: list[Start] = []
        for turn in turns:
            run = turn.run
            status = turn.status
            owner = turn.owner
            ends = status in ENDS
            before = BEFORE.get(status)
            if before is None:
                raise Short  # a status that nobody knows: the judge says so
            next_owner = due_at = wake_at = None
            if not ends:
                wake_at = turn.wake_at
                if owner is None or turn.release:
                    released.append(run)
                    due_at = _due(status, wake_at)
                else:
                    next_owner = owner
            elif owner is None or turn.forced:
                released.append(run)
            new = turn.events
            size = 0
            seq = turn.first_seq
            for event in new:
                events += (run, seq, event)
                seq += 1
                size += len(event) if event.isascii() else len(event.encode())
            taken = turn.consumed
            if taken:
                for id in taken:
                    consumed += (run, id)
            heeds = turn.closing and not turn.forced
            append(
                (
                    run,
                    owner,
                    turn.epoch,
                    turn.version,
                    turn.last,
                    turn.id,
                    str.__str__(status),
                    before,
                    next_owner,
                    due_at,
                    wake_at,
                    now if ends else None,
                    "" if ends else turn.waits,
                    0 if turn.progress else 1,
                    1 if turn.strike else 0,
                    turn.attempt,
                    turn.first_seq - 1 if new else None,
                    len(new),
                    size,
                    turn.result,
                    turn.error,
                    1 if heeds else 0,
                    json.dumps(list(taken)) if heeds and taken else "[]",
                )
            )
            if turn.starts:
                starts += turn.starts
        if commit_turns.run(self.db, values) != len(turns):
            raise Short
        if consumed:
            consume_mail.run(self.db, consumed)
        if released:
            self._hand_over(released)
            self.news = True
        if starts and not self.judged:
            self._start_all(starts)
        for turn in turns:
            if self.judged and turn.starts:
                self._start_all(turn.starts)  # may add to the letters, which come in this order
            if turn.sends:
                self._letters += turn.sends

    def _hand_over(self, runs: Sequence[Key]) -> None:
        """After runs changed their owner: their mail follows, and calls for one where nobody is."""
        keys = json.dumps(list(runs))
        self.db.execute(SQL["readdress_mail"], (keys,))
        self.db.execute(SQL["offer_mailed"], (keys,))

    def _judge(self, turns: Sequence[Turn]) -> tuple[list[TurnVerdict], list[Turn]]:
        """The verdict on each turn, and the turns that are to be written."""
        keys = json.dumps([turn.run for turn in turns])
        rows = {row[0]: row for row in json.loads(self.db.execute(SQL["judge_turns"], (keys,)).fetchone()[0])}
        unread: dict[Key, set[str]] = {}
        for run, id in json.loads(self.db.execute(SQL["judge_mail"], (keys,)).fetchone()[0]):
            unread.setdefault(run, set()).add(id)
        verdicts: list[TurnVerdict] = []
        good: list[Turn] = []
        for turn in turns:
            verdict = verdict_on(turn, rows.get(turn.run), unread.get(turn.run, set()))
            if verdict is None:
                good.append(turn)
                del rows[turn.run]  # a second turn of this run in the batch comes too late
                verdict = Committed(run=turn.run)
            verdicts.append(verdict)
        return verdicts, good

    # --- mail ---

    def _send(self, sends: Sequence[Send]) -> list[SendVerdict]:
        targets = self._targets(sends)
        values: list[Any] = []
        limited = any(send.limit is not None for send in sends)
        room: dict[Key, int] = {}
        for send, run in zip(sends, targets, strict=True):
            if run is None:
                continue
            limit = send.limit
            if limited:
                # Those before it in this batch take room too.
                before = room.get(run, 0)
                room[run] = before + 1
                limit = None if limit is None else limit - before
            values += (run, send.id, send.kind, send.name, send.data, self.now, limit)
        if not values:
            return [NotFound() for _ in sends]
        count = insert_mail.run(self.db, values)
        if count:
            keys = json.dumps([run for run in targets if run is not None])
            by = self._by
            if by is None or self.db.execute(SQL["others_own"], (keys, by)).fetchone() is not None:
                self.news = True
            self.db.execute(SQL["offer_mailed"], (keys,))
        if count == len(sends):
            return [Kept(run=run) for run in targets if run is not None]
        return self._judge_sends(sends, targets, count)

    def _targets(self, sends: Sequence[Send]) -> list[Key | None]:
        targets: list[Key | None] = []
        addresses: list[tuple[int, str, str]] = []
        links: list[tuple[int, Key, str]] = []
        for place, send in enumerate(sends):
            to = send.to
            if isinstance(to, int):
                targets.append(to)
                continue
            targets.append(None)
            if isinstance(to, Address):
                addresses.append((place, to.namespace, to.id))
            else:
                links.append((place, to.run, to.step))
        for query, wanted in (("find_addresses", addresses), ("find_children", links)):
            if wanted:
                answer = self.db.execute(SQL[query], (json.dumps(wanted),)).fetchone()[0]
                for place, key in json.loads(answer):
                    targets[place] = key
        return targets

    def _judge_sends(self, sends: Sequence[Send], targets: Sequence[Key | None], count: int) -> list[SendVerdict]:
        """What became of each message, after `count` of them were kept."""
        pairs = json.dumps([(run, send.id) for run, send in zip(targets, sends, strict=True)])
        last = self.db.execute("SELECT last_insert_rowid()").fetchone()[0] if count else 0
        kept: set[int] = set(range(last - count + 1, last + 1))
        verdicts: list[SendVerdict] = []
        answers = json.loads(self.db.execute(SQL["judge_sends"], (pairs,)).fetchone()[0])
        for send, (run, status, position, unread) in zip(sends, answers, strict=True):
            if run is None:
                verdicts.append(NotFound())
            elif position is not None and position in kept:
                kept.discard(position)
                verdicts.append(Kept(run=run))
            elif position is not None:
                verdicts.append(Duplicate(run=run))
            elif status is not None:
                verdicts.append(Finished(run=run, status=status))
            elif send.limit is not None and unread >= send.limit:
                verdicts.append(MailboxFull(run=run, limit=send.limit))
            else:
                # A duplicate before it in this batch was counted against the limit: there is room after all.
                verdicts += self._send((_to(send, run),))
        return verdicts


def _due(status: str, wake_at: int | None) -> int | None:
    """When an unowned run may be claimed, its mail aside."""
    if status in NOW:
        return 0
    if status in AT_WAKE and wake_at is not None:
        return max(wake_at, 0)
    return None


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _to(send: Send, run: Key) -> Send:
    return Send(to=run, id=send.id, kind=send.kind, name=send.name, data=send.data, limit=send.limit)


def _check_text(send: Send) -> None:
    for text in (send.id, send.name, send.data):
        text.encode()
