"""The SQLite store keeps every promise, and those of a store that outlives its process."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure.stores.contract import Store
from perdure.stores.sqlite.store import SQLiteStore
from perdure.testing.conformance import Clock, StoreConformance


class TestSQLiteStore(StoreConformance):
    path: Path
    clock_of_the_store: Clock

    @pytest.fixture
    def store(self, clock: Clock, tmp_path: Path) -> Iterator[Store]:
        self.path, self.clock_of_the_store = tmp_path / "runs.db", clock
        store = SQLiteStore(str(self.path), clock=clock)
        yield store
        store.close()

    def reopen(self, store: Store) -> Store:
        store.close()
        return SQLiteStore(str(self.path), clock=self.clock_of_the_store)

    def connect(self, store: Store) -> sqlite3.Connection:
        return sqlite3.connect(self.path)
