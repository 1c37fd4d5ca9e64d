"""The transaction of a step: a session of its own, fenced first, ended by nobody but us.

The database itself keeps others from committing it: the fence leaves a pledge, under a constraint that is looked at
when the transaction ends, and only our record of the step takes the pledge away. The function's connection is a new
object each time, over a session that is used again; when the step is over, the object does nothing any more.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import psycopg
from psycopg import pq, sql

from perdure.core.errors import RolledBack
from perdure.core.turn import Turn, TurnVerdict, Unstorable
from perdure.stores.postgres import judging
from perdure.stores.postgres.batch import TURN, Call, turn_row
from perdure.stores.postgres.errors import PACKING_ERRORS, RETRIED, lost, ours, translate, unfit
from perdure.stores.postgres.packing import PACK
from perdure.stores.postgres.pipe import Pipe
from perdure.stores.postgres.queries import Statement
from perdure.stores.postgres.writer import BEGIN

MOST: Final = 4
"""Transactions of steps that one process has open at once, and so connections; others wait."""
TRIES: Final = 5
CLEAN: Final = (
    b"CLOSE ALL",
    b"SET SESSION AUTHORIZATION DEFAULT",
    b"RESET ALL",
    b"UNLISTEN *",
    b"SELECT pg_advisory_unlock_all()",
    b"DISCARD TEMP",
    b"DISCARD SEQUENCES",
)
"""DISCARD ALL, but for the statements that we have prepared."""
OWN_END: Final = (
    "The transaction of a step is committed by Perdure, together with the record that the step was made, or rolled "
    "back when its function raises. {} would part the two. Leave it out; use `with connection.transaction():` to undo "
    "a part."
)


_QUOTED: Final = re.compile(
    r"""'(?:[^']|'')*' | "[^"]*" | \$(\w*)\$.*?\$\1\$ | --[^\n]* | /\*.*?\*/""", re.DOTALL | re.VERBOSE
)
_ENDS: Final = re.compile(
    r"""(?:^|;)\s*(
        commit | end | abort | begin | start\s+transaction | prepare\s+transaction
        | rollback (?! \s+ (?:(?:work|transaction)\s+)? to\b )
    )\b""",
    re.IGNORECASE | re.VERBOSE,
)


def ending(text: str) -> str | None:
    """The words in this SQL by which a transaction would be ended or begun, if there are any: also behind a `;`."""
    found = _ENDS.search(_QUOTED.sub(" ", text))
    return found[1].upper() if found else None


class StepCursor(psycopg.Cursor[Any]):
    """A cursor that refuses what would end the transaction."""

    def execute(self, query: Any, *args: Any, **named: Any) -> Any:
        self._look(query)
        return super().execute(query, *args, **named)

    def executemany(self, query: Any, *args: Any, **named: Any) -> Any:
        self._look(query)
        return super().executemany(query, *args, **named)

    def stream(self, query: Any, *args: Any, **named: Any) -> Any:
        self._look(query)
        return super().stream(query, *args, **named)

    def _look(self, query: Any) -> None:
        text = query.as_string(self) if isinstance(query, sql.Composable) else query
        words = ending(text.decode(errors="replace") if isinstance(text, bytes) else str(text))
        if words is not None:
            raise RuntimeError(OWN_END.format(words))


class StepConnection(psycopg.Connection[Any]):
    """What the function of a transaction step gets: a `psycopg.Connection` that does not end its transaction."""

    _pool = None  # the session is given back, not closed, when this object goes
    _over: RolledBack | None = None
    _parted: RolledBack

    def wait(self, *args: Any, **named: Any) -> Any:
        """Every call of the connection and its cursors comes through here."""
        if self._over is not None:
            raise self._over
        try:
            return super().wait(*args, **named)
        finally:
            self._look()

    def _look(self) -> None:
        """However a function has ended its transaction: what it does from then on would have no record."""
        if self._over is None and self.pgconn.transaction_status == pq.TransactionStatus.IDLE:
            self._over = self._parted

    def commit(self) -> None:
        raise RuntimeError(OWN_END.format("commit()"))

    def rollback(self) -> None:
        raise RuntimeError(OWN_END.format("rollback()"))

    def close(self) -> None:
        raise RuntimeError(OWN_END.format("close()"))

    def __enter__(self) -> Any:
        raise RuntimeError(OWN_END.format("`with connection:`, which commits at its end,"))


