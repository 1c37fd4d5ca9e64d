"""Driver errors become ours, here and nowhere else."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from perdure.core.errors import (
    NotAStore,
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreLocked,
    StoreReadOnly,
    StoreUnavailable,
)

# The primary result codes of https://www.sqlite.org/rescode.html; Python names them since 3.11 only.
BUSY, LOCKED, NOMEM, READONLY, IOERR, CORRUPT, FULL, CANTOPEN, PROTOCOL, NOTADB = 5, 6, 7, 8, 10, 11, 13, 14, 15, 26

DATA_ERRORS: Final = (
    UnicodeEncodeError,
    OverflowError,
    sqlite3.DataError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
)
"""What one item's data can raise while its neighbours are fine."""

_SAYING: Final[Mapping[int, tuple[type[StoreError], str]]] = {
    BUSY: (
        StoreLocked,
        "Somebody else holds its write lock for longer than we wait. Find the program that keeps a transaction open, "
        "or give a larger busy_timeout=.",
    ),
    READONLY: (
        StoreReadOnly,
        "The file or its folder cannot be written. A store needs both: mend their permissions, or open another store.",
    ),
    IOERR: (
        StoreUnavailable,
        "The disk answered with an error. Whether the last write arrived is found out when it is asked again; "
        "look at the disk and the system's log.",
    ),
    CORRUPT: (
        StoreCorrupt,
        "What is stored is damaged. Stop all its workers, keep a copy, and restore a backup or run `sqlite3 .recover`.",
    ),
    FULL: (
        StoreFull,
        "The disk, or the database's own limit of pages, has no room left. Nothing was written: make room.",
    ),
    CANTOPEN: (
        StoreUnavailable,
        "The file cannot be opened. Check that it and its folder exist and may be read and written.",
    ),
    NOTADB: (NotAStore, "The file is no SQLite database. Nothing was changed: check the path."),
    NOMEM: (
        StoreUnavailable,
        "There is no memory left. Nothing was written: give the process more, or write less at once.",
    ),
}
_SAME: Final[Mapping[int, int]] = {LOCKED: BUSY, PROTOCOL: BUSY}

# On Python 3.10 an error carries no code, only the fixed English of SQLite's sqlite3ErrStr().
_TEXTS: Final[Mapping[str, int]] = {
    "database is locked": BUSY,
    "database table is locked": BUSY,
    "locking protocol": BUSY,
    "attempt to write a readonly database": READONLY,
    "disk I/O error": IOERR,
    "database disk image is malformed": CORRUPT,
    "database or disk is full": FULL,
    "unable to open database file": CANTOPEN,
    "file is not a database": NOTADB,
    "out of memory": NOMEM,
}


def code(error: BaseException) -> int:
    """SQLite's primary result code of a driver error; 1 (SQL error) if there is no better one."""
    extended = getattr(error, "sqlite_errorcode", None)
    if extended is not None:
        return int(extended) & 0xFF
    return _TEXTS.get(str(error), 1)


def translate(error: Exception, url: str) -> StoreError:
    """Our error for the driver's."""
    found = code(error)
    if found == 1 and str(error).startswith(("no such table: ", "no such column: ", "no such index: ")):
        # Only its words tell this from other mistakes in a statement.
        return NotAStore(
            f"The store {url} lacks what Perdure has made in it ({error}). Something else has changed the file. See "
            "`perdure db status`, and restore a backup.",
            store=url,
        )
    kind, saying = _SAYING.get(
        _SAME.get(found, found),
        (StoreError, f"SQLite says: {error}. Nothing was written. If your program did not cause it, report it to us."),
    )
    return kind(f"The store {url} could not do what was asked. {saying}", store=url)


@contextmanager
def ours(url: str) -> Iterator[None]:
    """Inside, a driver error is raised as a `StoreError`."""
    try:
        yield
    except (sqlite3.Error, UnicodeEncodeError, OverflowError) as error:
        raise translate(error, url) from error


def locked(url: str, seconds: float) -> StoreLocked:
    """The error of a gate that did not open in time."""
    _, saying = _SAYING[BUSY]
    return StoreLocked(f"The store {url} was locked for {seconds:g} s. {saying}", store=url)
