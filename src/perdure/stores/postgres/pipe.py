"""One transaction in one round trip: a pipeline of libpq, sent without waiting and collected later.

The driver's own pipeline would make an object for each statement and wait at its end; here libpq is called as it is.
"""

from __future__ import annotations

import select
import time
from collections.abc import Sequence
from typing import Any, Final

import psycopg
from psycopg import pq

from perdure.stores.postgres.batch import Call
from perdure.stores.postgres.packing import OIDS

_BINARY: Final = 1
_GOOD: Final = frozenset({pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK})
REPLANNED: Final = 30.0
"""Seconds after which all statements are planned anew: a table may have grown far beyond what the plan was made for."""
_WAIT: Final = 90.0
"""Seconds without an answer after which a connection is given up. The server's own timeouts come first."""


class Plans:
    """When a session that keeps plans is to make them anew.

    Soon at first: one that was made for an empty table walks along one of a thousand rows.
    """

    def __init__(self) -> None:
        self._used = 0
        self._until = 16
        self._made = time.monotonic()

    def are_old(self) -> bool:
        """Asked before each use; if so, the next are taken to be new."""
        self._used += 1
        if self._used != self._until and time.monotonic() - self._made <= REPLANNED:
            return False
        self._until = max(self._until, self._used) * 4
        self._made = time.monotonic()
        return True


DISCARD: Final = b"DISCARD PLANS"


class Pipe:
    """See the module. Whatever it raises, the connection is of no use any more, but for a server's own `Failed`.

    keeps_statements: whether the session is ours, so that a statement can be prepared once for all transactions.
    """

    def __init__(self, connection: pq.abc.PGconn, *, keeps_statements: bool) -> None:
        self.connection: Final = connection
        self._keeps = keeps_statements
        self._prepared: set[str] = set()
        self._plans = Plans()
        self._expected: list[bool] = []  # for each command that was sent: whether its answer is one of a call
        self._answers: list[pq.abc.PGresult] = []
        self._number = 0
        self._complete = True
        self.unsent = False
        """Whether a part of what was sent is still here, as the server has not read the rest."""
        self.failed: psycopg.Error | None = None
        """What the server has against what was sent last, as far as its answers have come."""

    def send(self, first: Sequence[bytes], calls: Sequence[Call], last: Sequence[bytes] = ()) -> None:
        """Send commands and calls. An error means that nothing arrived, or that nobody knows."""
        connection = self.connection
        expected = self._expected = []
        self._answers = []
        self._number = 0
        self._complete = False
        self.failed = None
        if self._keeps and self._plans.are_old():
            first = [*first, DISCARD]
        connection.enter_pipeline_mode()
        for command in first:
            connection.send_query_params(command, None)
            expected.append(False)
        for call in calls:
            self._send(connection, call, expected)
        for command in last:
            connection.send_query_params(command, None)
            expected.append(False)
        connection.pipeline_sync()
        self.unsent = bool(connection.flush())

    def arrived(self) -> bool:
        """Whether all answers are here, so that `collect` would not wait for them. Itself it does not wait.

        While there is something `unsent`, it is also to be asked whenever the socket can be written to.
        """
        if not self._complete:
            self.unsent = bool(self.connection.flush())
            self.connection.consume_input()
            self._read()
        return self._complete

    def collect(self) -> list[pq.abc.PGresult]:
        """Wait for the answers to the calls; or the server's error, behind which nothing was done."""
        connection = self.connection
        self._read()
        while not self._complete:
            self._wait(connection)
            self._read()
        connection.exit_pipeline_mode()
        if self.failed is None:
            return self._answers
        self._clean_up()
        raise self.failed

    def _read(self) -> None:
        """Take the answers that are here."""
        connection = self.connection
        while not self._complete and not connection.is_busy():
            result = connection.get_result()
            if result is None:
                if connection.status == pq.ConnStatus.BAD:
                    raise self.failed or psycopg.OperationalError("the connection was lost")
                continue
            status = result.status
            if status == pq.ExecStatus.PIPELINE_SYNC:
                self._complete = True
                return
            if status in _GOOD:
                if self._expected[self._number]:
                    self._answers.append(result)
            elif self.failed is None:
                self.failed = psycopg.errors.error_from_result(result, encoding="utf-8")
                if connection.status == pq.ConnStatus.BAD:
                    raise self.failed
            self._number += 1

    def _send(self, connection: pq.abc.PGconn, call: Call, expected: list[bool]) -> None:
        statement = call.statement
        formats = [_BINARY] * len(call.values)
        if self._keeps:
            name = statement.name.encode()
            if statement.name not in self._prepared:
                connection.send_prepare(name, statement.text.encode(), [OIDS[type] for type in statement.types])
                expected.append(False)
                self._prepared.add(statement.name)
            connection.send_query_prepared(name, call.values, formats, _BINARY)
        else:
            # The next transaction may be another session's: a statement without a name is all there is.
            oids = [OIDS[type] for type in statement.types]
            connection.send_query_params(statement.text.encode(), call.values, oids, formats, _BINARY)
        expected.append(True)

    def _clean_up(self) -> None:
        """After an error of the server: leave the transaction."""
        connection = self.connection
        if connection.transaction_status != pq.TransactionStatus.IDLE:
            connection.exec_(b"ROLLBACK")
        if self._prepared:
            # What was to be prepared behind the error never was, and nobody knows where that began.
            self._prepared.clear()
            connection.exec_(b"DEALLOCATE ALL")

    @staticmethod
    def _wait(connection: pq.abc.PGconn) -> None:
        poll = select.poll()
        unsent = connection.flush()
        poll.register(connection.socket, select.POLLIN | (select.POLLOUT if unsent else 0))
        if not poll.poll(_WAIT * 1000):
            raise psycopg.OperationalError(f"no answer from the server for {_WAIT:g} s")
        connection.consume_input()


def execute(connection: pq.abc.PGconn, call: Call) -> Any:
    """The result of one call, in whatever transaction is open, waiting for it."""
    statement = call.statement
    oids = [OIDS[type] for type in statement.types]
    formats = [_BINARY] * len(call.values)
    result = connection.exec_params(statement.text.encode(), call.values, oids, formats, _BINARY)
    if result.status not in _GOOD:
        raise psycopg.errors.error_from_result(result, encoding="utf-8")
    return result
