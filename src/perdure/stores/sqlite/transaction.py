"""The transaction of a step: a connection of its own inside the gate, fenced first, ended by nobody but us.

It holds the file's single writer, so it has a limit of time; the limit, or whoever gives the step up, rolls it back
from another thread while the function may still run. So the function's connection looks, at each call, whether its
transaction is still there: after a rollback SQLite would begin to commit each statement by itself.

A connection is kept for the next attempt, whose statements it has prepared (a new one costs four ordinary commits),
unless something of the last one is left in it.
"""

from __future__ import annotations

import functools
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from sqlite3 import Connection, Cursor
from typing import Any, Final

from perdure.core.errors import NO_THREAD, RolledBack, StoreError, StoreUnavailable
from perdure.core.turn import Batch, Turn, TurnVerdict, Unstorable
from perdure.stores.sqlite.borrowed import Plain
from perdure.stores.sqlite.errors import ours
from perdure.stores.sqlite.queries import SQL
from perdure.stores.sqlite.writing import Short, Unfit, Writing, insert_events

LIMIT: Final = 5.0
"""Seconds for which a step may hold the file's single writer."""
LOOK: Final = 0.1
"""Seconds between two looks at whether the limit has passed; they end a while after the last transaction."""
IDLE_LOOKS: Final = 50
TRANSACTION: Final = 22  # SQLITE_TRANSACTION, named in `sqlite3` since Python 3.11
PRAGMA: Final = 19  # SQLITE_PRAGMA
# Texts that no function gives: SQLite asks who may end the transaction when it compiles a statement, and a connection
# that is used again keeps those that it has compiled.
BEGIN: Final = "BEGIN IMMEDIATE /* of a step */"
COMMIT: Final = "COMMIT /* with its record */"
ROLLBACK: Final = "ROLLBACK /* of a step */"
OWN_END: Final = (
    "The transaction of a step is committed by Perdure, together with the record that the step was made, or rolled "
    "back when its function raises. {} would part the two. Leave it out; use SAVEPOINT to undo a part."
)


OWN_HOOK: Final = (
    "{} on the connection of a transaction step would take away what keeps the step's transaction and its record "
    "together. Leave it out, or open a connection of your own in an ordinary step."
)
SETTERS: Final = frozenset(
    {
        *("create_function", "create_aggregate", "create_window_function", "create_collation"),
        *("set_trace_callback", "enable_load_extension", "load_extension", "setlimit", "setconfig"),
    }
)
"""What of a connection outlives the step that calls it."""


class Guard:
    """What a connection asks before each call: may its function still work with it?"""

    def __init__(self, url: str) -> None:
        self.url = url
        self.lock = threading.RLock()  # held while a statement runs: nobody rolls back meanwhile
        self.step: StepTransaction | None = None
        self.denied = ""
        self.changed = False  # a function has set something that the next one would find

    @property
    def open(self) -> bool:
        return self.step is not None and self.step.open

    def check(self, db: Connection) -> None:
        step = self.step
        if step is not None and step.thread != threading.get_ident():
            raise RuntimeError(
                "The connection of a transaction step was used in another thread than that of the step's function. "
                "It is open for that function only. Use it there, and do not keep it."
            )
        if step is None or not step.open or not db.in_transaction:
            # SQLite itself may have rolled back: a full disk, a trigger's RAISE(ROLLBACK).
            gone = None if step is None else step.gone
            raise gone or self.over("SQLite rolled it back by itself, or its function has returned")

    def over(self, why: str, seconds: float | None = None) -> RolledBack:
        return RolledBack(
            f"The transaction of this step is over: {why}. Nothing of it was kept. Use the connection inside the "
            "step's function only.",
            seconds=seconds,
            store=self.url,
        )

    # Told by SQLite, when it compiles a statement and while it runs one.

    def may(self, action: int, *facts: Any) -> int:
        if action == TRANSACTION and self.open:
            self.denied = str(facts[0])
            return sqlite3.SQLITE_DENY
        if action == PRAGMA and facts[1] is not None:
            self.changed = True
        return sqlite3.SQLITE_OK

    def goes_on(self) -> int:
        return 0 if self.step is None or self.step.open or self.step.ending else 1


