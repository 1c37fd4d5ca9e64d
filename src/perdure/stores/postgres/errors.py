"""Driver errors become ours, here and nowhere else: by their SQLSTATE, never by their words."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

import psycopg

from perdure.core.errors import (
    NotAStore,
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreLocked,
    StoreReadOnly,
    StoreUnavailable,
)

PACKING_ERRORS: Final = (UnicodeEncodeError, OverflowError, struct.error)
"""What one item's data can raise before it is sent."""

RETRIED: Final = frozenset({"40001", "40P01"})
"""Serialization failure and deadlock: the transaction is gone for certain, and may be tried again at once."""

# The codes: https://www.postgresql.org/docs/current/errcodes-appendix.html. The longest prefix decides.
_SAYING: Final[Mapping[str, tuple[type[StoreError], str]]] = {
    "08": (StoreUnavailable, "The connection was lost. What became of the last write is found out when asked again."),
    "25006": (StoreReadOnly, "It can only be read. A standby or a read-only role cannot be a store: name the primary."),
    "25P02": (StoreError, "Its transaction has failed before. Nothing was written: roll it back."),
    "25P03": (StoreUnavailable, "It ended a connection whose transaction stood still. Nothing was written: try again."),
    "25P04": (StoreUnavailable, "It ended a transaction that took too long. Nothing was written: try again."),
    "28": (NotAStore, "It does not let us in. Mend the user, the password or the server's pg_hba.conf."),
    "3D000": (NotAStore, "There is no such database. Create it, or mend the URL."),
    "3F000": (NotAStore, "Its schema is gone. Create it with `perdure db upgrade`, or mend schema=."),
    "40": (StoreUnavailable, "It gave the transaction up because of others. Nothing was written: try again."),
    "42501": (NotAStore, "Its role lacks a right. Grant it USAGE on the schema, and all on its tables and sequences."),
    "42P01": (NotAStore, "Tables of it are gone. See `perdure db status`, or mend schema=."),
    "53100": (StoreFull, "Its disk has no room left. Nothing was written: make room."),
    "53": (StoreUnavailable, "It has too little memory or too many connections. Nothing was written: give it more."),
    "55P03": (StoreLocked, "Somebody else holds a lock for longer than we wait. Find the open transaction."),
    "57014": (StoreLocked, "It stopped a statement after its time. Find the transaction that stays open."),
    "57": (StoreUnavailable, "It stops or starts. What became of the last write is found out when asked again."),
    "58": (StoreUnavailable, "Its system answered with an error. Look at the server's log and disk."),
    "XX001": (StoreCorrupt, "What is stored is damaged. Stop all workers, keep a copy, and restore a backup."),
    "XX002": (StoreCorrupt, "An index is damaged. Stop all workers, and rebuild it with REINDEX."),
}


def lost(error: psycopg.Error) -> bool:
    """Whether the connection is of no use any more, so that nobody knows what became of the last write."""
    state = error.sqlstate
    return state is None or state.startswith(("08", "57P")) or state in ("25P03", "25P04")


def unfit(error: psycopg.Error) -> bool:
    """Whether the data is what the server cannot take: a text, a number, something twice, too long for an index."""
    return (error.sqlstate or "").startswith(("22", "23", "54"))


def translate(error: BaseException, url: str) -> StoreError:
    """Our error for the driver's."""
    if isinstance(error, StoreError):
        return error
    state = getattr(error, "sqlstate", None)
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if state is None and isinstance(error, (psycopg.OperationalError, OSError)):
        kind: type[StoreError] = StoreUnavailable
        saying = (
            f"It cannot be reached, does not let us in, or the connection was lost. The driver says: {text}. "
            "Check that the server runs, and the user, password and database in the URL."
        )
    else:
        found = next((state[:n] for n in (5, 2) if state and state[:n] in _SAYING), None)
        if found is not None:
            kind, saying = _SAYING[found]
            saying = f"{saying} The server says: {text}."
        else:
            kind = StoreError
            saying = f"PostgreSQL says: {text}. Nothing was written. If your program did not cause it, report it to us."
    return kind(f"The store {url} could not do what was asked. {saying}", store=url)


@contextmanager
def ours(url: str) -> Iterator[None]:
    """Inside, a driver error is raised as a `StoreError`."""
    try:
        yield
    except (psycopg.Error, *PACKING_ERRORS) as error:
        raise translate(error, url) from error
