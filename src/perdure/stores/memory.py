"""The store in memory: the executable specification of `contract.py`, and `memory://`.

Everything happens under one lock, so that each call is one transaction. Plain dicts, read from top to bottom;
where this file is slower than it could be, it is so that a reader can see that it is right. A run that nobody
owns is found by looking at all of them.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from msgspec.structs import replace

from perdure.core.errors import NoTransactions, StoreError
from perdure.core.status import MOVES, Status, may_become
from perdure.core.turn import (
    Address,
    Announced,
    Announcement,
    Batch,
    Begun,
    Claim,
    Committed,
    Conflict,
    Duplicate,
    Existing,
    Fenced,
    Finished,
    Head,
    Kept,
    Key,
    Lease,
    Mail,
    MailboxFull,
    MoreMail,
    NotFound,
    ParentLink,
    Pruned,
    Query,
    Reaped,
    Retention,
    Row,
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

CLAIMABLE: Final = frozenset(status for status, after in MOVES.items() if Status.RUNNING in after)
"""What a claim may make `running`: neither an end, nor `held`, `quarantined` or `paused`."""

ALONE: Final = 2
"""With so many strikes a run is executed with nothing beside it."""

PROOF: Final = 3
"""With so many strikes a run is not executed any more."""


@dataclass
class _Run:
    """One run: its row, and what the row does not hold."""

    row: Row
    digest: str
    history: list[str] = field(default_factory=list)
    unread: dict[str, Mail] = field(default_factory=dict)
    accepted: set[str] = field(default_factory=set)  # ids of all messages it ever kept


@dataclass
class _Worker:
    """One incarnation. A dead one stays here, so that it stays dead."""

    announcement: Announcement
    until: int
    dead: bool = False


class MemoryStore:
    """Runs kept in this process, and gone with it.

    clock: microseconds since the epoch; the system's if None.
    """

    url: str = "memory://"
    durability: str = "D1"
    transactions: bool = False
    rounds: float = 0.5

    def __init__(self, *, clock: Callable[[], int] | None = None) -> None:
        self._clock = clock or (lambda: time.time_ns() // 1000)
        self._lock = threading.Condition()
        self._closed = False
        self._next_key = itertools.count(1)
        self._next_position = itertools.count(1)

        self._runs: dict[Key, _Run] = {}
        self._newest: dict[tuple[str, str], Key] = {}  # (namespace, id) -> newest generation
        self._children: defaultdict[Key, dict[str, Key]] = defaultdict(dict)  # parent -> step -> child
        self._idempotency: dict[tuple[str, str, str], tuple[Key, int | None]] = {}  # -> run, expiry
        self._workers: dict[str, _Worker] = {}
        self._served: dict[tuple[str, str, str], Announced] = {}  # (namespace, kind, name) -> as announced last

        # Live runs by owner, None for those nobody owns; all of it can be computed from the rows.
        self._owned: defaultdict[str | None, set[Key]] = defaultdict(set)

        self._news = 0  # counts what some `wait` should hear of
        self._heard: dict[str, tuple[int, int]] = {}  # incarnation -> news and time at the end of its last wait

    def now(self) -> int:
        return self._clock()

    def elsewhere(self) -> str | None:
        return None

    # --- writing ---

    def write_at_once(self, batch: Batch) -> list[Verdict]:
        return self.write(batch)

    def write(self, batch: Batch) -> list[Verdict]:
        with self._transaction():
            now = self.now()
            _refuse_unstorable(batch, self.url)
            # Mail comes last, to whoever is still live then: a run that ends in this batch gets none of it.
            letters: list[Send] = []
            starts = [self._start(start, now, letters) for start in batch.starts]
            turns = [self._turn(turn, now, letters) for turn in batch.turns]
            sends = [self._send(send, now) for send in batch.sends]
            for letter in letters:
                self._send(letter, now)
            return [*starts, *sends, *turns]

    def _start(self, start: Start, now: int, letters: list[Send]) -> StartVerdict:
        """Begin a run, unless its id or key is taken; `letters` gets what a parent must be told then."""
        by_id = self._newest_of(start.namespace, start.id)
        by_key = self._run_of_key(start, now)
        for found in (by_id, by_key):
            if found is not None and _is_own(found.row, start):
                return _begun(found.row, start)
        found = by_key or by_id
        if found is None:
            return self._begin(start, now)
        if start.parent is not None:
            if start.awaited:
                letters.append(child_refused(start))
            return Taken(id=found.row.id)
        if start.if_exists == "fail":
            return Taken(id=found.row.id)
        if (found.row.workflow, found.digest) != (start.workflow, start.digest):
            return Conflict(id=found.row.id, key=start.idempotency_key if by_key else None)
        return Existing(run=found.row.key, id=found.row.id)

    def _run_of_key(self, start: Start, now: int) -> _Run | None:
        if start.idempotency_key is None:
            return None
        key = (start.namespace, start.idempotency_scope, start.idempotency_key)
        run, until = self._idempotency.get(key, (None, None))
        return None if run is None or (until is not None and until <= now) else self._runs[run]

    def _begin(self, start: Start, now: int) -> Begun:
        key = next(self._next_key)
        # A starter that is dead by now does not own what it started, or nobody would ever hand it back.
        owner = start.owner if start.owner is not None and self._lives(start.owner) else None
        later = owner is None and start.start_at is not None and start.start_at > now
        status = Status.RUNNING if owner is not None else Status.SCHEDULED if later else Status.READY
        parent = start.parent
        events = [start.event] if start.event else []
        row = Row(
            key=key,
            namespace=start.namespace,
            id=start.id,
            generation=1,
            kind=start.kind,
            workflow=start.workflow,
            queue=start.queue,
            priority=start.priority,
            status=status.value,
            owner=owner,
            epoch=1 if start.owner is not None else 0,
            version=0,
            turn="",
            created_at=now,
            started_at=now if owner is not None else None,
            ended_at=None,
            wake_at=start.start_at if later else None,
            deadline_at=start.deadline_at,
            attempt=1,
            strikes=0,
            waits="",
            parent=parent.run if parent is not None else None,
            parent_id=self._runs[parent.run].row.id if parent is not None and parent.run in self._runs else None,
            parent_step=parent.step if parent is not None else None,
            parent_close=start.parent_close,
            seed=start.seed,
            input=start.input,
            result=None,
            error=None,
            history_events=len(events),
            history_bytes=_size(events),
            language=start.language,
            dialect=start.dialect,
            policy=start.policy,
            tags=start.tags,
        )
        self._runs[key] = run = _Run(row=row, digest=start.digest, history=events)
        self._newest[start.namespace, start.id] = key
        if parent is not None:
            self._children[parent.run][parent.step] = key
        if start.idempotency_key is not None:
            place = (start.namespace, start.idempotency_scope, start.idempotency_key)
            self._idempotency[place] = (key, start.idempotency_until)
        self._put(run, row)
        return _begun(row, start)

    def _turn(self, turn: Turn, now: int, letters: list[Send]) -> TurnVerdict:
        """Apply one turn, or nothing of it; `letters` gets the messages it sends."""
        run = self._runs.get(turn.run)
        if run is None:
            return Fenced(run=turn.run)
        row = run.row
        if (row.turn, row.version) == (turn.id, turn.version + 1):
            return Committed(run=row.key)  # asked again: written the first time
        if not self._fence_holds(turn, row):
            return Fenced(run=row.key)
        if reason := _refusal(turn, row):
            return Unstorable(run=row.key, reason=reason)
        if turn.closing and not turn.forced and not run.unread.keys() <= set(turn.consumed):
            return MoreMail(run=row.key)

        run.history.extend(turn.events)
        for message in turn.consumed:
            run.unread.pop(message, None)
        ends = Status(turn.status).ended
        without_code = turn.owner is None
        self._put(
            run,
            replace(
                row,
                turn=turn.id,
                version=row.version + 1,
                epoch=row.epoch + 1 if without_code else row.epoch,
                owner=None if ends or turn.release or without_code else row.owner,
                status=Status(turn.status).value,
                ended_at=now if ends else None,
                wake_at=None if ends else turn.wake_at,
                waits="" if ends else turn.waits,
                strikes=(0 if turn.progress else row.strikes) + (1 if turn.strike else 0),
                attempt=row.attempt if turn.attempt is None else turn.attempt,
                result=turn.result,
                error=turn.error,
                history_events=row.history_events + len(turn.events),
                history_bytes=row.history_bytes + _size(turn.events),
            ),
        )
        for start in turn.starts:
            self._start(start, now, letters)
        letters.extend(turn.sends)
        return Committed(run=row.key)

    def _fence_holds(self, turn: Turn, row: Row) -> bool:
        return (
            row.ended_at is None
            and (turn.epoch, turn.version, turn.last) == (row.epoch, row.version, row.turn)
            and (turn.owner is None or (turn.owner == row.owner and self._lives(turn.owner)))
        )

    def _send(self, send: Send, now: int) -> SendVerdict:
        run = self._target(send.to)
        if run is None:
            return NotFound()
        key = run.row.key
        # Looked at first: a retry that comes after the end is told that the message had arrived.
        if send.id in run.accepted:
            return Duplicate(run=key)
        if run.row.ended_at is not None:
            return Finished(run=key, status=run.row.status)
        if send.limit is not None and len(run.unread) >= send.limit:
            return MailboxFull(run=key, limit=send.limit)
        position = next(self._next_position)
        run.accepted.add(send.id)
        run.unread[send.id] = Mail(
            run=key, position=position, id=send.id, kind=send.kind, name=send.name, data=send.data, at=now
        )
        self._tell()
        return Kept(run=key)

    def _target(self, to: Key | Address | ParentLink) -> _Run | None:
        if isinstance(to, Address):
            return self._newest_of(to.namespace, to.id)
        if isinstance(to, ParentLink):
            child = self._children[to.run].get(to.step) if to.run in self._children else None
            return None if child is None else self._runs[child]
        return self._runs.get(to)

    def _newest_of(self, namespace: str, id: str) -> _Run | None:
        key = self._newest.get((namespace, id))
        return None if key is None else self._runs[key]

    def transaction(self, turn: Turn) -> TurnVerdict:
        raise NoTransactions.of("A transaction step", store=self.url)

    def write_on(self, connection: Any, batch: Batch) -> list[Verdict]:
        raise NoTransactions.of("options(connection=…)", store=self.url)

    def prune(self, retention: Retention) -> Pruned:
        with self._transaction():
            if retention.limit <= 0:
                return Pruned(after=retention.after)
            wanted = [
                key
                for key in sorted(self._runs)
                if key > retention.after and self._may_go(self._runs[key].row, retention)
            ]
            if not retention.dry_run:
                for key in wanted[: retention.limit]:
                    self._remove(key)
            gone = wanted[: retention.limit]
            return Pruned(runs=len(gone), after=gone[-1] if len(wanted) > len(gone) else None)

    def _may_go(self, row: Row, retention: Retention) -> bool:
        if row.namespace != retention.namespace or row.ended_at is None or row.ended_at >= retention.ended_before:
            return False
        if retention.workflow not in (None, row.workflow):
            return False
        if retention.statuses and row.status not in retention.statuses:
            return False
        parent = self._runs.get(row.parent) if row.parent is not None else None
        if parent is not None and parent.row.ended_at is None and row.parent_close == "cancel":
            return False
        return all(self._runs[child].row.ended_at is not None for child in self._children.get(row.key, {}).values())

    def _remove(self, key: Key) -> None:
        row = self._runs.pop(key).row
        if self._newest.get((row.namespace, row.id)) == key:
            del self._newest[row.namespace, row.id]
        self._idempotency = {place: kept for place, kept in self._idempotency.items() if kept[0] != key}
        for child in self._children.pop(key, {}).values():
            # It keeps its link, which no run answers any more.
            self._runs[child].row = replace(self._runs[child].row, parent_id=None)
        if row.parent is not None and row.parent_step is not None and row.parent in self._children:
            siblings = self._children[row.parent]
            if siblings.get(row.parent_step) == key:
                del siblings[row.parent_step]

    def claim(self, claim: Claim) -> list[Head]:
        with self._transaction():
            if not self._lives(claim.incarnation):
                return []
            now = self.now()
            offered = [run for run in self._unowned() if _serves(claim, run.row) and _is_claimable(run, now)]
            offered.sort(key=lambda run: (-run.row.priority, run.row.key))
            if claim.only_suspects:
                offered = [run for run in offered if run.row.strikes == ALONE][:1]
            elif not claim.alone or not offered or offered[0].row.strikes < ALONE:
                offered = [run for run in offered if run.row.strikes < ALONE]
            else:
                offered = offered[:1]
            heads: list[Head] = []
            room = claim.max_bytes
            for run in offered[: claim.limit]:
                mail = tuple(run.unread.values())
                room -= run.row.history_bytes + _size(message.data for message in mail)
                if room < 0 and heads:
                    break
                row = run.row
                row = replace(
                    row,
                    owner=claim.incarnation,
                    epoch=row.epoch + 1,
                    status=Status.RUNNING.value,
                    started_at=now if row.started_at is None else row.started_at,
                )
                self._put(run, row)
                heads.append(Head(row=row, mail=mail))
            return heads

    def announce(self, announcement: Announcement) -> Lease:
        with self._transaction():
            now = self.now()
            known = self._workers.get(announcement.incarnation)
            if known is not None and known.dead:
                raise StoreError(
                    f"Incarnation {announcement.incarnation} has been reaped or retired, and such a one is dead for "
                    "ever. Take a new incarnation.",
                    store=self.url,
                )
            self._workers[announcement.incarnation] = _Worker(announcement, until=now + announcement.ttl)
            for served in announcement.serves:
                self._served[announcement.namespace, served.kind, served.name] = served
            workflows = {served.name for served in announcement.serves if served.kind == "workflow"}
            for run in self._unowned():
                row = run.row
                if (
                    row.status == Status.BLOCKED
                    and row.namespace == announcement.namespace
                    and row.workflow in workflows
                    and (row.wake_at is None or row.wake_at > now)
                ):
                    self._put(run, replace(row, wake_at=now))
            return Lease(now=now, until=now + announcement.ttl)

    def heartbeat(self, incarnation: str) -> Lease | None:
        with self._transaction():
            if not self._lives(incarnation):
                return None
            now = self.now()
            worker = self._workers[incarnation]
            worker.until = now + worker.announcement.ttl
            return Lease(now=now, until=worker.until)

    def reap(self, *, limit: int = 1000) -> Reaped:
        with self._transaction():
            now = self.now()
            expired = [worker for worker in self._workers.values() if not worker.dead and worker.until < now]
            for worker in expired:
                worker.dead = True
            # Also what an earlier reap, with its limit, left with its dead owner.
            orphans = sorted(
                key
                for owner, keys in self._owned.items()
                if owner is not None and not self._lives(owner)
                for key in keys
            )[:limit]
            for key in orphans:
                run = self._runs[key]
                row = replace(run.row, owner=None, epoch=run.row.epoch + 1)
                if row.status == Status.RUNNING:
                    row = replace(row, status=Status.READY.value, strikes=row.strikes + 1)
                self._put(run, row)
            return Reaped(workers=len(expired), runs=len(orphans))

    def retire(self, incarnation: str) -> int:
        with self._transaction():
            worker = self._workers.get(incarnation)
            if worker is None or worker.dead:
                return 0
            worker.dead = True
            keys = sorted(self._owned[incarnation])
            for key in keys:
                run = self._runs[key]
                row = replace(run.row, owner=None)
                if row.status == Status.RUNNING:
                    row = replace(row, status=Status.READY.value)
                self._put(run, row)
            return len(keys)

    # --- reading ---

    def history(self, run: Key, after: int = 0) -> list[str]:
        with self._transaction():
            return self._runs[run].history[after:] if run in self._runs else []

    def histories(self, runs: Sequence[Key]) -> dict[Key, list[str]]:
        return {run: self.history(run) for run in runs}

    def mail(self, incarnation: str) -> list[Mail]:
        with self._transaction():
            owned = sorted(self._owned.get(incarnation, ()))
            return [message for key in owned for message in self._runs[key].unread.values()]

    def mail_is_likely(self, incarnation: str) -> bool:
        return True

    def mailbox(self, run: Key) -> list[Mail]:
        with self._transaction():
            return list(self._runs[run].unread.values()) if run in self._runs else []

    def owned(self, incarnation: str) -> list[Key]:
        with self._transaction():
            return sorted(self._owned.get(incarnation, ()))

    def run(self, namespace: str, id: str) -> Row | None:
        with self._transaction():
            found = self._newest_of(namespace, id)
            return None if found is None else found.row

    def rows(self, keys: Sequence[Key]) -> list[Row]:
        with self._transaction():
            return [self._runs[key].row for key in keys if key in self._runs]

    def ended(self, keys: Sequence[Key]) -> list[Key]:
        return [row.key for row in self.rows(keys) if row.ended_at is not None or row.status == Status.QUARANTINED]

    def counts(self, namespace: str, *, workflow: str | None = None, queue: str | None = None) -> Mapping[str, int]:
        with self._transaction():
            return Counter(
                run.row.status
                for run in self._runs.values()
                if run.row.namespace == namespace
                and workflow in (None, run.row.workflow)
                and queue in (None, run.row.queue)
            )

    def children(self, run: Key) -> list[Row]:
        with self._transaction():
            rows = [self._runs[key].row for key in sorted(self._children.get(run, {}).values())]
            return [row for row in rows if row.ended_at is None]

    def suspects(self, claim: Claim) -> bool:
        with self._transaction():
            now = self.now()
            waiting = (run for run in self._unowned() if _serves(claim, run.row) and _is_claimable(run, now))
            return any(run.row.strikes == ALONE for run in waiting)

    def overdue(self, *, limit: int = 100) -> list[Row]:
        with self._transaction():
            now = self.now()
            live = sorted(key for keys in self._owned.values() for key in keys)
            return [row for key in live if _is_overdue(row := self._runs[key].row, now)][:limit]

    def announced(self, namespace: str) -> list[Announced]:
        with self._transaction():
            now = self.now()
            live: dict[tuple[str, str], set[str]] = {}
            for worker in self._workers.values():
                if worker.announcement.namespace == namespace and _beats(worker, now):
                    for served in worker.announcement.serves:
                        live.setdefault((served.kind, served.name), set()).update(worker.announcement.queues)
            return [
                replace(served, live=(kind, name) in live, queues=tuple(sorted(live.get((kind, name), ()))))
                for (where, kind, name), served in sorted(self._served.items())
                if where == namespace
            ]

    def worker(self, incarnation: str) -> str | None:
        with self._transaction():
            worker = self._workers.get(incarnation)
            return worker.announcement.name if worker is not None and _beats(worker, self.now()) else None

    def held_open(self, run: Key) -> bool:
        return False  # A transaction that has written anything holds the whole store.

    # --- waiting ---

    def wait(self, incarnation: str, queues: Sequence[str], timeout: float) -> bool:
        until = time.monotonic() + timeout
        with self._transaction():
            news, at = self._heard.get(incarnation, (0, 0))
            while True:
                now = self.now()
                wakes = [
                    run.row.wake_at
                    for run in self._unowned()
                    if run.row.wake_at is not None and run.row.queue in queues and run.row.status in CLAIMABLE
                ]
                heard = self._news > news or any(at < wake <= now for wake in wakes)
                left = until - time.monotonic()
                if heard or left <= 0 or self._closed:
                    self._heard[incarnation] = (self._news, now)
                    return heard
                # The next timer by our clock, which may be a test's and stand still: a bound, not a promise.
                timer = min((wake - now for wake in wakes if wake > now), default=None)
                self._lock.wait(left if timer is None else min(left, timer / 1_000_000))

    def wake(self) -> None:
        with self._lock:
            self._tell()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._tell()

    # --- what all of it needs ---

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise StoreError("The store memory:// is closed. Nothing was written. Open a new one.", store=self.url)
            yield

    def _put(self, run: _Run, row: Row) -> None:
        """Keep a run's new row, and tell whoever may want to claim it now or later."""
        self._owned[run.row.owner].discard(row.key)
        run.row = row
        if row.ended_at is None:
            self._owned[row.owner].add(row.key)
            if row.owner is None and _is_claimable(run, self.now()):
                self._tell()
            elif row.owner is None and row.wake_at is not None:
                self._lock.notify_all()  # somebody's next timer

    def _tell(self) -> None:
        self._news += 1
        self._lock.notify_all()

    def _unowned(self) -> list[_Run]:
        return [self._runs[key] for key in self._owned[None]]

    def _lives(self, incarnation: str) -> bool:
        """Whether it was announced and neither reaped nor retired: what fences ask. No clock decides here."""
        return incarnation in self._workers and not self._workers[incarnation].dead

    # The last one: from here on `list` in an annotation of this class would mean this method.
    def list(self, query: Query) -> list[Row]:
        with self._transaction():
            keys = sorted(self._runs, reverse=True)
            return [row for key in keys if _is_asked_for(row := self._runs[key].row, query)][: query.limit]


