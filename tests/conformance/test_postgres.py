"""The PostgreSQL store keeps every promise, on every version found here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from perdure.stores.contract import Store
from perdure.stores.postgres import PostgresStore
from perdure.testing.conformance import Clock, StoreConformance
from tests import servers


@pytest.fixture(scope="module", params=servers.versions())
def database(request: pytest.FixtureRequest) -> servers.Database:
    return servers.needed(request.param)


class TestPostgresStore(StoreConformance):
    settings: dict[str, Any]

    @pytest.fixture
    def store(self, clock: Clock, database: servers.Database) -> Iterator[Store]:
        with servers.schema(database) as schema:
            # The caller's own tables stand beside the store's, and go with them.
            joined = "&" if "?" in database.url else "?"
            url = f"{database.url}{joined}options=-csearch_path%3D{schema}"
            self.settings = {"url": url, "schema": schema, "clock": clock}
            store = PostgresStore(**self.settings)
            yield store
            store.close()

    def connect(self, store: Store) -> psycopg.Connection[Any]:
        return psycopg.connect(self.settings["url"])

    def reopen(self, store: Store) -> Store:
        store.close()
        return PostgresStore(**self.settings)
