"""What a PostgreSQL server tells of the others: who lives, by their connections, and that there is something to do."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from perdure.core.errors import StoreError
from perdure.core.turn import Announcement, Key
from perdure.stores.postgres import connections
from perdure.stores.postgres.store import PostgresStore
from perdure.testing.conformance.story import announce, held
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


def test_what_was_to_be_told_when_the_listener_was_cut_is_told_by_its_next_connection() -> None:
    database = servers.needed()
    with servers.schema(database) as schema:
        teller, hearer = (PostgresStore(database.url, schema=schema) for _ in range(2))
        for store in (teller, hearer):
            store._listen()
        listener, other = teller._listener, hearer._listener
        assert listener is not None
        assert other is not None
        assert listener.first.wait(10)
        assert other.first.wait(10)
        assert eventually(lambda: hearer._bell.count > 0)
        heard = hearer._bell.count
        # As if the connection were lost between being told so and doing it.
        listener._told = True
        with psycopg.connect(database.url, autocommit=True) as db:
            db.execute("SELECT pg_terminate_backend(%s)", [listener.backend])
        assert eventually(lambda: hearer._bell.count > heard)
        heard = hearer._bell.count
        teller._ring()
        assert eventually(lambda: hearer._bell.count > heard)
        teller.close()
        hearer.close()


@pytest.mark.parametrize("installation", servers.versions())
def test_a_server_that_recovered_from_the_loss_of_a_backend_has_ended_no_worker(
    installation: servers.Installation,
) -> None:
    with servers.PostgresServer(installation).start() as server:
        old = PostgresStore(server.url)
        announce(old, "old")
        assert eventually(lambda: old._backend() != 0)
        old.heartbeat("old")
        run = held(old, "run", "old").run
        with psycopg.connect(server.url, autocommit=True) as db:
            row = db.execute("SELECT pg_backend_pid(), pg_postmaster_start_time()").fetchone()
            known = db.execute("SELECT backend, backend_start FROM perdure.workers").fetchone()
            assert row is not None
            assert known is not None
            os.kill(row[0], signal.SIGKILL)
        new = eventually(lambda: opened(server.url))
        assert eventually(lambda: old._backend() not in (0, known[0]))
        announce(new, "new")
        with psycopg.connect(server.url) as db:
            assert db.execute("SELECT pg_postmaster_start_time()").fetchone() == row[1:]
            # As if it had not come back yet: its connection is gone, and it has not beaten for a while.
            db.execute(
                "UPDATE perdure.workers SET beat_at = beat_at - 2000000, backend = %s, backend_start = %s "
                "WHERE incarnation = 'old'",
                known,
            )
        stays_with(new, run, "old")
        old.close()
        new.close()


def test_a_session_of_a_pooler_runs_at_read_committed_whatever_the_servers_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    database = servers.needed()
    monkeypatch.setenv("PGOPTIONS", "-c default_transaction_isolation=serializable")
    monkeypatch.setattr(connections, "set_session", lambda db, local: None)
    with servers.schema(database) as schema:
        store = PostgresStore(database.url, schema=schema)
        with store._read() as db, db.transaction():
            assert db.execute("SHOW transaction_isolation").fetchone() == ("read committed",)
        store.close()


def stays_with(store: PostgresStore, run: Key, worker: str) -> None:
    """However often this store looks for the dead, the run belongs to its worker, which has no strike."""
    for _ in range(3):
        store.reap()
        time.sleep(0.45)
    [row] = store.rows([run])
    assert (row.owner, row.strikes) == (worker, 0)


def opened(url: str) -> PostgresStore | None:
    try:
        return PostgresStore(url)
    except StoreError:
        return None


def eventually(look: Callable[[], Any]) -> Any:
    """What it answers, as soon as that is something; nothing after ten seconds."""
    until = time.monotonic() + 10
    while not (found := look()) and time.monotonic() < until:
        time.sleep(0.01)
    return found


def test_a_worker_whose_listener_cannot_come_back_lives_by_its_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    database = servers.needed()
    with servers.schema(database) as schema:
        store, other = (PostgresStore(database.url, schema=schema) for _ in range(2))
        announce(store, "worker")
        run = held(store, "run", "worker").run
        listener = store._listener
        assert listener is not None

        def refused() -> Any:
            raise psycopg.OperationalError("no way")

        listener._connect = refused
        with psycopg.connect(database.url, autocommit=True) as db:
            db.execute("SELECT pg_terminate_backend(%s)", [listener.backend])
            known = f'SELECT backend FROM "{schema}".workers'.encode()
            assert eventually(lambda: db.execute(known).fetchone() == (None,))
            db.execute(f'UPDATE "{schema}".workers SET beat_at = beat_at - 2000000'.encode())
        stays_with(other, run, "worker")
        store.close()
        other.close()