def _is_own(row: Row, start: Start) -> bool:
    """Whether this start wrote this row, in a call whose answer was lost, or in an earlier life of its parent."""
    return row.seed == start.seed or (start.parent is not None and _link(row) == start.parent)


def _link(row: Row) -> ParentLink | None:
    return None if row.parent is None or row.parent_step is None else ParentLink(run=row.parent, step=row.parent_step)


def _begun(row: Row, start: Start) -> Begun:
    # As it was at the start: a starter that asks again must not get a newer holder's epoch.
    return Begun(run=row.key, id=row.id, epoch=1 if start.owner is not None else 0, version=0, at=row.created_at)


def _refusal(turn: Turn, row: Row) -> str:
    """Why this turn cannot be written although its fence holds, or nothing. It is our bug, never the user's."""
    try:
        before, after = Status(row.status), Status(turn.status)
        if not may_become(before, after):
            return f"a run that is {before} may not become {after}"
        if turn.events and turn.first_seq != row.history_events + 1:
            return f"events from {turn.first_seq} on do not follow a history of {row.history_events}"
        _size([*turn.events, turn.waits, turn.result or "", turn.error or ""])
        _size([*(start.input for start in turn.starts), *(send.data for send in turn.sends)])
    except ValueError as error:  # a status nobody knows, or a text that has no UTF-8 form
        return str(error)
    return ""


