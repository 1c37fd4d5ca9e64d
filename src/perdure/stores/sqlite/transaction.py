"""The transaction of a step: a connection of its own inside the gate, fenced first, ended by nobody but us.

It holds the file's single writer, so it has a limit of time; the limit, or whoever gives the step up, rolls it back
from another thread while the function may still run. So the function's connection looks, at each call, whether its
transaction is still there: after a rollback SQLite would begin to commit each statement by itself.

The connection is new for each attempt: what a function does to it, or keeps of it, reaches no other.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from sqlite3 import Connection, Cursor
from typing import Any, Final

from perdure.core.errors import RolledBack, StoreError
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
OWN_END: Final = (
    "The transaction of a step is committed by Perdure, together with the record that the step was made, or rolled "
    "back when its function raises. {} would part the two. Leave it out; use SAVEPOINT to undo a part."
)


class Guard:
    """What a connection asks before each call: is its transaction still open?"""

    def __init__(self, url: str) -> None:
        self.url = url
        self.lock = threading.RLock()  # held while a statement runs: nobody rolls back meanwhile
        self.open = False
        self.gone: RolledBack | None = None

    def check(self, db: Connection) -> None:
        if not self.open or not db.in_transaction:
            # SQLite itself may have rolled back: a full disk, a trigger's RAISE(ROLLBACK).
            raise self.gone or self.over("SQLite rolled it back by itself, or it had ended before")

    def over(self, why: str, seconds: float | None = None) -> RolledBack:
        return RolledBack(
            f"The transaction of this step is over: {why}. Nothing of it was kept. Use the connection inside the "
            "step's function only.",
            seconds=seconds,
            store=self.url,
        )


class StepCursor(Cursor):
    """A cursor that works only while the transaction is open."""

    def execute(self, *args: Any) -> StepCursor:
        with self.connection._checked():  # type: ignore[attr-defined]  # it is ours
            super().execute(*args)
        return self

    def executemany(self, *args: Any) -> StepCursor:
        with self.connection._checked():  # type: ignore[attr-defined]
            super().executemany(*args)
        return self

    def executescript(self, *args: Any) -> StepCursor:
        raise RuntimeError(OWN_END.format("executescript(), which commits first,"))

    def __next__(self) -> Any:
        with self.connection._checked():  # type: ignore[attr-defined]
            return super().__next__()

    def fetchone(self) -> Any:
        with self.connection._checked():  # type: ignore[attr-defined]
            return super().fetchone()

    def fetchmany(self, *args: Any, **named: Any) -> list[Any]:
        with self.connection._checked():  # type: ignore[attr-defined]
            return super().fetchmany(*args, **named)

    def fetchall(self) -> list[Any]:
        with self.connection._checked():  # type: ignore[attr-defined]
            return super().fetchall()


class StepConnection(Connection):
    """What the function of a transaction step gets: a `sqlite3.Connection` that does not end its transaction."""

    _guard: Guard

    def cursor(self, factory: Any = StepCursor) -> Any:
        with self._checked():
            return super().cursor(factory)

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

    def _checked(self) -> _Checked:
        return _Checked(self)


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

    def __exit__(self, *error: object) -> None:
        self._db._guard.lock.release()


class StepTransaction:
    """See `contract.OpenTransaction`. `held` closes the gate behind it."""

    connection: StepConnection

    def __init__(self, connection: StepConnection, turn: Turn, held: ExitStack, url: str) -> None:
        self.connection = connection
        self.until = time.monotonic() + LIMIT
        self._turn = turn
        self._held = held
        self._url = url
        self._guard = connection._guard
        self._ended = False
        self._thread = threading.get_ident()

    @property
    def gone(self) -> RolledBack | None:
        return self._guard.gone

    def commit(self, events: Sequence[str]) -> None:
        guard = self._guard
        with guard.lock:
            if self._ended or not self.connection.in_transaction:
                self._roll_back("SQLite rolled it back by itself")
                raise guard.gone or guard.over("it has ended")
            self._ended = True
            guard.open = False
            self.connection.set_progress_handler(None, 0)
            try:
                with ours(self._url):
                    self._record(events)
            finally:
                self._leave()

    def roll_back(self) -> None:
        self._roll_back("it was given up")

    def out_of_time(self) -> None:
        """The limit has passed."""
        self._roll_back(f"it held the store's single writer for more than {LIMIT:g} s", seconds=LIMIT)

    def repeats(self, error: BaseException) -> bool:
        return False  # one writer at a time: there is nobody to be serialised with

    def _roll_back(self, why: str, *, seconds: float | None = None) -> None:
        guard = self._guard
        guard.open = False  # a statement that runs now is stopped, and lets go of the lock
        with guard.lock:
            if not self._ended:
                self._ended = True
                guard.gone = guard.over(why, seconds)
                self._leave()
            elif threading.get_ident() == self._thread:
                Connection.close(self.connection)

    def _record(self, events: Sequence[str]) -> None:
        db = Plain(self.connection)
        turn = self._turn
        size = sum(len(event.encode()) for event in events)
        written = db.execute(SQL["add_to_history"], (len(events), size, turn.run, turn.id, turn.first_seq - 1))
        if written.rowcount != 1:
            raise StoreError(
                f"The row of the run was changed inside its own step, in {self._url}. Nothing of the step was kept. "
                "Leave the tables that begin with perdure_ alone.",
                store=self._url,
            )
        values: list[Any] = []
        for seq, event in enumerate(events, start=turn.first_seq):
            values += (turn.run, seq, event)
        insert_events.run(db, values)
        db.execute("COMMIT")

    def _leave(self) -> None:
        """Roll back what is not committed, and let the next writer in."""
        db = self.connection
        try:
            if db.in_transaction:
                Plain(db).execute("ROLLBACK")
            if threading.get_ident() != self._thread:
                # The function may still use it: whatever it finds to write with, nothing is written.
                Plain(db).execute("PRAGMA query_only = ON")
                return
        except sqlite3.Error:
            pass  # closing it rolls back
        finally:
            self._held.close()
        Connection.close(db)


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
        self._open: StepTransaction | None = None
        self._watch = threading.Lock()
        self._watched = False

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
                self._keep_watch()
            return opened

    def forget(self) -> None:
        """In a forked child: the parent's transactions and threads are not ours."""
        self._turnstile, self._watch = threading.Lock(), threading.Lock()
        self._open, self._watched = None, False

    def _fenced(self, turn: Turn, held: ExitStack) -> StepTransaction | TurnVerdict:
        db = self._connect(StepConnection)
        guard = db._guard = Guard(self._url)
        try:
            plain = Plain(db)
            plain.execute("BEGIN IMMEDIATE")
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
                Connection.close(db)
                return verdict
            except Unfit as unfit:
                Connection.close(db)
                return Unstorable(run=turn.run, reason=str(unfit))
        except BaseException:
            Connection.close(db)
            raise
        guard.open = True
        db.set_authorizer(lambda action, *rest: sqlite3.SQLITE_DENY if guard.open and action == TRANSACTION else 0)
        db.set_progress_handler(lambda: 0 if guard.open else 1, 10_000)
        return StepTransaction(db, turn, held.pop_all(), self._url)

    def _keep_watch(self) -> None:
        with self._watch:
            if not self._watched:
                self._watched = True
                threading.Thread(target=self._mind_the_limit, name="perdure-step-limit", daemon=True).start()

    def _mind_the_limit(self) -> None:
        idle = 0
        while True:
            time.sleep(LOOK)
            there = self._open
            if there is not None and not there._ended:
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
