"""Connections that are not our own: the caller's, with a transaction open, and those that a step's function gets."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from sqlite3 import Connection, Cursor
from typing import Any, Final

from perdure.core.errors import StoreLocked
from perdure.stores.sqlite.errors import BUSY, code

SAVEPOINT: Final = "perdure_batch"


class Plain:
    """A connection as our statements need it: rows are tuples, whatever factories its owner has set."""

    __slots__ = ("_db",)

    def __init__(self, db: Connection) -> None:
        self._db = db

    def execute(self, statement: str, parameters: Sequence[Any] = ()) -> Cursor:
        cursor = Cursor(self._db)
        cursor.row_factory = None
        return cursor.execute(statement, parameters)


@contextmanager
def borrowed(connection: Any, path: str, url: str) -> Iterator[Plain]:
    """The caller's connection, in its transaction: what fails inside leaves nothing in it.

    Where Python opens transactions by itself (its default), one begins here as the caller's first write would begin
    it; the caller commits it. Where nothing was written, none is left open.
    """
    if not isinstance(connection, Connection):
        raise TypeError(
            f"connection= got {connection!r}, and the store {url} is a SQLite file. Its own transactions belong to a "
            "sqlite3.Connection. Pass the connection whose transaction this shall be part of."
        )
    try:
        Connection.cursor(connection).close()
    except sqlite3.ProgrammingError as error:
        raise ValueError(
            f"connection= cannot be used here: {error} Pass an open connection, in the thread that it belongs to."
        ) from error
    db = Plain(connection)
    factory, connection.text_factory = connection.text_factory, str
    try:
        _check_file(db, path, url)
        begun = _begin(connection, db)
        changes = connection.total_changes
        db.execute(f"SAVEPOINT {SAVEPOINT}")
        try:
            yield db
        except BaseException:
            _undo(connection, db, begun=begun)
            raise
        db.execute(f"RELEASE {SAVEPOINT}")
        if begun and connection.total_changes == changes:
            # Nothing to commit: the caller may not even know that it is the file's writer.
            db.execute("ROLLBACK")
    except sqlite3.OperationalError as error:
        if code(error) != BUSY:
            raise
        raise StoreLocked(
            f"The transaction of connection= could not become the writer of {url}. Another one is writing, or has "
            "written since this one began to read, and SQLite does not wait for that. Begin it with BEGIN IMMEDIATE.",
            store=url,
        ) from error
    finally:
        connection.text_factory = factory


def _undo(connection: Connection, db: Plain, *, begun: bool) -> None:
    if connection.in_transaction:
        db.execute(f"ROLLBACK TO {SAVEPOINT}")
        db.execute(f"RELEASE {SAVEPOINT}")
        if begun:
            db.execute("ROLLBACK")


def _check_file(db: Plain, path: str, url: str) -> None:
    files = {name: file for _, name, file in db.execute("PRAGMA database_list").fetchall()}
    file = files.get("main", "")
    try:
        same = bool(file) and os.path.samefile(file, path)
    except OSError:
        same = False
    if not same:
        raise ValueError(
            f"connection= is open on {file or 'a database in memory'}, and the store is {url}. Only a transaction of "
            "the store's own database can hold both. Open the connection on the store's file."
        )


def _begin(connection: Connection, db: Plain) -> bool:
    """See that a transaction is open; whether it was begun here."""
    if connection.in_transaction:
        return False
    # `autocommit` is there since Python 3.12; -1 stands for the older way, where `isolation_level` decides.
    implicit = getattr(connection, "autocommit", -1)
    if (implicit == -1 and connection.isolation_level is None) or implicit is True:
        raise ValueError(
            "connection= has no open transaction, and commits each statement by itself. What is written could not be "
            'rolled back with anything. Begin one first: connection.execute("BEGIN IMMEDIATE").'
        )
    # Not deferred: one that has read before others wrote could not write any more.
    db.execute("BEGIN IMMEDIATE")
    return True
