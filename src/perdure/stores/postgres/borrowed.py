"""A connection that is not our own: the caller's, with a transaction open, in which starts and sends are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import psycopg
from psycopg import pq
from psycopg.rows import tuple_row

from perdure.stores.postgres.batch import Call
from perdure.stores.postgres.pipe import execute
from perdure.stores.postgres.queries import Statement, in_schema

SAVEPOINT: Final = b"SAVEPOINT perdure_batch"
UNDO: Final = b"ROLLBACK TO SAVEPOINT perdure_batch"
RELEASE: Final = b"RELEASE SAVEPOINT perdure_batch"


class Borrowed:
    """Writes as `writer.Writer` does, inside a transaction that somebody else commits or rolls back."""

    own: Final = False
    """What the server gives up here, only the caller can try again."""

    def __init__(self, db: psycopg.Connection[Any]) -> None:
        self._db = db
        self._answers: list[Any] = []

    def begin(self, calls: Sequence[Call]) -> None:
        with self.savepoint(), self._db.lock:
            self._answers = [execute(self._db.pgconn, call) for call in calls]

    def finish(self) -> list[Any]:
        return self._answers

    def probe(self, calls: Sequence[Call]) -> None:
        with self.savepoint(keep=False), self._db.lock:
            for call in calls:
                execute(self._db.pgconn, call)

    def ask(self, statement: Statement, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        with self._db.cursor(row_factory=tuple_row) as cursor:
            return cursor.execute(statement.named.encode(), parameters).fetchall()

    def drop(self) -> None:
        """It is not ours to close."""

    @contextmanager
    def savepoint(self, *, keep: bool = True) -> Iterator[None]:
        """What fails inside leaves nothing in the transaction, and the transaction alive."""
        db = self._db
        db.execute(SAVEPOINT)
        try:
            yield
        except BaseException:
            if db.pgconn.status == pq.ConnStatus.OK:
                db.execute(UNDO)
                db.execute(RELEASE)
            raise
        if not keep:
            db.execute(UNDO)
        db.execute(RELEASE)


def check(connection: Any, schema: str, home: Statement, ours: Callable[..., tuple[Any, ...]], url: str) -> None:
    """Refuse a connection in whose transaction nothing can be written to this store.

    home: asks which store it is. ours: the answer of the store's own connections; `anew`, if the server has restarted.
    """
    if not isinstance(connection, psycopg.Connection):
        raise TypeError(
            f"connection= got {connection!r}, and the store {url} is a PostgreSQL database. Its own transactions "
            "belong to a psycopg.Connection. Pass the connection whose transaction this shall be part of."
        )
    if connection.closed:
        raise ValueError(
            "connection= is closed, or its server has ended it. It has no transaction to write in. Open another."
        )
    if connection.autocommit and connection.info.transaction_status == pq.TransactionStatus.IDLE:
        raise ValueError(
            "connection= has no open transaction, and commits each statement by itself. What is written could not be "
            "rolled back with anything. Begin one first: `with connection.transaction():`."
        )
    if connection.pgconn.pipeline_status != pq.PipelineStatus.OFF:
        raise ValueError(
            "connection= is in a pipeline, where nobody waits for answers. What is written here must be answered. "
            "Leave the pipeline first."
        )
    if connection.info.encoding != "utf-8":
        raise ValueError(
            f"connection= speaks {connection.info.encoding}, and Perdure's texts are UTF-8. "
            "Set client_encoding to UTF8."
        )
    with connection.cursor(row_factory=tuple_row) as cursor:
        there = cursor.execute("SELECT to_regclass(%s) IS NOT NULL", [in_schema("perdure.store", schema)]).fetchone()
        found = cursor.execute(home.named.encode()).fetchone() if there and there[0] else None
    if found != ours() and found != ours(anew=True):
        raise ValueError(
            f"connection= is open on database {connection.info.dbname!r}, which is not the store {url}. Only a "
            "transaction of the store's own database can hold both. Open the connection on the store's database."
        )
