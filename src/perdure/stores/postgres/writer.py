"""The one writing connection of a process: batches are sent on it, one transaction each.

`begin` sends everything and does not wait; `finish` waits for the answers. Between the two the caller may do other
work, and look at `fileno` for when there is something to collect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import psycopg

from perdure.stores.postgres.batch import Call
from perdure.stores.postgres.connections import settings_text
from perdure.stores.postgres.held import WAIT
from perdure.stores.postgres.pipe import Pipe
from perdure.stores.postgres.queries import Statement

BEGIN: Final = b"BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"


class Writer:
    """See the module. connect: makes a connection and says whether it is pooled."""

    own: Final = True
    """Its transactions may be tried again."""

    def __init__(self, connect: Callable[[], tuple[psycopg.Connection[Any], bool]]) -> None:
        self._connect = connect
        self._db: psycopg.Connection[Any] | None = None
        self._pipe: Pipe | None = None
        self._first: list[bytes] = [BEGIN]

    def begin(self, calls: Sequence[Call], *, end: bytes = b"COMMIT") -> None:
        """Send one transaction. An error means that nothing arrived, or that nobody knows."""
        try:
            self._opened().send(self._first, calls, [end])
        except BaseException:
            # Also for want of memory: what was sent of it must not be taken for a part of the next.
            self.drop()
            raise

    def finish(self) -> list[Any]:
        """The answers to the calls, once the transaction is committed; or the error that ended it."""
        if self._pipe is None:
            raise psycopg.OperationalError("the connection was lost")
        return self._pipe.collect()

    def connected(self) -> bool:
        """Whether `begin` needs no new connection."""
        return self._pipe is not None

    def arrived(self) -> bool:
        """Whether `finish` would not wait for the server."""
        return self._pipe is None or self._pipe.arrived()

    @property
    def unsent(self) -> bool:
        """Whether `arrived` is to be asked also when the socket can be written to."""
        return self._pipe is not None and self._pipe.unsent

    @property
    def failed(self) -> bool:
        """Whether `finish` will raise, and may have to clean up first."""
        return self._pipe is None or self._pipe.failed is not None

    def probe(self, calls: Sequence[Call]) -> None:
        """Do it and undo it: raises what the server has against it."""
        self.begin(calls, end=b"ROLLBACK")
        self.finish()

    def ask(self, statement: Statement, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The rows of one statement, outside any transaction."""
        self._opened()
        assert self._db is not None
        return self._db.execute(statement.named.encode(), parameters).fetchall()

    def fileno(self) -> int:
        """The socket that has something to read when there is something to collect."""
        return self._opened().connection.socket

    def drop(self) -> None:
        """Close the connection; the next use makes a new one. Twice is once."""
        db, self._db, self._pipe = self._db, None, None
        if db is not None:
            db.close()

    def forget(self) -> psycopg.Connection[Any] | None:
        """In a forked child: let go of the parent's connection without touching it."""
        db, self._db, self._pipe = self._db, None, None
        return db

    def _opened(self) -> Pipe:
        if self._pipe is None:
            self._db, pooled = self._connect()
            settings = settings_text(local=pooled, lock_timeout=f"{WAIT * 1000:.0f}ms").encode()
            if not pooled:
                self._db.execute(settings)
            self._pipe = Pipe(self._db.pgconn, keeps_statements=not pooled)
            # Behind a pooler a session is set for one transaction only.
            self._first = [BEGIN, settings] if pooled else [BEGIN]
        return self._pipe
