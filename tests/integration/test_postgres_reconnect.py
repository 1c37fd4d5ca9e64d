"""How often a process knocks at a PostgreSQL server that is away."""

from __future__ import annotations

import socket
import threading
import time

import psycopg
import pytest

from perdure.stores.postgres.connections import LAST_PAUSE, Address


def test_all_threads_together_knock_seldom() -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        knocks: list[float] = []

        def open_and_close() -> None:
            while True:
                try:
                    knocking, _ = door.accept()
                except OSError:
                    return
                knocks.append(time.monotonic())
                knocking.close()

        threading.Thread(target=open_and_close, daemon=True).start()
        port = door.getsockname()[1]
        url = f"postgresql://postgres@127.0.0.1:{port}/postgres?sslmode=disable&gssencmode=disable"
        address = Address(url, password=None, shown={})
        deadline = time.monotonic() + 1.5

        def insist() -> None:
            while time.monotonic() < deadline:
                with pytest.raises(psycopg.OperationalError):
                    address.connect()
                time.sleep(0.001)

        threads = [threading.Thread(target=insist) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # 50 ms doubling: five pauses in 1.5 s, and what the four did before the first of them had failed.
    assert len(knocks) <= 10
    assert LAST_PAUSE > 1
