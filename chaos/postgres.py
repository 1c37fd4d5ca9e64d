"""A PostgreSQL store under a scenario: a schema of its own on a server of ours, its triggers, and its facts."""

from __future__ import annotations

import asyncio
import functools
import json
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Final

import psycopg
from psycopg.rows import dict_row

from chaos.facts import Facts, Fence
from perdure.stores.opening import open_store
from tests.servers import PostgresServer, installations

TRIGGERS: Final = """
SET search_path = {schema};
CREATE TABLE chaos_fence (
    n bigserial PRIMARY KEY, run bigint, old_owner text, owner text, old_epoch bigint, epoch bigint,
    old_version bigint, version bigint, old_status text, status text, old_progress bigint, progress bigint,
    old_strikes int, strikes int
);
CREATE TABLE chaos_event (run bigint, seq int, epoch bigint);
CREATE TABLE chaos_broken (what text);
CREATE TABLE chaos_rows (run text, step text);
CREATE FUNCTION chaos_changed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO {schema}.chaos_fence VALUES (
            DEFAULT, new.key, NULL, new.owner, 0, new.epoch, 0, new.version, '', new.status,
            0, new.history_events + new.attempt, 0, new.strikes);
    ELSIF TG_OP = 'DELETE' THEN
        INSERT INTO {schema}.chaos_broken VALUES ('run ' || old.id || ' has disappeared');
    ELSIF (old.owner, old.epoch, old.version, old.status) IS DISTINCT FROM
          (new.owner, new.epoch, new.version, new.status) THEN
        INSERT INTO {schema}.chaos_fence VALUES (
            DEFAULT, new.key, old.owner, new.owner, old.epoch, new.epoch, old.version, new.version,
            old.status, new.status, old.history_events + old.attempt, new.history_events + new.attempt,
            old.strikes, new.strikes);
    END IF;
    RETURN NULL;
END $$;
CREATE FUNCTION chaos_recorded() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO {schema}.chaos_event SELECT new.run, new.seq, epoch FROM {schema}.runs WHERE key = new.run;
    ELSE
        INSERT INTO {schema}.chaos_broken VALUES ('event ' || old.run || '/' || old.seq || ' met a ' || TG_OP);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_changed AFTER INSERT OR UPDATE OR DELETE ON runs
    FOR EACH ROW EXECUTE FUNCTION chaos_changed();
CREATE TRIGGER chaos_recorded AFTER INSERT OR UPDATE OR DELETE ON history
    FOR EACH ROW EXECUTE FUNCTION chaos_recorded();
"""
BELONGING: Final = ("history", "mail", "inputs", "idempotency")


class PostgresBase:
    """A schema, watched from the beginning, on a server that may be killed."""

    kind = "postgres"

    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        self.schema = f"chaos_{uuid.uuid4().hex[:12]}"
        self.url = f"{server.url}&schema={self.schema}"
        self.names: Mapping[str, str] = {
            "runs": f"{self.schema}.runs",
            "workers": f"{self.schema}.workers",
            "rows": f"{self.schema}.chaos_rows",
        }
        self._db: psycopg.Connection[Any] | None = None

    def prepare(self) -> None:
        """Make the tables, and let the database keep a record of every change from now on."""
        open_store(self.url).close()
        with self.connection() as db:
            db.execute(TRIGGERS.format(schema=self.schema).encode())

    def close(self) -> None:
        """Give the schema back."""
        if self._db is not None:
            self._db.close()
        with self.connection() as db:
            db.execute(f"DROP SCHEMA IF EXISTS {self.schema} CASCADE".encode())

    def fresh(self, number: int) -> str:
        """The URL of a store that is not there yet."""
        return f"{self.server.url}&schema={self.schema}_{number}"

    def url_at(self, port: int) -> str:
        """The store's URL by a port of the loopback, where a proxy listens."""
        # Without TLS and GSS, of which libpq would try each with a connection of its own.
        return (
            f"postgresql://postgres@127.0.0.1:{port}/postgres?sslmode=disable&gssencmode=disable&schema={self.schema}"
        )

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the server, for a proxy."""
        return await asyncio.open_connection("127.0.0.1", self.server.port)

    def connection(self) -> psycopg.Connection[Any]:
        """A connection of our own, as another program of the user's has one."""
        return psycopg.connect(self.server.url, autocommit=True)

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        """Rows; `{runs}` in the query is the name of that table. Waits for a server that is away."""
        deadline = time.monotonic() + 60
        while True:
            try:
                if self._db is None:
                    self._db = self.connection()
                return self._db.execute(query.format(**self.names).encode()).fetchall()
            except psycopg.OperationalError:
                self._db = None
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def now(self) -> int:
        """The store's clock."""
        return int(self.ask("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint")[0][0])

    def facts(self) -> Facts:
        """Everything, as of one moment."""
        with self.connection() as db, db.transaction(), db.cursor(row_factory=dict_row) as rows:
            db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            db.execute(f"SET search_path = {self.schema}".encode())
            history: dict[int, list[dict[str, Any]]] = defaultdict(list)
            for run, seq, event in db.execute("SELECT run, seq, event FROM history ORDER BY run, seq"):
                history[run].append({"seq": seq, **json.loads(event)})
            fences: dict[int, list[Fence]] = defaultdict(list)
            for row in rows.execute("SELECT * FROM chaos_fence ORDER BY n"):
                del row["n"]
                fences[row["run"]].append(Fence(**row))
            orphans = []
            for table in BELONGING:
                missing = f"SELECT count(*) FROM {table} WHERE run NOT IN (SELECT key FROM runs)"
                number = db.execute(missing.encode()).fetchall()[0][0]
                if number:
                    orphans.append(f"{number} rows of {table} belong to no run")
            facts = Facts(
                runs={row["key"]: row for row in rows.execute("SELECT * FROM runs")},
                history=history,
                fences=fences,
                epochs={(r[0], r[1]): r[2] for r in db.execute("SELECT run, seq, epoch FROM chaos_event")},
                broken=[what for (what,) in db.execute("SELECT what FROM chaos_broken")],
                workers={r[0]: (r[1], r[2] > 0) for r in db.execute("SELECT incarnation, name, dead FROM workers")},
                mail=list(rows.execute("SELECT run, id, kind, unread FROM mail")),
                orphans=orphans,
            )
            facts.rows.update((row[0], row[1]) for row in db.execute("SELECT run, step FROM chaos_rows"))
            return facts


@functools.cache
def shared() -> PostgresServer:
    """One server for all scenarios of this process that leave it as it was, or bring it back."""
    return PostgresServer().start()


def lives(server: PostgresServer) -> bool:
    """Whether the server's process has not ended by itself."""
    return server._process is not None and server._process.poll() is None


def found() -> bool:
    """Whether there is a server that we may start and kill."""
    return bool(installations())