class StepCursor(Cursor):
    """A cursor that works only while the transaction is open."""

    def execute(self, *args: Any) -> StepCursor:
        with self.connection._checked():  # type: ignore[attr-defined]  # it is ours
            super().execute(*args)
        return self

    def executemany(self, *args: Any) -> StepCursor:
        with self.connection._checked():  # type: ignore[attr-defined]  # it is ours
            super().executemany(*args)
        return self

    def executescript(self, *args: Any) -> StepCursor:
        raise RuntimeError(OWN_END.format("executescript(), which commits first,"))

    def __next__(self) -> Any:
        with self.connection._checked():  # type: ignore[attr-defined]  # it is ours
            return super().__next__()

    def fetchone(self) -> Any:
        with self.connection._checked():  # type: ignore[attr-defined]  # it is ours
            return super().fetchone()

    def fetchmany(self, *args: Any, **named: Any) -> list[Any]:
        with self.connection._checked():  # type: ignore[attr-defined]  # it is ours
            return super().fetchmany(*args, **named)

    def fetchall(self) -> list[Any]:
        with self.connection._checked():  # type: ignore[attr-defined]  # it is ours
            return super().fetchall()


class StepConnection(Connection):
    """What the function of a transaction step gets: a `sqlite3.Connection` that does not end its transaction."""

    _guard: Guard

    def cursor(self, factory: Any = StepCursor) -> Any:
        with self._checked():
            return super().cursor(factory)

    # Not inherited: these would make a cursor of another kind.

    def execute(self, *args: Any) -> Any:
        return self.cursor().execute(*args)

    def executemany(self, *args: Any) -> Any:
        return self.cursor().executemany(*args)

    def commit(self) -> None:
        raise RuntimeError(OWN_END.format("commit()"))

    def rollback(self) -> None:
        raise RuntimeError(OWN_END.format("rollback()"))

    def close(self) -> None:
        raise RuntimeError(OWN_END.format("close()"))

    def executescript(self, *args: Any) -> Any:
        raise RuntimeError(OWN_END.format("executescript(), which commits first,"))

    def __enter__(self) -> Any:
        raise RuntimeError(OWN_END.format("`with connection:`, which commits at its end,"))

    def set_authorizer(self, *args: Any, **named: Any) -> None:
        raise RuntimeError(OWN_HOOK.format("set_authorizer()"))

    def set_progress_handler(self, *args: Any, **named: Any) -> None:
        raise RuntimeError(OWN_HOOK.format("set_progress_handler()"))

    def _checked(self) -> _Checked:
        return _Checked(self)


def _noted(name: str) -> Callable[..., Any]:
    """The method of this name, noting that the connection is not as it was."""
    method = getattr(Connection, name)

    @functools.wraps(method)
    def sets(self: StepConnection, *args: Any, **named: Any) -> Any:
        self._guard.changed = True
        return method(self, *args, **named)

    return sets


for _name in SETTERS:
    if hasattr(Connection, _name):  # some came with later versions of Python, or are left out where it is built
        setattr(StepConnection, _name, _noted(_name))


class _Checked:
    """While a statement of the function runs."""

    __slots__ = ("_db",)

    def __init__(self, db: StepConnection) -> None:
        self._db = db

    def __enter__(self) -> None:
        guard = self._db._guard
        guard.lock.acquire()
        try:
            guard.check(self._db)
        except BaseException:
            guard.lock.release()
            raise

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        guard = self._db._guard
        denied, guard.denied = guard.denied, ""
        guard.lock.release()
        if denied and isinstance(error, sqlite3.DatabaseError):
            raise RuntimeError(OWN_END.format(denied)) from error