def _refuse_unstorable(batch: Batch, url: str) -> None:
    """Starts and sends have no verdict for what has no UTF-8 form: raise before anything is written."""
    try:
        _size([text for start in batch.starts for text in (start.event, start.input)])
        _size([send.data for send in batch.sends])
    except ValueError as error:
        raise StoreError(f"A start or message cannot be stored. {error}. Nothing was written.", store=url) from error


def _serves(claim: Claim, row: Row) -> bool:
    names = claim.activities if row.kind == "activity" else claim.workflows
    return row.namespace == claim.namespace and row.queue in claim.queues and row.workflow in names


def _is_claimable(run: _Run, now: int) -> bool:
    """Whether there is something to do for a run that nobody owns.

    Mail wakes a run that waits. It does not start one before its time, unless it asks it to end, and it does not
    help one that is blocked: that one would be tried again and again without any back-off.
    """
    row = run.row
    if row.status not in CLAIMABLE or row.strikes >= PROOF:
        return False
    if row.status == Status.READY or (row.wake_at is not None and row.wake_at <= now):
        return True
    if row.status == Status.SCHEDULED:
        return any(message.kind == "cancel" for message in run.unread.values())
    return row.status != Status.BLOCKED and bool(run.unread)


def _is_overdue(row: Row, now: int) -> bool:
    late = row.deadline_at is not None and row.deadline_at <= now
    return late or (row.owner is None and row.strikes >= PROOF and row.status != Status.QUARANTINED)


def _is_asked_for(row: Row, query: Query) -> bool:
    return (
        row.namespace == query.namespace
        and query.workflow in (None, row.workflow)
        and query.status in (None, row.status)
        and query.parent in (None, row.parent)
        and (query.created_after is None or row.created_at > query.created_after)
        and (query.created_before is None or row.created_at < query.created_before)
        and (query.cursor is None or row.key < query.cursor)
    )


def _beats(worker: _Worker, now: int) -> bool:
    """Whether a reader may call it living: also one that nobody has reaped is dead once its lease ran out."""
    return not worker.dead and now <= worker.until


def _size(texts: Iterator[str] | Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)
