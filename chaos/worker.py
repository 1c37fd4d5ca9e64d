"""A worker process of a scenario: `python -m chaos.worker URL LEDGER SETTINGS`.

SETTINGS is a JSON object: the arguments of `Worker`, and beside them what is wrong with this process:

busy        seconds of workflow code without rest
hasty       code that never rests is tried again at once
clock       a file that holds by how many microseconds the clock of the (SQLite) store is wrong, read at every use
memory      bytes of address space
heartless   it lives, but nobody can tell
newer       it is of the next version, whose tables have one migration more
planted     a bug of `chaos/planted.py`, by name: to see that the audit finds it
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import mmap
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos import flows
from chaos.ledger import Ledger
from perdure import Limits, SQLiteStore, Worker
from perdure.stores.contract import Store
from perdure.worker import residents
from perdure.worker.lease import Heartbeat

NEXT_MIGRATION = """
ALTER TABLE perdure_runs ADD COLUMN note TEXT NOT NULL DEFAULT '';
ALTER TABLE perdure_mail ADD COLUMN note TEXT;
ALTER TABLE perdure_history ADD COLUMN note TEXT;
ALTER TABLE perdure_workers ADD COLUMN note TEXT;
CREATE TABLE perdure_notes (run INTEGER PRIMARY KEY, note TEXT NOT NULL);
CREATE INDEX perdure_runs_note ON perdure_runs (note) WHERE note <> '';
"""
"""The smallest migration that a next version could have: it only adds."""


def wrong_clock(file: str) -> Callable[[], int]:
    """The time, wrong by what stands in the file now."""
    with open(file, "r+b") as opened:
        offset = mmap.mmap(opened.fileno(), 8)
    return lambda: time.time_ns() // 1000 + int(struct.unpack("<q", offset[:8])[0])


def become_newer() -> None:
    """Be a process of the next version."""
    from perdure.stores.sqlite import migrations

    checksum = hashlib.sha256(NEXT_MIGRATION.encode()).hexdigest()
    number = migrations.MIGRATIONS[-1].number + 1
    added = migrations.Migration(number, f"{number:04}_notes.sql", NEXT_MIGRATION, checksum)
    migrations.MIGRATIONS = (*migrations.MIGRATIONS, added)  # type: ignore[misc]  # a final name, for all but us


def store_of(url: str, clock: str | None) -> str | Store:
    """What the worker is given as its store."""
    if clock is None:
        return url
    Ledger.clock = staticmethod(wrong_clock(clock))
    return SQLiteStore(url.removeprefix("sqlite:///"), clock=Ledger.clock)


async def main(url: str, settings: dict[str, Any]) -> int:
    if settings.pop("newer", False):
        become_newer()
    if settings.pop("heartless", False):
        Heartbeat.start = lambda self: None  # type: ignore[method-assign]
    if settings.pop("hasty", False):
        residents.FIRST_BACK_OFF = 10_000  # type: ignore[misc]  # a constant, for all but us
    if planted := settings.pop("planted", None):
        from chaos.planted import PLANTED

        PLANTED[planted]()
    if memory := settings.pop("memory", None):
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if busy := settings.pop("busy", None):
        settings["limits"] = Limits(busy=busy)
    store = store_of(url, settings.pop("clock", None))
    worker = Worker(store, workflows=[flows], activities=[flows], name=str(os.getpid()), **settings)
    await worker.run()
    if not isinstance(store, str):
        store.close()
    return 0 if worker.drained else 1


if __name__ == "__main__":
    # A write beyond RLIMIT_FSIZE is then an error of that write, as on a full disk.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s")
    logging.getLogger("perdure.worker").setLevel(logging.DEBUG)
    code = asyncio.run(main(sys.argv[1], json.loads(Path(sys.argv[3]).read_text(encoding="utf-8"))))
    # As `perdure worker`: threads that nobody can stop do not keep the process.
    os._exit(code)