class StepTransaction:
    """See `contract.OpenTransaction`. `held` closes the gate behind it, `keep` takes the connection back."""

    def __init__(
        self, connection: StepConnection, turn: Turn, held: ExitStack, keep: Callable[[StepConnection], None]
    ) -> None:
        self.connection: Final = connection
        self.until: Final = time.monotonic() + LIMIT
        self.thread: Final = threading.get_ident()
        self.open = True  # its function may work
        self.ending = False  # its record is being written
        self.ended = False
        self.gone: RolledBack | None = None
        self._why: tuple[str, float | None] = ("it was given up", None)
        self._turn = turn
        self._held = held
        self._keep = keep
        self._guard = connection._guard

    def commit(self, events: Sequence[str]) -> None:
        guard = self._guard
        with guard.lock:
            if self.ended or not self.connection.in_transaction:
                self._roll_back("SQLite rolled it back by itself")
                raise self.gone or guard.over("its function has returned")
            self.ended = self.ending = True
            self.open = False
            written = False
            try:
                with ours(guard.url):
                    self._record(events)
                written = True
            finally:
                self._leave(keep=written)

    def roll_back(self) -> None:
        self._roll_back("it was given up")

    def out_of_time(self) -> None:
        """The limit has passed."""
        self._roll_back(f"it held the store's single writer for more than {LIMIT:g} s", seconds=LIMIT)

    def repeats(self, error: BaseException) -> bool:
        return False  # one writer at a time: there is nobody to be serialised with

    def _roll_back(self, why: str, *, seconds: float | None = None) -> None:
        if self.open:
            # Whoever asks first says why: the function that is stopped by it may get the lock before.
            self._why = (why, seconds)
        self.open = False  # a statement that runs now is stopped, and lets go of the lock
        with self._guard.lock:
            if not self.ended:
                self.ended = True
                self.gone = self._guard.over(*self._why)
                self._leave(keep=True)
            elif self._guard.step is self and threading.get_ident() == self.thread:
                self._guard.step = None
                Connection.close(self.connection)

    def _record(self, events: Sequence[str]) -> None:
        db = Plain(self.connection)
        turn = self._turn
        size = sum(len(event.encode()) for event in events)
        written = db.execute(SQL["add_to_history"], (len(events), size, turn.run, turn.id, turn.first_seq - 1))
        if written.rowcount != 1:
            raise StoreError(
                f"The row of the run was changed inside its own step, in {self._guard.url}. Nothing of the step was "
                "kept. Leave the tables that begin with perdure_ alone.",
                store=self._guard.url,
            )
        values: list[Any] = []
        for seq, event in enumerate(events, start=turn.first_seq):
            values += (turn.run, seq, event)
        insert_events.run(db, values)
        db.execute(COMMIT)

    def _leave(self, *, keep: bool) -> None:
        """Roll back what is not committed, give the connection back or close it, and let the next writer in."""
        db = self.connection
        try:
            if db.in_transaction:
                Plain(db).execute(ROLLBACK)
            if threading.get_ident() != self.thread:
                # The function may still use it: whatever it finds to write with, nothing is written. It is closed
                # when the function has returned.
                Plain(db).execute("PRAGMA query_only = ON")
                return
            self._guard.step = None
            if keep and _is_clean(db):
                self._keep(db)
                return
        except sqlite3.Error:
            pass  # closing it rolls back
        finally:
            self._held.close()
        self._guard.step = None
        Connection.close(db)


def _is_clean(db: StepConnection) -> bool:
    """Whether the next function finds the connection as this one did."""
    if db._guard.changed or getattr(db, "autocommit", -1) != -1:  # of Python 3.12 and later; -1 is how it was made
        return False
    db.row_factory = None
    db.text_factory = str
    db.isolation_level = None
    return Plain(db).execute("SELECT 1 FROM sqlite_temp_master LIMIT 1").fetchone() is None


