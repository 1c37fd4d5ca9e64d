"""Runs kept in one SQLite file, for one process or several on one machine: `sqlite:///path`.

One connection writes, in transactions that pass the gate; reads have connections of their own, so nobody waits for
them or because of them. How a batch is written: `writing.py`; the statements: `*.sql`.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import timedelta
from sqlite3 import Connection
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import quote, urlencode

import msgspec

from perdure.core.errors import NotAStore, StoreError, StoreFull, StoreLocked, StoreUnavailable
from perdure.core.retry import duration
from perdure.core.status import Status
from perdure.core.turn import (
    Announced,
    Announcement,
    Batch,
    Claim,
    Head,
    Key,
    Lease,
    Mail,
    Pruned,
    Query,
    Reaped,
    Retention,
    Row,
    Turn,
    TurnVerdict,
    Verdict,
)
from perdure.stores import choosing
from perdure.stores.refused import item_refused
from perdure.stores.settings import of_type
from perdure.stores.sqlite import analysed, connections, migrations, place, pruning
from perdure.stores.sqlite.borrowed import borrowed
from perdure.stores.sqlite.errors import locked, ours
from perdure.stores.sqlite.queries import SINGLY, SQL, Rows
from perdure.stores.sqlite.transaction import StepConnection, Steps, StepTransaction
from perdure.stores.sqlite.writing import Short, Unfit, Writing

CHUNK: Final = 256  # events of a history that are read in one piece
WINDOW: Final = 1_000  # claimable runs of one queue and name among which the most urgent are looked for
READERS: Final = 8  # idle connections kept
QUICK: Final = 0.002  # seconds between looks at what other processes wrote, while the last second saw work
SLOW: Final = 0.05
IDLE: Final = 1.0  # seconds without a write after which the write-ahead log is emptied
FOREVER: Final = 2**63 - 1

STATUSES: Final = json.dumps([status.value for status in Status])

T = TypeVar("T")
log = logging.getLogger(__name__)

_rows = msgspec.json.Decoder(list[Row]).decode
_row = msgspec.json.Decoder(Row).decode
_mail = msgspec.json.Decoder(list[Mail]).decode
_keys = msgspec.json.Decoder(list[int]).decode
_serve = Rows("serve")


class SQLiteStore:
    """A store in the SQLite file `path`, created if it is missing unless `create` is False.

    clock: microseconds since the epoch; the system's if None.
    busy_timeout: seconds to wait for somebody else's write lock, then `StoreLocked`.
    durability: "full" survives power loss; "normal" a crash of the process, and syncs the disk less.
    hints: whether the kernel's locks tell who has died; without them only the time of the last heartbeat does.

    All methods may be called from any thread. After a fork, parent and child both go on with the same object; an
    incarnation stays the parent's.
    """

    url: str
    durability: str
    now: Callable[[], int]  # itself the clock: it is asked at every input
    transactions: bool = True
    rounds: float = 0.5

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        clock: Callable[[], int] | None = None,
        busy_timeout: timedelta | float = 5.0,
        durability: str = "full",
        create: bool = True,
        hints: bool = True,
    ) -> None:
        of_type(path, (str, os.PathLike), "The path of a SQLite store")
        of_type(create, bool, "create=")
        of_type(hints, bool, "hints=")
        given = os.fspath(path)
        of_type(given, str, "The path of a SQLite store")
        patience = duration(busy_timeout, "busy_timeout=").total_seconds()
        if any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in given):
            raise NotAStore(f"{given!r} is no file: its name has NUL or a lone surrogate in it. Mend the path.")
        if not given or given == ":memory:":
            raise NotAStore(f"{given!r} is no file. A SQLite store is a file; write memory:// for one that is none.")
        if durability not in connections.SYNCHRONOUS:
            raise ValueError(f'durability={durability!r} is neither "full" nor "normal"')
        connections.check_machine()
        connections.note_version()
        self.url = f"sqlite:///{quote(given)}"
        self.durability = connections.CLASSES[durability]
        self._path: Final = os.path.realpath(given)
        self._clock: Final = clock or _system_clock
        self.now = self._clock
        self._busy_timeout: Final = patience
        self._synchronous: Final = durability
        self._hints: Final = hints

        self._writer: Connection | None = None  # used only inside the gate's lock for threads
        self._readers = threading.Condition()
        self._idle: list[Connection] = []
        self._reading = 0
        self._closed = False

        self._foreign = 0  # counts looks that found something written by another connection than our writer
        self._version: int | None = None
        self._worked = 0.0  # when we last saw a write
        self._emptied = True  # the write-ahead log, since then
        self._woken = 0
        self._heard: dict[str, _Heard] = {}
        self._position: dict[str, int] = {}

        self._steps: Final = Steps(
            self.url,
            connect=self._connect_for_step,
            gate=lambda: self._passage(self._busy_timeout),
            clock=self._clock,
        )

        connections.check_path(self._path, self.url, create=create)
        self._place = place.enter(self._path, self)
        try:
            self._prepare(create=create)
        except BaseException:
            self.close()
            raise

    def elsewhere(self) -> str | None:
        if self._clock is not _system_clock:
            return None
        settings = {"busy_timeout": self._busy_timeout, "durability": self._synchronous, "hints": self._hints}
        return f"sqlite:///{quote(self._path)}?{urlencode(settings)}"

    # --- writing ---

    def write(self, batch: Batch) -> list[Verdict]:
        return self._written(batch, at_once=False)

    def write_at_once(self, batch: Batch) -> list[Verdict]:
        return self._written(batch, at_once=True)

    def _written(self, batch: Batch, *, at_once: bool) -> list[Verdict]:
        for judged, singly in ((False, False), (True, False), (True, True)):
            try:
                with self._transaction(at_once=at_once) as db:
                    writing = Writing(db, self._clock(), judged=judged, singly=singly)
                    verdicts = writing.write(batch)
            except Short as short:
                if judged:
                    raise StoreError(
                        f"The store {self.url} wrote less than it had found possible. Nothing was written. "
                        "Report it to us.",
                        store=self.url,
                    ) from short
                continue
            except Unfit as unfit:
                if singly or not batch.turns:
                    raise item_refused(self.url, unfit) from unfit.__cause__
                continue
            if writing.news:
                self._place.bell.ring()
            return verdicts
        raise AssertionError("a batch written one by one has verdicts or an error")

    def transaction(self, turn: Turn) -> StepTransaction | TurnVerdict:
        return self._steps.begin(turn)

    def write_on(self, connection: Any, batch: Batch) -> list[Verdict]:
        self._check_open()
        with ours(self.url), borrowed(connection, self._path, self.url) as db:
            # Looked at first: what turns out otherwise could not be written again in another way.
            writing = Writing(db, self._clock(), judged=True)
            try:
                return writing.write(batch)
            except Unfit as unfit:
                raise item_refused(self.url, unfit) from unfit.__cause__

    def prune(self, retention: Retention) -> Pruned:
        if retention.limit <= 0:
            return Pruned(after=retention.after)
        with self._read() as db:
            chosen = pruning.chosen(db, retention)
        if retention.dry_run or not (chosen.runs or chosen.piece):
            return Pruned(runs=len(chosen.runs), after=chosen.after)
        with self._transaction() as db:
            return pruning.remove(db, chosen)

    def claim(self, claim: Claim) -> list[Head]:
        queues = json.dumps(list(claim.queues))
        names = _names(claim.workflows, claim.activities)
        # Looked at first without the write lock: a claim that finds nothing costs the others nothing.
        if self._due(claim.namespace, queues, names)[0] is None:
            return []
        with self._transaction() as db:
            if not self._lives(db, claim.incarnation):
                return []
            now = self._clock()
            offered = _offered(db, claim, now, queues, names)
            chosen = choosing.chosen(offered, claim)
            if not chosen:
                return []
            keys = json.dumps(chosen)
            db.execute(SQL["take"], (claim.incarnation, now, keys))
            db.execute(SQL["readdress_mail"], (keys,))
        # They are ours, so nobody has to wait until they are read. One that was ended meanwhile is not.
        with self._read() as db:
            rows = {row.key: row for row in _listed(db, "rows", (keys,), _rows) if row.owner == claim.incarnation}
            mail = _by_run(_listed(db, "mail_of_runs", (keys,), _mail))
        return [Head(row=rows[key], mail=tuple(mail.get(key, ()))) for key in chosen if key in rows]

    def announce(self, announcement: Announcement) -> Lease:
        incarnation = announcement.incarnation
        beats = self._place.beats
        with self._transaction() as db:
            now = self._clock()
            known = _worker(db, incarnation)
            if known is not None and known.dead:
                raise StoreError(
                    f"Incarnation {incarnation} has been reaped or retired, and such a one is dead for ever. "
                    "Take a new incarnation.",
                    store=self.url,
                )
            if known is not None and known.slot is not None:
                slot, holds = known.slot, known.locked
            else:
                taken = {worker.slot for worker in _workers(db) if worker.slot is not None}
                slot, holds = (beats.lock(incarnation, taken), 1) if self._hints else (_first_free(taken), 0)
            try:
                beats.write(slot, incarnation, now)
                served = [msgspec.to_builtins(one) for one in announcement.serves]
                db.execute(
                    SQL["announce"],
                    (
                        *(incarnation, announcement.name, announcement.namespace),
                        *(json.dumps(list(announcement.queues)), json.dumps(served)),
                        *(announcement.ttl, slot, holds, now),
                    ),
                )
                values: list[Any] = []
                for one in announcement.serves:
                    signature = msgspec.json.encode(one.signature).decode()
                    values += (announcement.namespace, one.kind, one.name, one.queue, signature, now)
                if values:
                    _serve.run(db, values)
                workflows = json.dumps([one.name for one in announcement.serves if one.kind == "workflow"])
                due = db.execute(SQL["unblock"], (now, now, announcement.namespace, workflows, now)).rowcount
            except BaseException:
                beats.unlock(incarnation)
                raise
        if due:
            self._place.bell.ring()
        return Lease(now=now, until=now + announcement.ttl)

    def heartbeat(self, incarnation: str) -> Lease | None:
        with self._read() as db:
            worker = _worker(db, incarnation)
        if worker is None or worker.dead:
            self._place.beats.unlock(incarnation)
            return None
        now = self._clock()
        assert worker.slot is not None
        self._place.beats.write(worker.slot, incarnation, now)
        return Lease(now=now, until=now + worker.ttl)

    def reap(self, *, limit: int = 1000) -> Reaped:
        with self._read() as db:
            found = [worker for worker in _workers(db) if worker.dead or not self._is_alive(worker)]
        if not found:
            return Reaped()
        with self._transaction() as db:
            now = self._clock()
            # Looked at again: another may have reaped them, or they have beaten meanwhile.
            dead = [worker for worker in _workers(db) if not worker.dead and not self._is_alive(worker)]
            for worker in dead:
                db.execute(SQL["bury"], (1, now, worker.incarnation))
            keys = _keys(db.execute(SQL["orphans"], (limit,)).fetchone()[0])
            if keys:
                listed = json.dumps(keys)
                db.execute(SQL["hand_back_struck"], (listed,))
                db.execute(SQL["readdress_mail"], (listed,))
                db.execute(SQL["offer_mailed"], (listed,))
            if len(keys) < limit:
                db.execute(SQL["close_graves"])
        if keys:
            self._place.bell.ring()
        return Reaped(workers=len(dead), runs=len(keys))

    def retire(self, incarnation: str) -> int:
        with self._transaction() as db:
            worker = _worker(db, incarnation)
            keys: list[int] = []
            if worker is not None and not worker.dead:
                keys = _keys(db.execute(SQL["owned_by"], (incarnation,)).fetchone()[0])
                if keys:
                    listed = json.dumps(keys)
                    db.execute(SQL["hand_back"], (listed,))
                    db.execute(SQL["readdress_mail"], (listed,))
                    db.execute(SQL["offer_mailed"], (listed,))
                db.execute(SQL["bury"], (2, self._clock(), incarnation))
        self._place.beats.unlock(incarnation)
        if keys:
            self._place.bell.ring()
        return len(keys)

    # --- reading ---

    def history(self, run: Key, after: int = 0) -> list[str]:
        events: list[str] = []
        chunk = CHUNK
        while True:
            with self._read() as db:
                try:
                    number, text = db.execute(SQL["history"], (run, after + len(events), chunk)).fetchone()
                except sqlite3.DataError:
                    # More than one text can hold.
                    if chunk == 1:
                        raise
                    chunk = 1
                    continue
            if number:
                events += text.split("\x1e")
            if number < chunk:
                return events

    def histories(self, runs: Sequence[Key]) -> dict[Key, list[str]]:
        return {run: self.history(run) for run in runs}

    def mail(self, incarnation: str) -> list[Mail]:
        mail = self._list("mail_of_owner", (incarnation,), _mail)
        mail.sort(key=lambda message: (message.run, message.position))
        return mail

    def mail_is_likely(self, incarnation: str) -> bool:
        return True

    def mailbox(self, run: Key) -> list[Mail]:
        mail = self._list("mail_of_runs", (f"[{run}]",), _mail)
        mail.sort(key=lambda message: message.position)
        return mail

    def owned(self, incarnation: str) -> list[Key]:
        return _keys(self._ask("owned", (incarnation,))[0])

    def run(self, namespace: str, id: str) -> Row | None:
        found = self._ask("newest", (namespace, id))
        return None if found is None else _row(found[0])

    def rows(self, keys: Sequence[Key]) -> list[Row]:
        return self._list("rows", (json.dumps(list(keys)),), _rows)

    def ended(self, keys: Sequence[Key]) -> list[Key]:
        return _keys(self._ask("ended", (json.dumps(list(keys)),))[0])

    def counts(self, namespace: str, *, workflow: str | None = None, queue: str | None = None) -> Mapping[str, int]:
        with self._read() as db:
            workflows = _workflows(db, namespace, workflow)
            if queue is None:
                return dict(db.execute(SQL["counts"], (namespace, workflows)).fetchall())
            return dict(db.execute(SQL["counts_of_queue"], (namespace, workflows, queue)).fetchall())

    def children(self, run: Key) -> list[Row]:
        return self._list("children", (run,), _rows)

    def suspects(self, claim: Claim) -> bool:
        served = [(name, "workflow") for name in claim.workflows] + [(name, "activity") for name in claim.activities]
        asked = (claim.namespace, self._clock(), json.dumps(list(claim.queues)), json.dumps(served))
        return bool(self._ask("suspects", asked)[0])

    def overdue(self, *, limit: int = 100) -> list[Row]:
        return self._list("overdue", (self._clock(), limit, limit, limit), _rows)

    def announced(self, namespace: str) -> list[Announced]:
        with self._read() as db:
            workers = _workers(db)
            served = db.execute(SQL["served"], (namespace,)).fetchall()
        live: dict[tuple[str, str], set[str]] = {}
        for worker in workers:
            if worker.namespace == namespace and not worker.dead and self._is_alive(worker):
                for one in json.loads(worker.serves):
                    live.setdefault((one["kind"], one["name"]), set()).update(json.loads(worker.queues))
        return [
            Announced(
                name=name,
                kind=kind,
                queue=queue,
                signature=json.loads(signature),
                live=(kind, name) in live,
                queues=tuple(sorted(live.get((kind, name), ()))),
            )
            for kind, name, queue, signature in served
        ]

    def worker(self, incarnation: str) -> str | None:
        with self._read() as db:
            worker = _worker(db, incarnation)
        return worker.name if worker is not None and not worker.dead and self._is_alive(worker) else None

    def held_open(self, run: Key) -> bool:
        return False  # A transaction that has written anything holds the whole store.

    # --- waiting ---

    def wait(self, incarnation: str, queues: Sequence[str], timeout: float) -> bool:
        until = time.monotonic() + timeout
        bell = self._place.bell
        scope = self._scope(incarnation, queues)
        heard_before = self._heard.get(incarnation, _Heard())
        self._look()
        due, timer = self._due(*scope) if scope is not None else (None, None)
        looked = heard_before.foreign
        while True:
            now = _Heard(rung=bell.count, woken=self._woken, foreign=self._foreign, at=self._clock())
            heard = (now.rung, now.woken) != (heard_before.rung, heard_before.woken)
            if not heard and now.foreign != looked:
                looked = now.foreign
                due, timer = self._due(*scope) if scope is not None else (0, None)
                heard = due is not None or self._has_new_mail(incarnation)
            # A timer that came since the last wait, or now.
            heard = heard or (due is not None and due > heard_before.at) or (timer is not None and timer <= now.at)
            left = until - time.monotonic()
            if heard or left <= 0 or self._closed:
                self._heard[incarnation] = now
                return heard and not self._closed
            self._empty_log()
            pause = QUICK if time.monotonic() - self._worked < 1.0 else SLOW
            if timer is not None:
                pause = min(pause, (timer - now.at) / 1_000_000)
            with bell.changed:
                if (bell.count, self._woken) == (now.rung, now.woken):
                    bell.changed.wait(min(left, pause))
            self._look()

    def wake(self) -> None:
        with self._place.bell.changed:
            self._woken += 1
            self._place.bell.changed.notify_all()

    def close(self) -> None:
        if not self._closed:
            self._closed = self._steps.over = True
            self.wake()
            # Closing the last connection of all checkpoints the log: like every checkpoint of ours, inside the gate.
            writes = (self._writer is not None or self._steps.in_use) and self._place.gate.enter(time.monotonic() + 1)
            try:
                self.release_connections()
            finally:
                if writes:
                    self._place.gate.leave()
                self._place.leave(self)

    # --- what all of it needs ---

    def release_connections(self) -> None:
        """Close all connections; the next use opens them again. The caller keeps our other threads from writing."""
        with self._readers:
            self._readers.wait_for(lambda: not self._reading, timeout=1)
            idle, self._idle = self._idle, []
        for db in idle:
            db.close()
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        self._steps.close()

    def forget_connections(self) -> None:
        """In a forked child: what a thread of the parent still had open is not ours, not even to close."""
        _not_ours.extend(db for db in (self._writer, self._steps.forget(), *self._idle) if db is not None)
        self._readers = threading.Condition()
        self._idle, self._reading, self._writer = [], 0, None

    def _prepare(self, *, create: bool) -> None:
        """See that it is a store of ours, or make it one."""
        try:
            with self._read() as db:
                current = migrations.is_current(db, self.url)
                misled = current and create and analysed.is_analysed(db)
            if misled:
                self._forget_statistics()
            if current:
                return
        except StoreUnavailable:
            if not create:
                raise
        if not create:
            raise NotAStore(
                f"There is no store {self.url}. The file is a SQLite database without the tables of Perdure, and "
                "reading does not create them. Check the path, or start a run or a worker first.",
                store=self.url,
            )
        with self._gate(self._busy_timeout), ours(self.url):
            db = self._opened_writer()
            mode = db.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                raise NotAStore(
                    f"The store {self.url} cannot have a write-ahead log: its journal stays {mode!r}. A file system "
                    "without shared memory cannot have one. Put the file on a local disk.",
                    store=self.url,
                )
            migrations.migrate(db, self.url, self._clock())

    def _forget_statistics(self) -> None:
        try:
            with self._gate(self._busy_timeout), ours(self.url), closing(self._connect(writes=True)) as db:
                analysed.forget(db)
        except (StoreLocked, StoreFull) as error:
            log.warning("what ANALYZE has noted could not be removed, and may make this store slow: %s", error)
        with self._readers:
            # They have read it.
            while self._idle:
                self._idle.pop().close()

    @contextmanager
    def _gate(self, patience: float, *, behind_steps: bool = False) -> Iterator[None]:
        gate = self._place.gate
        try:
            entered = gate.enter(time.monotonic() + patience)
            if not entered and behind_steps and (more := self._steps.patience):
                # A step of this process came first, after it was asked how long that may take.
                patience += more
                entered = gate.enter(time.monotonic() + more)
        except OSError as error:
            raise StoreUnavailable(
                f"The store {self.url} cannot be written. Beside it {gate.path} cannot be used: {error.strerror}. "
                "The folder must be writable.",
                store=self.url,
            ) from error
        if not entered:
            raise locked(self.url, patience)
        try:
            yield
        finally:
            gate.leave()

    @contextmanager
    def _passage(self, patience: float) -> Iterator[None]:
        """The way of every writer: through the gate, to a file that is still there."""
        self._check_open()
        with self._gate(patience, behind_steps=patience > 0):
            if not self._place.is_there():
                raise StoreUnavailable(
                    f"The store {self.url} is not where it was: its file was moved, removed or replaced. Nothing was "
                    "written. Put it back, or open the store again.",
                    store=self.url,
                )
            yield

    @contextmanager
    def _transaction(self, *, at_once: bool = False) -> Iterator[Connection]:
        """One write transaction: all of the block, or nothing of it. at_once: `StoreLocked` instead of waiting."""
        with self._passage(0.0 if at_once else self._busy_timeout + self._steps.patience), ours(self.url):
            db = self._opened_writer()
            try:
                if at_once:
                    db.execute("PRAGMA busy_timeout = 0")
                try:
                    db.execute("BEGIN IMMEDIATE")
                finally:
                    if at_once:
                        db.execute(f"PRAGMA busy_timeout = {int(self._busy_timeout * 1000)}")
                yield db
                db.execute("COMMIT")
            except BaseException:
                self._roll_back(db)
                raise
            self._worked = time.monotonic()
            self._emptied = False

    def _roll_back(self, db: Connection) -> None:
        try:
            if db.in_transaction:
                db.execute("ROLLBACK")
        except sqlite3.Error:
            # After an error of the disk nobody knows its state: the next write gets a new one.
            self._writer = None
            db.close()

    def _opened_writer(self) -> Connection:
        if self._writer is None:
            self._writer = self._connect(writes=True)
        return self._writer

    def _connect(self, *, writes: bool, factory: type[Connection] = Connection) -> Any:
        connections.check_path(self._path, self.url, create=False)
        return connections.connect(
            self._path, busy_timeout=self._busy_timeout, durability=self._synchronous, writes=writes, factory=factory
        )

    def _connect_for_step(self, factory: type[StepConnection]) -> StepConnection:
        connection: StepConnection = self._connect(writes=True, factory=factory)
        return connection

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        """A connection for reading, of this thread as long as the block lasts."""
        self._check_open()
        with self._readers:
            self._reading += 1
            db = self._idle.pop() if self._idle else None
        try:
            with ours(self.url):
                if db is None:
                    db = self._connect(writes=False)
                yield db
        except BaseException:
            if db is not None:
                db.close()
            db = None
            raise
        finally:
            with self._readers:
                self._reading -= 1
                if db is not None and len(self._idle) < READERS and not self._closed:
                    self._idle.append(db)
                    db = None
                self._readers.notify_all()
            if db is not None:
                db.close()

    def _ask(self, query: str, parameters: tuple[Any, ...]) -> Any:
        with self._read() as db:
            return db.execute(SQL[query], parameters).fetchone()

    def _list(self, query: str, parameters: tuple[Any, ...], decode: Callable[[str], list[T]]) -> list[T]:
        with self._read() as db:
            return _listed(db, query, parameters, decode)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"The store {self.url} is closed. Nothing was done. Open a new one.", store=self.url)

    def _lives(self, db: Connection, incarnation: str) -> bool:
        worker = _worker(db, incarnation)
        return worker is not None and not worker.dead

    def _is_alive(self, worker: _Worker) -> bool:
        """What the kernel and the clock say of an incarnation that nobody has buried."""
        if worker.slot is None:
            return False
        if self._hints and worker.locked and self._place.beats.is_free(worker.slot, worker.incarnation):
            return False
        beat = self._place.beats.read(worker.slot, worker.incarnation)
        return self._clock() <= (worker.announced_at if beat is None else beat) + worker.ttl

    def _due(self, namespace: str, queues: str, names: str) -> tuple[int | None, int | None]:
        """When the latest of what is due came due, and when the next timer comes."""
        now = self._clock()
        due, timer = self._ask("due", (namespace, now, namespace, now, queues, names))
        return due, timer

    def _scope(self, incarnation: str, queues: Sequence[str]) -> tuple[str, str, str] | None:
        """What an incarnation may claim, as `_due` takes it; None if it was never announced."""
        with self._read() as db:
            worker = _worker(db, incarnation)
        if worker is None:
            return None
        names = json.dumps([(one["name"], one["kind"]) for one in json.loads(worker.serves)])
        return worker.namespace, json.dumps(list(queues)), names

    def _has_new_mail(self, incarnation: str) -> bool:
        newest = self._ask("newest_of_owner", (incarnation,))[0] or 0
        known = self._position.get(incarnation, 0)
        self._position[incarnation] = max(newest, known)
        return newest > known

    def _look(self) -> None:
        """See whether another connection than our writer has written. A writer at work is not disturbed."""
        threads = self._place.gate.threads
        if self._closed or not threads.acquire(blocking=False):
            return
        try:
            with ours(self.url):
                version = self._opened_writer().execute("PRAGMA data_version").fetchone()[0]
        finally:
            threads.release()
        if version != self._version:
            self._version = version
            self._foreign += 1
            self._worked = time.monotonic()
            self._emptied = False

    def _empty_log(self) -> None:
        """Move the write-ahead log into the database and cut it to nothing, once nobody has written for a while."""
        if self._emptied or time.monotonic() - self._worked < IDLE:
            return
        self._emptied = True  # tried once: a reader in the way only means that the file stays larger
        gate = self._place.gate
        if not gate.enter(time.monotonic()):
            return
        try:
            db = self._opened_writer()
            db.execute("PRAGMA busy_timeout = 0")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            db.execute(f"PRAGMA busy_timeout = {int(self._busy_timeout * 1000)}")
        except sqlite3.Error:
            self._writer = None  # the next write opens a new one, and says what is wrong
        finally:
            gate.leave()

    # The last one: from here on `list` in an annotation of this class would mean this method.
    def list(self, query: Query) -> list[Row]:
        cursor = FOREVER if query.cursor is None else query.cursor
        after = -1 if query.created_after is None else query.created_after
        before = FOREVER if query.created_before is None else query.created_before
        statuses = STATUSES if query.status is None else json.dumps([str.__str__(query.status)])
        with self._read() as db:
            workflows = _workflows(db, query.namespace, query.workflow)
            bounds = (cursor, after, before, query.limit)
            if query.parent is not None:
                asked = (query.parent, query.namespace, workflows, statuses, *bounds)
                return _listed(db, "page_of_children", asked, _rows)
            return _listed(db, "page", (workflows, statuses, query.namespace, *bounds, query.limit), _rows)


class _Heard(NamedTuple):
    """What an incarnation knows since its last wait: both counts of this process, looks at others, the time."""

    rung: int = 0
    woken: int = 0
    foreign: int = -1
    at: int = 0


class _Worker(NamedTuple):
    """A row of perdure_workers."""

    incarnation: str
    name: str
    namespace: str
    queues: str
    serves: str
    ttl: int
    slot: int | None
    locked: int
    announced_at: int
    dead: int


_not_ours: list[Connection] = []  # what a forked child inherited: closing it would end the parent's locks


def _system_clock() -> int:
    return time.time_ns() // 1000


def _worker(db: Connection, incarnation: str) -> _Worker | None:
    row = db.execute(SQL["worker"], (incarnation,)).fetchone()
    return None if row is None else _Worker(*row)


def _workers(db: Connection) -> list[_Worker]:
    return [_Worker(*row) for row in db.execute(SQL["workers"]).fetchall()]


def _workflows(db: Connection, namespace: str, workflow: str | None) -> str:
    """The names that are looked at, as JSON: one, or all that have runs."""
    if workflow is not None:
        return json.dumps([workflow])
    return str(db.execute(SQL["workflows"], (namespace, namespace)).fetchone()[0])


def _names(workflows: Sequence[str], activities: Sequence[str]) -> str:
    return json.dumps([(name, "workflow") for name in workflows] + [(name, "activity") for name in activities])


def _first_free(taken: set[int]) -> int:
    return next(slot for slot in range(len(taken) + 1) if slot not in taken)


def _offered(db: Connection, claim: Claim, now: int, queues: str, names: str) -> list[list[int]]:
    """What a claim may take, most urgent first: [key, strikes, bytes of history, bytes of mail]."""
    number = max(claim.limit, 0)
    if claim.only_suspects:
        found = db.execute(SQL["claimable_suspect"], (claim.namespace, now, queues, names))
    else:
        strikes = 3 if claim.alone else 2
        found = db.execute(
            SQL["claimable"],
            (
                *(queues, names),
                *(claim.namespace, strikes, max(number, WINDOW)),
                *(claim.namespace, now, strikes, max(number, WINDOW)),
                number,
            ),
        )
    offered: list[list[int]] = json.loads(found.fetchone()[0])
    return offered


def _listed(db: Connection, query: str, parameters: tuple[Any, ...], decode: Callable[[str], list[T]]) -> list[T]:
    """What a statement has found, read as one text: reading many would give up the GIL for each."""
    try:
        return decode(db.execute(SQL[query], parameters).fetchone()[0])
    except sqlite3.DataError:
        # More than one text can hold (a thousand million bytes).
        return [item for (text,) in db.execute(SINGLY[query], parameters) for item in decode(f"[{text}]")]


def _by_run(mail: Sequence[Mail]) -> dict[Key, list[Mail]]:
    found: dict[Key, list[Mail]] = {}
    for message in sorted(mail, key=lambda message: message.position):
        found.setdefault(message.run, []).append(message)
    return found
