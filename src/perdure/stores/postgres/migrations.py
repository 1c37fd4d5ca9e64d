"""Numbered migrations: each applied once, in order, all in one transaction, and never edited afterwards.

A migration says which older versions may go on beside it (`-- readable by: N`), so that processes of two adjacent
versions can run side by side while a deploy rolls. Whoever migrates holds an advisory lock until its transaction ends,
so that of several that start together one migrates and the others find it done; nothing else ever takes that lock.
"""

from __future__ import annotations

import hashlib
import re
from importlib import resources
from typing import Any, Final, NamedTuple

import psycopg

from perdure.core.errors import NotAStore, StoreCorrupt, StoreTooNew
from perdure.stores.postgres.queries import in_schema
from perdure.stores.schema import Found, Schema, compared

_READABLE: Final = re.compile(r"^-- readable by: (\d+)$", re.MULTILINE)


class Migration(NamedTuple):
    number: int
    name: str
    text: str
    checksum: str
    readable_by: int


class Applied(NamedTuple):
    """A migration, as the database has it."""

    number: int
    name: str
    checksum: str
    readable_by: int
    applied_at: int


def _load() -> tuple[Migration, ...]:
    found = []
    for file in resources.files(__package__).iterdir():
        if file.name.endswith(".sql") and file.name[:4].isdigit():
            text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
            said = _READABLE.search(text)
            if said is None:
                raise ValueError(f"{file.name} does not say by which version it is readable")
            checksum = hashlib.sha256(text.encode()).hexdigest()
            found.append(Migration(int(file.name[:4]), file.name, text, checksum, int(said.group(1))))
    return tuple(sorted(found))


MIGRATIONS: Final = _load()


def applied(db: psycopg.Connection[Any], schema: str, url: str) -> list[Applied] | None:
    """What the schema has, in order; None if it is no schema of ours, or not there."""
    columns = db.execute(
        "SELECT attribute.attname FROM pg_class AS class JOIN pg_namespace AS space ON space.oid = class.relnamespace "
        "JOIN pg_attribute AS attribute ON attribute.attrelid = class.oid AND attribute.attnum > 0 "
        "WHERE space.nspname = %s AND class.relname = 'migrations'",
        [schema],
    ).fetchall()
    if not columns:
        return None
    if not set(Applied._fields) <= {name for (name,) in columns}:
        raise _taken(url, "a table migrations that is none of ours")
    asked = "SELECT number, name, checksum, readable_by, applied_at FROM perdure.migrations ORDER BY number"
    return [Applied(*row) for row in db.execute(in_schema(asked, schema).encode()).fetchall()]


def _taken(url: str, what: str) -> NotAStore:
    return NotAStore(
        f"The store {url} cannot be made: its schema has {what}. Perdure's tables stand in a schema of their own. "
        "Name another one with schema=, which is then created.",
        store=url,
    )


def missing(found: list[Applied] | None, url: str) -> list[Migration]:
    """What is still to be applied; an error where this version must not touch the tables."""
    known = {migration.number: migration for migration in MIGRATIONS}
    newest = MIGRATIONS[-1].number
    for one in found or ():
        if one.number not in known:
            if one.readable_by > newest:
                raise StoreTooNew(
                    f"The store {url} has migration {one.name}, which this version of Perdure does not know. "
                    "A newer version has changed its tables. Upgrade this process.",
                    store=url,
                )
        elif one.checksum != known[one.number].checksum:
            raise StoreCorrupt(
                f"The store {url} was made by another text of migration {one.name} than this version has. "
                "An applied migration is never edited, so one of the two is damaged. Install the version of Perdure "
                "that made the store.",
                store=url,
            )
    there = {one.number for one in found or ()}
    return [migration for migration in MIGRATIONS if migration.number not in there]


def look(db: psycopg.Connection[Any], schema: str, url: str) -> Schema:
    """The tables of the store in this schema, also where some are missing."""
    newest = MIGRATIONS[-1].number
    found = [
        Found(one.number, one.name, one.checksum, one.applied_at, fits=one.readable_by <= newest)
        for one in applied(db, schema, url) or ()
    ]
    asked = "SELECT tablename FROM pg_tables WHERE schemaname = %s"
    tables = {name for (name,) in db.execute(asked, [schema]).fetchall()}
    return compared(url, found, MIGRATIONS, tables)


def check(db: psycopg.Connection[Any], schema: str, url: str) -> None:
    """Refuse a store whose tables are not there, or older than this version needs."""
    found = applied(db, schema, url)
    if wanted := missing(found, url):
        what = f"there is no schema {schema!r} with tables of Perdure" if found is None else (
            f"its tables lack {', '.join(migration.name for migration in wanted)}"
        )  # fmt: skip
        raise NotAStore(
            f'The store {url} cannot be opened: {what}, which neither migrate="check" nor commands '
            "that only read make. Run `perdure db upgrade` with a role that may create tables.",
            store=url,
        )


def migrate(db: psycopg.Connection[Any], schema: str, url: str, now: int) -> list[Migration]:
    """Bring the tables up to date, and say what was applied. A killed migration leaves what was there before."""
    try:
        return _migrated(db, schema, url, now)
    except psycopg.errors.InsufficientPrivilege as error:
        raise NotAStore(
            f"The tables of the store {url} could not be made: the server says: {error.diag.message_primary}. Its role "
            "may not create them. Run `perdure db upgrade` with a role that may (CREATE on the database, or on the "
            'schema if it is there), then open it with migrate="check".',
            store=url,
        ) from error
    except (psycopg.errors.DuplicateTable, psycopg.errors.DuplicateObject) as error:
        raise _taken(url, f"something of a name that Perdure needs ({error.diag.message_primary})") from error


def _migrated(db: psycopg.Connection[Any], schema: str, url: str, now: int) -> list[Migration]:
    with db.transaction():
        db.execute("SELECT pg_advisory_xact_lock(hashtext('perdure'), hashtext(%s))", [schema])
        # Asked inside the lock: another process may have been quicker.
        found = applied(db, schema, url)
        wanted = missing(found, url)
        if not wanted:
            return []
        if found is None:
            there = db.execute("SELECT 1 FROM pg_namespace WHERE nspname = %s", [schema]).fetchone()
            if there is None:
                db.execute(in_schema("CREATE SCHEMA perdure.", schema).rstrip(".").encode())
            db.execute(
                in_schema(
                    "CREATE TABLE perdure.migrations (number integer NOT NULL PRIMARY KEY, name text NOT NULL, "
                    "checksum text NOT NULL, readable_by integer NOT NULL, applied_at bigint NOT NULL)",
                    schema,
                ).encode()
            )
        for migration in wanted:
            db.execute(in_schema(migration.text, schema).encode())
            db.execute(
                in_schema("INSERT INTO perdure.migrations VALUES (%s, %s, %s, %s, %s)", schema).encode(),
                [migration.number, migration.name, migration.checksum, migration.readable_by, now],
            )
        return wanted
