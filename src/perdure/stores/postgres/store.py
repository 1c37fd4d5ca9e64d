"""Runs kept in a PostgreSQL database, for any number of workers: `postgresql://user@host/database`.

A process has at most five connections: one writes (`writer.py`), two read and claim, one beats, and one listens
(`listening.py`), which is also how others see whether the process lives. They are made when they are first needed.
How a batch is written: `batch.py`; until it has its verdicts: `sending.py`; the statements: `*.sql`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import msgspec
import psycopg

from perdure.core.errors import NotAStore, StoreError, StoreLocked, StoreReadOnly, StoreUnavailable
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
from perdure.stores.postgres import borrowed, connections, judging, migrations, pruning
from perdure.stores.postgres.errors import ours
from perdure.stores.postgres.held import Held
from perdure.stores.postgres.listening import Bell, Listener
from perdure.stores.postgres.pipe import DISCARD, Plans
from perdure.stores.postgres.queries import channel_of, check_schema, statements
from perdure.stores.postgres.sending import Sending
from perdure.stores.postgres.transaction import Steps, StepTransaction
from perdure.stores.postgres.writer import Writer
from perdure.stores.schema import Schema
from perdure.stores.settings import of_type

log = logging.getLogger(__name__)

WINDOW: Final = 1_000  # claimable runs of one queue and name among which the most urgent are looked for
READERS: Final = 2  # connections that read and claim
BUSY: Final = 0.05  # seconds between looks at what others wrote, while the last second saw work
IDLE: Final = 1.0
FOREVER: Final = 2**63 - 1
GONE_FOR: Final = 0.4  # seconds for which a connection must be missing until its worker is taken for dead
UNRENEWED: Final = 700_000  # microseconds since its last beat
DISTRUST: Final = 10.0  # seconds after the loss of our own connection in which others' are no hint
FIRST_CONNECTION: Final = 2.0
"""Seconds that an announcement waits for the connection that stands for its worker."""
ALERT, CALM = 0.2, 4.0  # seconds between rounds of housekeeping: others are at work, or nobody is

STATUSES: Final = [status.value for status in Status]
_ROW: Final = Row.__struct_fields__
_MAIL: Final = Mail.__struct_fields__


class Reader(NamedTuple):
    """A connection for reading, and the plans it keeps."""

    db: psycopg.Connection[Any]
    plans: Plans


class PostgresStore:
    """A store in a schema of the database that `url` names, as libpq reads it. Making one connects.

    Raised there: StoreUnavailable, StoreTooNew, NotAStore and other StoreErrors; TypeError or ValueError for a setting
    that is none.
    schema: several stores may stand side by side in one database; default "perdure".
    migrate: "auto", the default, makes the tables and brings them up to date; "check" refuses where they are not.
    direct: a URL that leads past a pooler, for notifications and for noticing deaths at once; without it, behind a
        pooler, polling and the lease serve instead.
    password: instead of one in the URL; a function is asked at every connect.
    hints: whether connections tell who has died; default true, without them only the time of the last heartbeat does.
    clock: microseconds since the epoch; the server's if None.

    All methods may be called from any thread, `write` from one at a time. After a fork, the child makes connections of
    its own; an incarnation stays the parent's.
    """

    url: str
    durability: str
    transactions: bool = True

    def __init__(
        self,
        url: str,
        *,
        schema: str = "perdure",
        migrate: str = "auto",
        direct: str | None = None,
        password: str | Callable[[], str] | None = None,
        hints: bool = True,
        clock: Callable[[], int] | None = None,
    ) -> None:
        of_type(url, str, "url")
        of_type(schema, str, "schema=")
        if direct is not None:
            of_type(direct, str, "direct=")
        of_type(hints, bool, "hints=")
        if password is not None and not callable(password):
            of_type(password, str, "password=")
        if migrate not in ("auto", "check"):
            raise ValueError(f'migrate={migrate!r} is neither "auto" nor "check"')
        self._schema: Final = check_schema(schema)
        shown = {} if schema == "perdure" else {"schema": schema}
        if direct is not None:
            shown["direct"] = connections.Address(direct, password=None, shown={}).url
        if not hints:
            shown["hints"] = "false"
        self._address: Final = connections.Address(url, password=password, shown=shown)
        self._direct: Final = None if direct is None else connections.Address(direct, password=password, shown={})
        self.url = self._address.url
        self._channel: Final = channel_of(schema)
        self._known_home: tuple[Any, ...] | None = None
        self._statements: Final = statements(schema)
        self._server_clock: Final = connections.ServerClock(self._ask_clock)
        self._clock: Final = clock or self._server_clock
        self._hints: Final = hints
        self._closed = False

        self._writing = threading.Lock()
        self._writer: Final = Writer(self._connect_writer)
        self._held: Final = Held()
        self._sent: Sending  # not collected yet
        self._pooled = False
        self._steps: Final = Steps(
            self.url, connect=self._connect_for_step, statements=self._statements, clock=self._clock
        )
        self._readers = threading.Condition()
        self._idle: list[Reader] = []
        self._reading = 0
        self._beating = threading.Lock()
        self._heart: psycopg.Connection[Any] | None = None
        self._own: dict[str, int] = {}  # incarnations announced here, with what they may have heard
        self._gone: dict[str, tuple[tuple[int, int], float]] = {}  # workers without connections, since when we see it

        self._bell = Bell()
        self._listener: Listener | None = None
        self._told_at = 0.0
        self._worked = 0.0  # when we last saw work
        self._woken = 0
        self._heard: dict[str, _Heard] = {}
        self._mail_here: dict[str, bool] = {}  # whether an incarnation's last claim has seen mail for its runs
        self._timer: int | None = None  # the next one that a claim has seen
        self._overdue: tuple[bool, float] | None = None  # what a round has just seen
        self.rounds: float = CALM

        with ours(self.url):
            self._prepare(migrate)
        _stores.add(self)

    @staticmethod
    def schema_of(url: str, settings: Mapping[str, Any]) -> Schema:
        """Which migrations have made the tables, and which are still to come; nothing is created or changed."""
        schema = check_schema(settings.get("schema", "perdure"))
        shown = {} if schema == "perdure" else {"schema": schema}
        address = connections.Address(url, password=settings.get("password"), shown=shown)
        with ours(address.url), address.connect() as db:
            return migrations.look(db, schema, address.url)

    def now(self) -> int:
        return self._clock()

    def elsewhere(self) -> str | None:
        if self._clock is not self._server_clock:
            return None
        settings = {"schema": self._schema, "migrate": "check", "hints": str(self._hints).lower()}
        if self._direct is not None:
            settings["direct"] = self._direct.secret({})
        return self._address.secret(settings)

    # --- writing ---

    def write(self, batch: Batch) -> list[Verdict]:
        self.begin(batch)
        return self.finish()

    def write_at_once(self, batch: Batch) -> list[Verdict]:
        raise StoreLocked(
            f"The store {self.url} is written over a connection, and every write waits for it. Nothing was written. "
            "Call write.",
            store=self.url,
        )

    def begin(self, batch: Batch) -> None:
        """Send a batch and do not wait. `finish`, which must follow, has the verdicts or the error."""
        self._writing.acquire()
        try:
            self._check_open()
            self._sent = Sending(self._writer, self._statements, self._clock, batch, self.url, self._held)
        except BaseException:
            self._writing.release()
            raise

    def begin_at_once(self, batch: Batch) -> int | None:
        """As `begin`, where that needs no wait: no connection to be made, nobody else who is writing.

        The file descriptor that has something to read when there is something to collect; None: nothing was sent.
        """
        if self._closed or self._listener is None or not self._writer.connected():
            return None
        if not self._writing.acquire(blocking=False):
            return None
        try:
            self._sent = Sending(self._writer, self._statements, self._clock, batch, self.url, self._held)
            return self._writer.fileno() if self._writer.connected() else -1
        except BaseException:
            self._writing.release()
            raise

    def arrived(self) -> bool:
        """Whether the answers to what `begin_at_once` sent are here, or will never be. Does not wait."""
        return self._sent.arrived()

    @property
    def unsent(self) -> bool:
        """Whether a part of it is still to be sent: `arrived` does so when the file descriptor can be written to."""
        return self._writer.unsent

    def finish_at_once(self) -> list[Verdict] | None:
        """The verdicts, if they have arrived and all is written; None if `finish` has to find out what was."""
        verdicts = self._sent.usual()
        if verdicts is not None:
            self._writing.release()
            self._worked = time.monotonic()
            if self._sent.news:
                self._ring()
        return verdicts

    def finish(self) -> list[Verdict]:
        """Wait for the verdicts of the batch that was sent last."""
        try:
            with ours(self.url):
                verdicts = self._sent.finish()
            news = self._sent.news
        finally:
            self._writing.release()
        self._worked = time.monotonic()
        if news:
            self._ring()
        return verdicts

    def transaction(self, turn: Turn) -> StepTransaction | TurnVerdict:
        self._check_open()
        return self._steps.begin(turn)

    def write_on(self, connection: Any, batch: Batch) -> list[Verdict]:
        self._check_open()
        with ours(self.url):
            borrowed.check(connection, self._schema, self._statements["home"], self._home, self.url)
            way = borrowed.Borrowed(connection)
            with way.savepoint():
                sending = Sending(way, self._statements, self._clock, batch, self.url, Held())
                verdicts = sending.finish()
            if sending.news:
                # Goes out when the caller's transaction commits, and only then.
                connection.execute("SELECT pg_notify(%s, '')", [self._channel])
        return verdicts

    def prune(self, retention: Retention) -> Pruned:
        if retention.limit <= 0:
            return Pruned(after=retention.after)
        chosen = pruning.chosen(self._ask, retention)
        if retention.dry_run or not (chosen.runs or chosen.piece):
            return Pruned(runs=len(chosen.runs), after=chosen.after)
        with self._transaction() as ask:
            return pruning.remove(ask, chosen)

    def fileno(self) -> int:
        """Between `begin` and `finish`: what has something to read when there is something to collect."""
        return self._writer.fileno()

    def claim(self, claim: Claim) -> list[Head]:
        scope = _scope(claim.namespace, claim.queues, claim.workflows, claim.activities)
        due, timer, calls, mail_here = self._due(scope, claim.incarnation)
        self._mail_here[claim.incarnation] = mail_here
        self._timer = timer
        # Looked at first without a transaction: a claim that finds nothing costs nobody anything.
        if due is None and not calls:
            return []
        number = max(claim.limit, 0)
        with self._transaction() as ask:
            now = self._clock()
            if calls:
                ask("settle")
            if claim.only_suspects:
                offered = ask("claimable_suspect", **scope, incarnation=claim.incarnation, now=now)
            else:
                offered = ask(
                    "claimable",
                    **scope,
                    incarnation=claim.incarnation,
                    now=now,
                    strikes=3 if claim.alone else 2,
                    window=max(number, WINDOW),
                    number=number,
                )
            chosen = choosing.chosen(offered, claim)
            if not chosen:
                return []
            taken = ask("take", incarnation=claim.incarnation, now=now, keys=chosen)
            rows = {row[0]: _row(row) for row in taken}
            ask("call_owner", keys=chosen)
            mail: dict[Key, list[Mail]] = {}
            for message in map(_mail, ask("mail_of_runs", keys=chosen)):
                mail.setdefault(message.run, []).append(message)
        self._worked = time.monotonic()
        return [Head(row=rows[key], mail=tuple(mail.get(key, ()))) for key in chosen if key in rows]

    def announce(self, announcement: Announcement) -> Lease:
        incarnation = announcement.incarnation
        self._listen()
        if self._listener is not None:
            # So that it is known by its connection from the start. Without one it is announced all the same.
            self._listener.first.wait(FIRST_CONNECTION)
        with self._transaction() as ask:
            now = self._clock()
            served = [msgspec.to_builtins(one) for one in announcement.serves]
            kept = ask(
                "announce",
                incarnation=incarnation,
                name=announcement.name,
                namespace=announcement.namespace,
                queues=json.dumps(list(announcement.queues)),
                serves=json.dumps(served),
                ttl=announcement.ttl,
                now=now,
            )
            if not kept:
                raise StoreError(
                    f"Incarnation {incarnation} has been reaped or retired, and such a one is dead for ever. "
                    "Take a new incarnation.",
                    store=self.url,
                )
            ones = {(one.kind, one.name): one for one in announcement.serves}.values()
            if ones:
                ask(
                    "serve",
                    namespace=announcement.namespace,
                    now=now,
                    kinds=[one.kind for one in ones],
                    names=[one.name for one in ones],
                    queues=[one.queue for one in ones],
                    signatures=[msgspec.json.encode(one.signature).decode() for one in ones],
                )
            workflows = [one.name for one in announcement.serves if one.kind == "workflow"]
            backend = self._backend()
            ask("beat", incarnation=incarnation, now=now, backend=backend)
            due = ask("unblock", namespace=announcement.namespace, workflows=workflows, now=now)
        self._own[incarnation] = 0
        if self._backend() != backend:
            # The listener connected meanwhile, and did not know of this incarnation: nobody would see it die.
            self._stand_for()
        if due:
            self._ring()
        return Lease(now=now, until=now + announcement.ttl)

    def heartbeat(self, incarnation: str) -> Lease | None:
        with self._beating:
            self._check_open()
            now = self._clock()
            with ours(self.url):
                found = self._on_heart("beat", incarnation=incarnation, now=now, backend=self._backend())
        if found and self._clock is self._server_clock:
            self._server_clock.set(found[0][1])
        if not found:
            self._own.pop(incarnation, None)
            return None
        return Lease(now=now, until=now + found[0][0])

    def reap(self, *, limit: int = 1000) -> Reaped:
        now = self._clock()
        own = list(self._own)
        [(morgue, deadline, struck, others, gone, beats, backends)] = self._ask("patrol", now=now, own=own)
        self._overdue = (struck or (deadline is not None and deadline <= now), time.monotonic())
        seen = dict(zip(gone, zip(beats, backends, strict=True), strict=True))
        dead = self._surely_gone(seen, now)
        self.rounds = ALERT / 2 if gone else ALERT if others else CALM
        if deadline is not None:
            self.rounds = min(self.rounds, max((deadline - now) / 1_000_000, ALERT))
        if not morgue and not dead:
            return Reaped()
        with self._transaction() as ask:
            buried = ask(
                "bury",
                now=now,
                gone=list(dead),
                beats=[beat for beat, _ in dead.values()],
                backends=[backend for _, backend in dead.values()],
            )
            ask("end_steps")
            runs = len(ask("hand_back_struck", number=limit))
            ask("close_graves", now=now)
        for (incarnation,) in buried:
            self._gone.pop(incarnation, None)
        if runs:
            self._ring()
        return Reaped(workers=len(buried), runs=runs)

    def _surely_gone(self, missing: Mapping[str, tuple[int, int]], now: int) -> dict[str, tuple[int, int]]:
        """Workers whose connections have been missing for a while, and who did not beat or connect meanwhile.

        missing: last beat and connection of each.
        """
        if not self._hints or not self._trusts():
            return {}
        seen = time.monotonic()
        before = self._gone
        self._gone = {
            name: (last, before[name][1] if name in before and before[name][0] == last else seen)
            for name, last in missing.items()
            if name not in self._own
        }
        return {
            name: last
            for name, (last, since) in self._gone.items()
            if seen - since >= GONE_FOR and now - last[0] >= UNRENEWED
        }

    def _trusts(self) -> bool:
        """Whether connections say anything of workers: not when ours was cut too, a moment ago."""
        listener = self._listener
        lost_at = None if listener is None else listener.lost_at
        return lost_at is None or time.monotonic() - lost_at > DISTRUST

    def retire(self, incarnation: str) -> int:
        with self._transaction() as ask:
            runs = 0
            if ask("bury_retired", incarnation=incarnation, now=self._clock()):
                runs = len(ask("hand_back", incarnation=incarnation))
        self._own.pop(incarnation, None)
        if runs:
            self._ring()
        return runs

    # --- reading ---

    def history(self, run: Key, after: int = 0) -> list[str]:
        return [event for (event,) in self._ask("history", run=run, after=after)]

    def histories(self, runs: Sequence[Key]) -> dict[Key, list[str]]:
        found: dict[Key, list[str]] = {}
        for run, event in self._ask("histories", keys=list(runs)):
            found.setdefault(run, []).append(event)
        return found

    def mail(self, incarnation: str) -> list[Mail]:
        return [_mail(row) for row in self._ask("mail_of_owner", incarnation=incarnation)]

    def mail_is_likely(self, incarnation: str) -> bool:
        return self._mail_here.pop(incarnation, True)

    def mailbox(self, run: Key) -> list[Mail]:
        return [_mail(row) for row in self._ask("mail_of_runs", keys=[run])]

    def owned(self, incarnation: str) -> list[Key]:
        return [key for (key,) in self._ask("owned", incarnation=incarnation)]

    def run(self, namespace: str, id: str) -> Row | None:
        found = self._ask("newest", namespace=namespace, id=id)
        return _row(found[0]) if found else None

    def rows(self, keys: Sequence[Key]) -> list[Row]:
        return [_row(row) for row in self._ask("rows", keys=list(keys))]

    def ended(self, keys: Sequence[Key]) -> list[Key]:
        return [key for (key,) in self._ask("ended", keys=list(keys))]

    def counts(self, namespace: str, *, workflow: str | None = None, queue: str | None = None) -> Mapping[str, int]:
        workflows = self._workflows(namespace, workflow)
        if queue is None:
            return dict(self._ask("counts", namespace=namespace, workflows=workflows))
        return dict(self._ask("counts_of_queue", namespace=namespace, workflows=workflows, queue=queue))

    def children(self, run: Key) -> list[Row]:
        return [_row(row) for row in self._ask("children", run=run)]

    def suspects(self, claim: Claim) -> bool:
        scope = _scope(claim.namespace, claim.queues, claim.workflows, claim.activities)
        # What only unread mail would make due is settled by whoever claims.
        return bool(self._ask("suspects", **scope, now=self._clock())[0][0])

    def overdue(self, *, limit: int = 100) -> list[Row]:
        seen, self._overdue = self._overdue, None
        # The round has just looked, unless somebody tells the time.
        if seen is not None and not seen[0] and self._clock is self._server_clock and time.monotonic() - seen[1] < 0.1:
            return []
        return [_row(row) for row in self._ask("overdue", now=self._clock(), number=limit)]

    def announced(self, namespace: str) -> list[Announced]:
        served = self._ask("served", namespace=namespace)
        living = self._ask("serving", namespace=namespace, now=self._clock())
        live: dict[tuple[str, str], set[str]] = {}
        for serves, queues in living:
            for one in json.loads(serves):
                live.setdefault((one["kind"], one["name"]), set()).update(json.loads(queues))
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
        found = self._ask("worker", incarnation=incarnation, now=self._clock())
        return str(found[0][0]) if found else None

    def held_open(self, run: Key) -> bool:
        try:
            return bool(self._ask("held", run=run)[0][0])
        except (NotAStore, StoreReadOnly):
            return False  # Who may only look cannot try.

    # --- waiting ---

    def wait(self, incarnation: str, queues: Sequence[str], timeout: float) -> bool:
        self._listen()
        until = time.monotonic() + timeout
        bell = self._bell
        before = self._heard.get(incarnation, _Heard())
        # Polling: whoever waits comes back and looks, as often as the store sees work.
        look = time.monotonic() + (BUSY if time.monotonic() - self._worked < 1.0 else IDLE)
        while True:
            now = _Heard(rung=bell.count, woken=self._woken)
            timer = self._timer
            left = min(until, look) - time.monotonic()
            heard = now != before or (timer is not None and timer <= self._clock())
            if heard and timer is not None and timer <= self._clock():
                self._timer = None
            if heard or left <= 0 or self._closed:
                self._heard[incarnation] = now
                return (heard or time.monotonic() < until) and not self._closed
            if timer is not None:
                left = min(left, (timer - self._clock()) / 1_000_000)
            with bell.changed:
                if (bell.count, self._woken) == now:
                    bell.changed.wait(left)

    def wake(self) -> None:
        with self._bell.changed:
            self._woken += 1
            self._bell.changed.notify_all()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.wake()
        if self._listener is not None:
            self._listener.stop()
        with self._writing:
            self._writer.drop()
        self._steps.close()
        with self._beating:
            heart, self._heart = self._heart, None
        with self._readers:
            idle, self._idle = self._idle, []
            self._readers.notify_all()
        for db in (heart, *(reader.db for reader in idle)):
            if db is not None:
                db.close()

    # --- connections ---

    def _prepare(self, migrate: str) -> None:
        """See that it is a store of ours, or make it one."""
        with self._read() as db:
            server, now = connections.ask_server(db, self.url)
            self.durability = server.durability
            self._pooled = server.pooled
            self._server_clock.set(now)
            if migrate == "check":
                migrations.check(db, self._schema, self.url)
            elif migrations.missing(migrations.applied(db, self._schema, self.url), self.url):
                made = migrations.migrate(db, self._schema, self.url, self._clock())
                if made:
                    log.info("the store %s has now %s", self.url, ", ".join(one.name for one in made))
        if server.pooled and self._direct is None:
            log.warning(
                "The store %s is reached through a pooler. So there are no notifications and no hint that tells at "
                "once who has died: polling and the lease serve instead. Give direct=, a URL past it, to have both.",
                self.url,
            )

    def _connect_writer(self) -> tuple[psycopg.Connection[Any], bool]:
        return self._connect("writer"), self._pooled

    def _connect_for_step(self, owner: str) -> tuple[psycopg.Connection[Any], bool]:
        """A session as its function would make it, with none of our settings. Its name says whose steps it serves."""
        db = self._address.connect(name=f"step {owner}")
        try:
            connections.ask_server(db, self.url)
        except BaseException:
            db.close()
            raise
        return db, self._pooled

    def _connect(self, name: str) -> psycopg.Connection[Any]:
        """A connection on the way that is always open, checked and set."""
        db = self._address.connect(name=name)
        try:
            # Said in each BEGIN: behind a pooler the server's default would hold.
            db.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
            server, now = connections.ask_server(db, self.url)
            self._pooled = server.pooled
            if self._clock is self._server_clock:
                self._server_clock.set(now)
            if not server.pooled:
                connections.set_session(db, local=False)
                if name in ("reader", "heart"):
                    # What is asked twice is planned once. The writer's statements are prepared by its pipe.
                    db.prepare_threshold = 1
        except BaseException:
            db.close()
            raise
        return db

    def _ask_clock(self) -> None:
        with self._read() as db:
            self._server_clock.set(connections.ask_server(db, self.url)[1])

    def _connect_direct(self) -> psycopg.Connection[Any]:
        return (self._direct or self._address).connect(name="listener")

    @contextmanager
    def _read(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection for reading, of this thread as long as the block lasts."""
        self._check_open()
        with self._readers:
            while self._reading >= READERS:
                self._readers.wait()
            self._reading += 1
            reader = self._idle.pop() if self._idle else None
        try:
            with ours(self.url):
                if reader is None:
                    reader = Reader(self._connect("reader"), Plans())
                elif not self._pooled and reader.plans.are_old():
                    reader.db.execute(DISCARD)
                yield reader.db
        except BaseException:
            if reader is not None:
                reader.db.close()
            reader = None
            raise
        finally:
            with self._readers:
                self._reading -= 1
                if reader is not None and not self._closed:
                    self._idle.append(reader)
                    reader = None
                self._readers.notify()
            if reader is not None:
                reader.db.close()

    @contextmanager
    def _transaction(self) -> Iterator[judging.Ask]:
        """One transaction on a connection of this thread: all of the block, or nothing of it."""
        with self._read() as db, db.transaction():
            if self._pooled:
                connections.set_session(db, local=True)

            def ask(name: str, /, **parameters: Any) -> list[tuple[Any, ...]]:
                cursor = db.execute(self._statements[name].named.encode(), parameters)
                return cursor.fetchall() if cursor.description is not None else [()] * cursor.rowcount

            yield ask

    def _ask(self, name: str, /, **parameters: Any) -> list[tuple[Any, ...]]:
        """The rows of one statement that only reads; asked again if the connection had been cut meanwhile."""
        for last in (False, True):
            try:
                with self._read() as db:
                    return db.execute(self._statements[name].named.encode(), parameters).fetchall()
            except StoreUnavailable:
                if last or self._closed:
                    raise
        raise AssertionError("the last try returns or raises")

    def _on_heart(self, name: str, /, **parameters: Any) -> list[tuple[Any, ...]]:
        for last in (False, True):
            if self._heart is None:
                self._heart = self._connect("heart")
            try:
                return self._heart.execute(self._statements[name].named.encode(), parameters).fetchall()
            except psycopg.OperationalError:
                heart, self._heart = self._heart, None
                heart.close()
                if last:
                    raise
        raise AssertionError("the last try returns or raises")

    def _listen(self) -> None:
        """Begin to listen, where that is possible."""
        with self._readers:
            if self._listener is None and not self._closed and (self._direct is not None or not self._pooled):
                self._listener = Listener(self._connect_direct, self._channel, self._bell, changed=self._stand_for)

    def _backend(self) -> int:
        """The server's process that others may know us by, or 0."""
        listener = self._listener
        backend = listener.backend if listener is not None and self._hints else None
        return backend or 0

    def _stand_for(self) -> None:
        """A new connection, or none, stands for our incarnations: others must hear of it before they miss the old."""
        with self._beating, ours(self.url):
            own = list(self._own)
            if own and not self._closed:
                self._on_heart("stand_for", own=own, backend=self._backend())

    def _ring(self) -> None:
        """Somebody here or elsewhere may wait for what was just written."""
        self._bell.ring()
        if self._listener is not None:
            self._listener.tell()
        elif time.monotonic() - self._told_at > 0.005:
            # A process that waits for nothing has no listener; behind a pooler it has none either.
            self._told_at = time.monotonic()
            try:
                with self._read() as db:
                    db.execute("SELECT pg_notify(%s, '')", [self._channel])
            except StoreError as error:
                log.debug("others were not told: %s", error)

    def forget_connections(self) -> None:
        """In a forked child: what is open is the parent's, not ours, not even to close."""
        held = (self._writer.forget(), self._heart, *(reader.db for reader in self._idle), *self._steps.forget())
        _not_ours.extend(db for db in held if db is not None)
        _not_ours.append(self._listener)
        self._idle, self._reading, self._heart, self._listener = [], 0, None, None
        self._writing, self._beating, self._readers = threading.Lock(), threading.Lock(), threading.Condition()
        for address in (self._address, self._direct):
            if address is not None:
                address.forget()
        self._bell = Bell()
        self._own = {}

    # --- what all of it needs ---

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"The store {self.url} is closed. Nothing was done. Open a new one.", store=self.url)

    def _home(self, *, anew: bool = False) -> tuple[Any, ...]:
        """Which store this is, also where its database has many names, or was copied."""
        if self._known_home is None or anew:
            self._known_home = self._ask("home")[0]
        return self._known_home

    def _due(self, scope: Mapping[str, Any], incarnation: str) -> tuple[int | None, int | None, bool, bool]:
        """When the latest of what is due came due, when the next timer comes; whether mail calls nobody, or us."""
        due, timer, calls, mail_here = self._ask("due", **scope, incarnation=incarnation, now=self._clock())[0]
        return due, timer, calls, mail_here

    def _workflows(self, namespace: str, workflow: str | None) -> list[str]:
        """The names that are looked at: one, or all that have runs."""
        if workflow is not None:
            return [workflow]
        return [name for (name,) in self._ask("workflows", namespace=namespace)]

    # The last one: from here on `list` in an annotation of this class would mean this method.
    def list(self, query: Query) -> list[Row]:
        asked: dict[str, Any] = {
            "namespace": query.namespace,
            "workflows": self._workflows(query.namespace, query.workflow),
            "statuses": STATUSES if query.status is None else [str.__str__(query.status)],
            "below": FOREVER if query.cursor is None else query.cursor,
            "created_after": -1 if query.created_after is None else query.created_after,
            "created_before": FOREVER if query.created_before is None else query.created_before,
            "number": query.limit,
        }
        if query.parent is not None:
            return [_row(row) for row in self._ask("page_of_children", parent=query.parent, **asked)]
        return [_row(row) for row in self._ask("page", **asked)]


class _Heard(NamedTuple):
    """What an incarnation knows since its last wait: both counts of this process."""

    rung: int = 0
    woken: int = 0


_stores: weakref.WeakSet[PostgresStore] = weakref.WeakSet()
_not_ours: list[Any] = []  # what a forked child inherited: closing it would end the parent's sessions


def _after_fork_in_child() -> None:
    for store in list(_stores):
        store.forget_connections()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _row(values: tuple[Any, ...]) -> Row:
    return Row(**dict(zip(_ROW, values, strict=True)))


def _mail(values: tuple[Any, ...]) -> Mail:
    return Mail(**dict(zip(_MAIL, values, strict=True)))


def _scope(
    namespace: str, queues: Sequence[str], workflows: Sequence[str], activities: Sequence[str]
) -> dict[str, Any]:
    """What may be claimed, as the statements take it."""
    return {
        "namespace": namespace,
        "queues": list(queues),
        "names": [*workflows, *activities],
        "kinds": ["workflow"] * len(workflows) + ["activity"] * len(activities),
    }
