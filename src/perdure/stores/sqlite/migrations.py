"""Numbered migrations: each applied once, in order, in a transaction of its own, and never edited afterwards."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from importlib import resources
from sqlite3 import Connection
from typing import Final, NamedTuple

from perdure.core.errors import NotAStore, StoreCorrupt, StoreTooNew
from perdure.stores.schema import Found, Schema, compared
from perdure.stores.sqlite import connections
from perdure.stores.sqlite.errors import ours


class Migration(NamedTuple):
    number: int
    name: str
    text: str
    checksum: str


def _load() -> tuple[Migration, ...]:
    found = []
    for file in resources.files(__package__).iterdir():
        if file.name.endswith(".sql") and file.name[:4].isdigit():
            text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
            checksum = hashlib.sha256(text.encode()).hexdigest()
            found.append(Migration(int(file.name[:4]), file.name, text, checksum))
    return tuple(sorted(found))


MIGRATIONS: Final = _load()


def is_current(db: Connection, url: str) -> bool:
    """Whether the database has our tables, all of them, and no later ones; raises where we must not go on."""
    if (
        db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'perdure_migrations'").fetchone()
        is None
    ):
        return False
    applied = db.execute("SELECT number, name, checksum FROM perdure_migrations ORDER BY number").fetchall()
    known = {migration.number: migration for migration in MIGRATIONS}
    for number, name, checksum in applied:
        if number not in known:
            raise StoreTooNew(
                f"The store {url} has migration {name}, which this version of Perdure does not know. "
                "A newer version has changed its tables. Upgrade this process.",
                store=url,
            )
        if checksum != known[number].checksum:
            raise StoreCorrupt(
                f"The store {url} was made by another text of migration {name} than this version has. "
                "An applied migration is never edited, so one of the two is damaged. Install the version of Perdure "
                "that made the store.",
                store=url,
            )
    return len(applied) == len(MIGRATIONS)


def look(path: str, url: str) -> Schema:
    """The tables of the store in this file, also where some are missing."""
    connections.check_path(path, url, create=False)
    with ours(url), closing(connections.connect(path, busy_timeout=5, durability="full", writes=False)) as db:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()}
        asked = "SELECT number, name, checksum, applied_at FROM perdure_migrations"
        found = db.execute(asked).fetchall() if "perdure_migrations" in tables else []
    return compared(url, [Found(*row) for row in found], MIGRATIONS, tables)


def migrate(db: Connection, url: str, now: int) -> None:
    """Bring the tables up to date. The caller holds the gate; a killed migration leaves the one before."""
    for migration in MIGRATIONS:
        db.execute("BEGIN IMMEDIATE")
        try:
            db.execute(
                "CREATE TABLE IF NOT EXISTS perdure_migrations ("
                "number INTEGER PRIMARY KEY, name TEXT NOT NULL, checksum TEXT NOT NULL, applied_at INTEGER NOT NULL)"
            )
            # Asked inside the transaction: another process may have been quicker.
            if db.execute("SELECT 1 FROM perdure_migrations WHERE number = ?", (migration.number,)).fetchone() is None:
                for statement in _statements(migration.text):
                    db.execute(statement)
                db.execute("INSERT INTO perdure_migrations VALUES (?, ?, ?, ?)", (*_row(migration), now))
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
    if not is_current(db, url):
        raise NotAStore(f"The store {url} could not be brought up to date. Report it to us.", store=url)


def _row(migration: Migration) -> tuple[int, str, str]:
    return migration.number, migration.name, migration.checksum


def _statements(text: str) -> Iterator[str]:
    statement = ""
    for line in text.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