class Session:
    """A connection of the server that steps use one after the other."""

    def __init__(self, db: psycopg.Connection[Any], owner: str, *, pooled: bool) -> None:
        self.db: Final = db
        self.owner: Final = owner
        self.pipe: Final = Pipe(db.pgconn, keeps_statements=not pooled)
        self._cleaning = False

    def clean(self) -> None:
        """Have the server forget what a function has set up; `ready` waits for it, before the next step."""
        self.pipe.send(CLEAN, ())
        self._cleaning = True

    def ready(self) -> None:
        """Whoever uses it next finds it clean."""
        if self._cleaning:
            self._cleaning = False
            self.pipe.collect()


class StepTransaction:
    """See `contract.OpenTransaction`."""

    connection: StepConnection

    def __init__(self, steps: Steps, session: Session, turn: Turn) -> None:
        self.connection = StepConnection(session.db.pgconn)
        self.connection.prepare_threshold = None  # its names would meet those of the step before
        self.connection.cursor_factory = StepCursor
        self.connection._parted = steps.over("its function ended it")
        self._steps = steps
        self._session = session
        self._turn = turn
        self._thread = threading.get_ident()
        self._ended = False

    @property
    def gone(self) -> RolledBack | None:
        return self.connection._over

    def commit(self, events: Sequence[str]) -> None:
        connection, session, url = self.connection, self._session, self._steps.url
        with connection.lock:
            if self._ended:
                raise connection._over or self._steps.over("it has ended")
            if connection.pgconn.transaction_status not in (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR):
                self._end(self._steps.over("it had been ended by its function, or the connection was lost"), keep=False)
                assert connection._over is not None
                raise connection._over
            turn = self._turn
            record = self._steps.call(
                "record_step",
                count=len(events),
                bytes=sum(len(event.encode()) for event in events),
                run=turn.run,
                turn=turn.id,
                follows=turn.first_seq - 1,
                events=list(events),
            )
            # Its function may have left another, in which the record would be read as something else.
            first = [] if session.db.info.encoding == "utf-8" else [b"SET LOCAL client_encoding TO 'UTF8'"]
            try:
                session.pipe.send(first, [record], [b"COMMIT"])
                session.pipe.collect()
            except psycopg.Error as error:
                gone = lost(error)
                self._end(self._steps.over("it could not be committed"), keep=False)
                if gone:
                    raise translate(error, url) from error
                if isinstance(error, psycopg.errors.DivisionByZero):
                    raise connection._parted from None
                raise
            self._end(self._steps.over("it is committed"), keep=True)

    def roll_back(self) -> None:
        connection = self.connection
        if self._ended:
            return
        over = self._steps.over("it was given up")
        if threading.get_ident() != self._thread:
            # A statement that runs now is stopped, and lets go of the lock.
            connection._over = over
            try:
                self._session.db.cancel_safe(timeout=2)
            except psycopg.Error:
                pass  # what it waits for ends with the session at the latest
        with connection.lock:
            if not self._ended:
                self._end(over, keep=False)

    def repeats(self, error: BaseException) -> bool:
        return isinstance(error, psycopg.Error) and error.sqlstate in RETRIED

    def _end(self, over: RolledBack, *, keep: bool) -> None:
        self._ended = True
        self.connection._over = over
        self._steps.give_back(self._session, keep=keep)


