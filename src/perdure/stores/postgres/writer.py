"""Sends a batch in one pipeline and collects its answers: the one writing connection of a process.

`begin` sends everything and does not wait; `finish` waits for the answers. Between the two the caller may do other
work, and look at `fileno` for when there is something to collect. The driver's own pipeline would make an object for
each statement and wait at its end; here libpq is called as it is.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Mapping
from typing import Any, Final

import psycopg
from psycopg import pq

from perdure.stores.postgres.batch import Call
from perdure.stores.postgres.connections import settings_text
from perdure.stores.postgres.packing import OIDS
from perdure.stores.postgres.queries import Statement

BEGIN: Final = b"BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE"
_TEXT, _BINARY = 0, 1
_GOOD: Final = frozenset({pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK})
_WAIT: Final = 90.0
"""Seconds without an answer after which a connection is given up. The server's own timeouts come first."""


class Writer:
    """See the module. connect: makes a connection and says whether it is pooled."""

    def __init__(self, connect: Callable[[], tuple[psycopg.Connection[Any], bool]]) -> None:
        self._connect = connect
        self._db: psycopg.Connection[Any] | None = None
        self._pooled = False
        self._prepared: set[str] = set()
        self._expected: list[bool] = []  # for each command that was sent: whether its answer is one of a call

    # --- a batch

    def probe(self, calls: list[Call]) -> None:
        """Do it and undo it: raises what the server has against it."""
        self.begin(calls, end=b"ROLLBACK")
        self.finish()

    def begin(self, calls: list[Call], *, end: bytes = b"COMMIT") -> None:
        """Send one transaction. An error means that nothing arrived, or that nobody knows."""
        db = self.opened()
        connection = db.pgconn
        expected = self._expected = [False]
        connection.enter_pipeline_mode()
        try:
            connection.send_query_params(BEGIN, None)
            if self._pooled:
                connection.send_query_params(settings_text(local=True).encode(), None)
                expected.append(False)
            for call in calls:
                self._send(connection, call, expected)
            connection.send_query_params(end, None)
            expected.append(False)
            connection.pipeline_sync()
            connection.flush()
        except psycopg.Error:
            self.drop()
            raise

    def _send(self, connection: pq.abc.PGconn, call: Call, expected: list[bool]) -> None:
        statement = call.statement
        formats = [_BINARY] * len(call.values)
        # Results in binary too, but for the two lists of keys, which are texts either way.
        if self._pooled:
            # The next transaction may be another session's: a statement without a name is all there is.
            oids = [OIDS[type] for type in statement.types]
            connection.send_query_params(statement.text.encode(), call.values, oids, formats, _BINARY)
        else:
            name = statement.name.encode()
            if statement.name not in self._prepared:
                connection.send_prepare(name, statement.text.encode(), [OIDS[type] for type in statement.types])
                expected.append(False)
                # Should the transaction fail, the statement stays: it belongs to the session.
                self._prepared.add(statement.name)
            connection.send_query_prepared(name, call.values, formats, _BINARY)
        expected.append(True)

    def finish(self) -> list[pq.abc.PGresult]:
        """The answers to the calls, once the transaction is committed; or the error that ended it."""
        db = self.opened()
        connection = db.pgconn
        try:
            answers, failed = self._collect(connection)
            connection.exit_pipeline_mode()
        except psycopg.Error:
            self.drop()
            raise
        if failed is not None:
            error = psycopg.errors.error_from_result(failed, encoding="utf-8")
            self.recover()
            raise error
        return answers

    def _collect(self, connection: pq.abc.PGconn) -> tuple[list[pq.abc.PGresult], pq.abc.PGresult | None]:
        answers: list[pq.abc.PGresult] = []
        failed: pq.abc.PGresult | None = None
        number = 0
        while True:
            while connection.is_busy():
                self._wait(connection)
            result = connection.get_result()
            if result is None:
                if connection.status == pq.ConnStatus.BAD:
                    raise psycopg.OperationalError("the connection was lost")
                continue
            status = result.status
            if status == pq.ExecStatus.PIPELINE_SYNC:
                return answers, failed
            if status in _GOOD:
                if self._expected[number]:
                    answers.append(result)
            elif failed is None:
                failed = result
                if connection.status == pq.ConnStatus.BAD:
                    raise psycopg.errors.error_from_result(failed, encoding="utf-8")
            number += 1

    @staticmethod
    def _wait(connection: pq.abc.PGconn) -> None:
        poll = select.poll()
        unsent = connection.flush()
        poll.register(connection.socket, select.POLLIN | (select.POLLOUT if unsent else 0))
        if not poll.poll(_WAIT * 1000):
            raise psycopg.OperationalError(f"no answer from the server for {_WAIT:g} s")
        connection.consume_input()

    def fileno(self) -> int:
        """The socket that has something to read when there is something to collect."""
        return self.opened().pgconn.socket

    # --- whatever else is asked on this connection

    def ask(self, statement: Statement, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """The rows of one statement, outside any transaction."""
        return self.opened().execute(statement.named.encode(), parameters).fetchall()

    def opened(self) -> psycopg.Connection[Any]:
        """The connection, made if there is none."""
        if self._db is None:
            self._db, self._pooled = self._connect()
            self._prepared.clear()
        return self._db

    def recover(self) -> None:
        """After an error: leave the transaction, or the connection."""
        db = self._db
        if db is None:
            return
        try:
            if db.pgconn.pipeline_status != pq.PipelineStatus.OFF:
                self.drop()
            elif db.pgconn.transaction_status != pq.TransactionStatus.IDLE:
                db.execute(b"ROLLBACK")
            if self._prepared and self._db is not None:
                # What was to be prepared behind the error never was, and nobody knows where that began.
                self._prepared.clear()
                db.execute(b"DEALLOCATE ALL")
        except psycopg.Error:
            self.drop()

    def drop(self) -> None:
        """Close the connection; the next use makes a new one. Twice is once."""
        db, self._db = self._db, None
        self._prepared.clear()
        if db is not None:
            db.close()

    def forget(self) -> psycopg.Connection[Any] | None:
        """In a forked child: let go of the parent's connection without touching it."""
        db, self._db = self._db, None
        self._prepared.clear()
        return db
