"""Behind PgBouncer in transaction mode: sessions belong to nobody, and all promises of the batch hold all the same."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator

import psycopg
import pytest

from perdure.core.turn import Claim, Committed
from perdure.stores.postgres import PostgresStore
from perdure.testing.conformance.story import EVENT, NAMESPACE, announce, held, sending, started
from tests import servers


@pytest.fixture(scope="module")
def pooled() -> Iterator[tuple[str, str]]:
    """The URLs of a pooler with two sessions, and of the server behind it."""
    pgbouncer = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if pgbouncer is None:
        pytest.skip("no PgBouncer here")
    database = servers.needed()
    if database.server is None:
        pytest.skip("no server of our own")
    server = database.server
    port = servers._free_port()
    (server.folder / "users").write_text('"postgres" ""\n')
    (server.folder / "pooler.ini").write_text(
        f"[databases]\npostgres = host=127.0.0.1 port={server.port}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = trust\n"
        f"auth_file = {server.folder}/users\npool_mode = transaction\ndefault_pool_size = 2\nmax_client_conn = 100\n"
    )
    subprocess.run(["chmod", "a+r", server.folder / "users", server.folder / "pooler.ini"], check=True)
    user = servers.UNPRIVILEGED if os.geteuid() == 0 else ()
    process = subprocess.Popen(
        [*user, pgbouncer, "-q", server.folder / "pooler.ini"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
    try:
        until = time.monotonic() + 10
        while True:
            try:
                psycopg.connect(url).close()
                break
            except psycopg.OperationalError:
                assert time.monotonic() < until, "the pooler does not answer"
                time.sleep(0.05)
        yield url, server.tcp_url
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def schema(pooled: tuple[str, str]) -> Iterator[str]:
    with servers.schema(servers.needed()) as schema:
        yield schema


def test_it_is_noticed_and_said(pooled: tuple[str, str], schema: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        store = PostgresStore(pooled[0], schema=schema)
    assert "through a pooler" in caplog.text
    announce(store)
    assert store._listener is None
    store.close()


def test_a_direct_url_brings_notifications_and_hints(
    pooled: tuple[str, str], schema: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        store = PostgresStore(pooled[0], schema=schema, direct=pooled[1])
    assert caplog.text == ""
    announce(store)
    until = time.monotonic() + 10
    while store._backend() == 0:
        assert time.monotonic() < until
        time.sleep(0.01)
    store.close()


def test_many_stores_share_two_sessions(pooled: tuple[str, str], schema: str) -> None:
    stores = [PostgresStore(pooled[0], schema=schema) for _ in range(6)]
    failed: list[BaseException] = []

    def works(n: int) -> None:
        try:
            store = stores[n]
            holders = [held(store, f"run-{n}-{m}", f"worker-{n}") for m in range(4)]
            for _ in range(20):
                for holder in holders:
                    holder.commits(events=[EVENT])
                    sending(store, holder.run, f"m{holder.version}")
                store.heartbeat(f"worker-{n}")
            turn = holders[0].turn()
            step = store.transaction(turn)
            step.connection.execute("SELECT 1")  # type: ignore[union-attr]  # its fence holds
            step.commit([EVENT])  # type: ignore[union-attr]
            holders[0].follows(turn)
            holders[0].events += 1
            for holder in holders:
                unread = [mail.id for mail in store.mailbox(holder.run)]
                assert holder.writes(holder.ending(consumed=unread)) == Committed(run=holder.run)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=works, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    assert stores[0].counts(NAMESPACE) == {"completed": 24}
    started(stores[0], "free")
    [head] = stores[1].claim(
        Claim(incarnation="worker-1", namespace=NAMESPACE, queues=["default"], workflows=["orders"])
    )
    assert head.row.id == "free"
    for store in stores:
        store.close()


def test_waiting_polls(pooled: tuple[str, str], schema: str) -> None:
    store = PostgresStore(pooled[0], schema=schema)
    announce(store)
    store.wait("worker", ["default"], 0)
    began = time.monotonic()
    assert store.wait("worker", ["default"], 30), "whoever waits is sent to look"
    assert time.monotonic() - began < 2
    store.close()