class Steps:
    """The transactions of one store's steps.

    connect: a new connection for the steps of an owner, and whether it is pooled. clock: of the store.
    """

    def __init__(
        self,
        url: str,
        *,
        connect: Callable[[str], tuple[psycopg.Connection[Any], bool]],
        statements: Mapping[str, Statement],
        clock: Callable[[], int],
    ) -> None:
        self.url: Final = url
        self._connect = connect
        self._statements = statements
        self._clock = clock
        self._lock = threading.Lock()
        self._room = threading.Semaphore(MOST)
        self._idle: list[Session] = []
        self._closed = False

    def begin(self, turn: Turn) -> StepTransaction | TurnVerdict:
        """Open one, fenced by this turn; or the verdict, if the fence does not hold or the turn is written."""
        self._room.acquire()
        try:
            with ours(self.url):
                opened = self._begin(turn)
        except BaseException:
            self._room.release()
            raise
        if not isinstance(opened, StepTransaction):
            self._room.release()
        return opened

    def _begin(self, turn: Turn) -> StepTransaction | TurnVerdict:
        tries = 0
        while True:
            session = self._take(turn.owner or "")
            try:
                return self._fenced(session, turn)
            except PACKING_ERRORS as error:
                self._put(session)
                return Unstorable(run=turn.run, reason=str(error))
            except psycopg.Error as error:
                session.db.close()
                tries += 1
                if unfit(error):
                    return Unstorable(run=turn.run, reason=str(error))
                if tries >= TRIES or not (lost(error) or error.sqlstate in RETRIED):
                    raise
                time.sleep(0.01 * 2**tries)

    def _fenced(self, session: Session, turn: Turn) -> StepTransaction | TurnVerdict:
        fence = self.call("fence_step", now=self._clock(), **dict(zip(TURN, turn_row(turn, 0), strict=True)))
        session.ready()
        session.pipe.send([BEGIN], [fence])
        [answer] = session.pipe.collect()
        if answer.ntuples:
            return StepTransaction(self, session, turn)
        session.pipe.connection.exec_(b"ROLLBACK")

        def ask(name: str, /, **parameters: Any) -> list[tuple[Any, ...]]:
            return session.db.execute(self._statements[name].named.encode(), parameters).fetchall()

        [verdict] = judging.judge_turns(ask, [turn])
        self._put(session)
        return verdict

    def call(self, name: str, /, **values: Any) -> Call:
        statement = self._statements[name]
        return Call(
            statement,
            [
                None if values[name] is None else PACK[type](values[name])
                for name, type in zip(statement.parameters, statement.types, strict=True)
            ],
        )

    def over(self, why: str) -> RolledBack:
        return RolledBack(
            f"The transaction of this step is over: {why}. Use the connection inside the step's function only.",
            store=self.url,
        )

    def give_back(self, session: Session, *, keep: bool) -> None:
        """A transaction has ended; one that was not committed takes its session with it."""
        try:
            if keep:
                session.clean()
        except psycopg.Error:
            keep = False
        if keep:
            self._put(session)
        else:
            session.db.close()
        self._room.release()

    def close(self) -> None:
        """Close what is idle."""
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for session in idle:
            session.db.close()

    def forget(self) -> list[psycopg.Connection[Any]]:
        """In a forked child: let go of the parent's sessions without touching them."""
        held = [session.db for session in self._idle]
        self._lock, self._room, self._idle = threading.Lock(), threading.Semaphore(MOST), []
        return held

    def _take(self, owner: str) -> Session:
        old = None
        with self._lock:
            if self._idle:
                old = self._idle.pop()
        if old is not None and old.owner == owner:
            return old
        if old is not None:
            # Of an incarnation before: whoever ends that one's sessions would end this step.
            old.db.close()
        db, pooled = self._connect(owner)
        return Session(db, owner, pooled=pooled)

    def _put(self, session: Session) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(session)
                return
        session.db.close()
