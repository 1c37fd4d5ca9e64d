"""Drawn at random, the stores do the same as the memory store. `PERDURE_EXAMPLES=2000` looks for longer."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings

from perdure.stores.contract import Store
from perdure.stores.memory import MemoryStore
from perdure.stores.postgres import PostgresStore
from perdure.stores.sqlite.store import SQLiteStore
from perdure.testing.conformance import Clock
from tests import servers
from tests.conformance.against_memory import AgainstMemory

EFFORT = settings(
    max_examples=int(os.environ.get("PERDURE_EXAMPLES", "40")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


class Memory(AgainstMemory):
    """Beside another of its kind: what this finds is a fault of the comparison."""

    def make(self, clock: Clock) -> Store:
        return MemoryStore(clock=clock)


class SQLite(AgainstMemory):
    def make(self, clock: Clock) -> Store:
        self.folder = tempfile.TemporaryDirectory()
        return SQLiteStore(str(Path(self.folder.name) / "runs.db"), clock=clock)

    def teardown(self) -> None:
        super().teardown()
        self.folder.cleanup()


class Postgres(AgainstMemory):
    """The newest version found here: its statements are the same on all of them."""

    def make(self, clock: Clock) -> Store:
        found = servers.installations()
        newest = max(found, key=lambda one: one.version) if found and servers.URL not in os.environ else None
        database = servers.needed(newest)
        self.schema = contextlib.ExitStack()
        return PostgresStore(database.url, schema=self.schema.enter_context(servers.schema(database)), clock=clock)

    def teardown(self) -> None:
        super().teardown()
        self.schema.close()


TestMemory = Memory.TestCase
TestMemory.settings = EFFORT
TestSQLite = SQLite.TestCase
TestSQLite.settings = EFFORT
TestPostgres = Postgres.TestCase
TestPostgres.settings = EFFORT