class Steps:
    """The transactions of one store's steps, one at a time: so the committer waits for one of them, not for a crowd.

    connect: a new connection made by a factory. gate: the way of every writer. clock: of the store.
    """

    def __init__(
        self,
        url: str,
        *,
        connect: Callable[[type[StepConnection]], StepConnection],
        gate: Callable[[], AbstractContextManager[None]],
        clock: Callable[[], int],
    ) -> None:
        self._url = url
        self._connect = connect
        self._gate = gate
        self._clock = clock
        self._turnstile = threading.Lock()
        self._idle: StepConnection | None = None  # touched inside the gate only
        self._open: StepTransaction | None = None
        self._watch = threading.Lock()
        self._watched = False
        self.over = False  # nothing is kept any more

    def begin(self, turn: Turn) -> StepTransaction | TurnVerdict:
        """Open one, fenced by this turn; or the verdict, if the fence does not hold or the turn is written."""
        with ExitStack() as held:
            self._turnstile.acquire()
            held.callback(self._turnstile.release)
            held.enter_context(self._gate())
            with ours(self._url):
                opened = self._fenced(turn, held)
            if isinstance(opened, StepTransaction):
                self._open = opened
                try:
                    if not self._watched:
                        self._keep_watch()
                except NO_THREAD as error:
                    # Without its limit it must not hold the only writer.
                    opened.roll_back()
                    raise StoreUnavailable(
                        f"A step's transaction was not begun: there is no thread to mind its limit of time ({error}). "
                        "It is tried again.",
                        store=self._url,
                    ) from error
            return opened

    @property
    def patience(self) -> float:
        """Seconds that a writer of this process waits longer, because a step has the gate."""
        return LIMIT if self._open is not None and not self._open.ended else 0.0

    @property
    def in_use(self) -> bool:
        """Whether there is a connection to be closed."""
        return self._idle is not None or (self._open is not None and not self._open.ended)

    def release(self) -> Connection | None:
        """Let go of the connection that is kept; the caller keeps other threads from writing."""
        idle, self._idle = self._idle, None
        return idle

    def close(self) -> None:
        """Close the connection that is kept."""
        idle = self.release()
        if idle is not None:
            Connection.close(idle)

    def forget(self) -> Connection | None:
        """In a forked child: the parent's transactions, threads and connection are not ours."""
        self._turnstile, self._watch = threading.Lock(), threading.Lock()
        self._open, self._watched = None, False
        return self.release()

    def _fenced(self, turn: Turn, held: ExitStack) -> StepTransaction | TurnVerdict:
        db, self._idle = self._idle, None
        if db is None:
            db = self._connect(StepConnection)
            guard = db._guard = Guard(self._url)
            Connection.set_authorizer(db, guard.may)
            Connection.set_progress_handler(db, guard.goes_on, 10_000)
        try:
            plain = Plain(db)
            plain.execute(BEGIN)
            writing = Writing(plain, self._clock())
            try:
                writing.write(Batch(turns=[turn]))
            except Short:
                verdict = writing.verdict(turn)
                if verdict is None:
                    raise StoreError(
                        f"The store {self._url} wrote less than it had found possible. Nothing was written. "
                        "Report it to us.",
                        store=self._url,
                    ) from None
            except Unfit as unfit:
                verdict = Unstorable(run=turn.run, reason=str(unfit))
            else:
                step = db._guard.step = StepTransaction(db, turn, held.pop_all(), self._take_back)
                return step
            plain.execute(ROLLBACK)
            self._idle = db
            return verdict
        except BaseException:
            Connection.close(db)
            raise

    def _take_back(self, db: StepConnection) -> None:
        if self.over:
            Connection.close(db)
        else:
            self._idle = db

    def _keep_watch(self) -> None:
        with self._watch:
            if not self._watched:
                threading.Thread(target=self._mind_the_limit, name="perdure-step-limit", daemon=True).start()
                self._watched = True

    def _mind_the_limit(self) -> None:
        idle = 0
        while True:
            time.sleep(LOOK)
            there = self._open
            if there is not None and not there.ended:
                idle = 0
                if time.monotonic() >= there.until:
                    there.out_of_time()
                continue
            idle += 1
            if idle > IDLE_LOOKS:
                with self._watch:
                    if self._open is there:
                        self._open, self._watched = None, False
                        return
