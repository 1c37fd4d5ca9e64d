"""A PostgreSQL worker is known by its connection from its first moment on."""

from __future__ import annotations

import time

import psycopg
import pytest

from perdure.core.turn import Announcement
from perdure.stores.postgres.store import PostgresStore
from tests import servers


def test_a_worker_whose_listener_connects_while_it_announces_itself_is_known_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    database = servers.needed()
    with servers.schema(database) as schema:
        store = PostgresStore(database.url, schema=schema)
        store._listen()
        deadline = time.monotonic() + 10
        while not store._backend() and time.monotonic() < deadline:
            time.sleep(0.01)
        backend = PostgresStore._backend
        answers = [0]  # when it first looks, the listener is not there yet
        monkeypatch.setattr(PostgresStore, "_backend", lambda self: answers.pop() if answers else backend(self))
        worker = Announcement(
            incarnation="a" * 32, name="w", namespace="default", queues=("default",), serves=(), ttl=15_000_000
        )
        store.announce(worker)
        with psycopg.connect(database.url) as db:
            found = db.execute(f'SELECT backend FROM "{schema}".workers'.encode()).fetchall()
        assert found == [(backend(store),)]
        store.close()
