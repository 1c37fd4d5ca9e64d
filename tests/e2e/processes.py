"""Real worker processes for tests: started, stopped, killed; what they did, read from their ledger and the store."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perdure import SQLiteStore

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0
"""Seconds after which what a test waits for is taken as never coming."""


async def until(found: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Wait for a value that is true; AssertionError naming what did not come."""
    deadline = time.monotonic() + seconds
    while True:
        value = found()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        await asyncio.sleep(0.002)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of the ledger: a function began or ended."""

    what: str
    run: str
    step: str
    attempt: int
    key: str
    pid: int
    epoch: int
    at: int


class Site:
    """A store and the worker processes on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "runs.db"
        # A disk that others keep busy is waited for: this is not about the store's patience.
        self.url = f"sqlite:///{self.path}?busy_timeout=60"
        self.ledger_path = folder / "ledger.jsonl"
        self.ledger_path.touch()
        SQLiteStore(self.path).close()  # so that there are tables to look into
        self.processes: list[subprocess.Popen[bytes]] = []

    def worker(self, **settings: Any) -> subprocess.Popen[bytes]:
        """Start a worker process; it serves some time later, see `serving`."""
        settings.setdefault("queues", ["default", "remote"])
        with open(self.folder / "workers.log", "ab") as log:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.e2e.worker_process",
                    self.url,
                    str(self.ledger_path),
                    json.dumps(settings),
                ],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    async def serving(self, *processes: subprocess.Popen[bytes]) -> None:
        """Wait until each has announced itself."""
        names = {str(process.pid) for process in processes}
        await until(lambda: names <= {name for (name,) in self.ask("SELECT name FROM perdure_workers")}, "a worker")

    def ledger(self, what: str = "begin", *, step: str | None = None, run: str | None = None) -> list[Line]:
        """What was done, oldest first."""
        with open(self.ledger_path, encoding="utf-8") as file:
            lines = [Line(**json.loads(line)) for line in file]
        return [
            line
            for line in lines
            if line.what == what and (step is None or line.step == step) and (run is None or line.run == run)
        ]

    def ask(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """Rows of the database, read by a connection of its own."""
        with self.database() as db:
            return db.execute(query, parameters).fetchall()

    @contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        try:
            yield db
        finally:
            db.close()

    def log(self) -> str:
        """What the workers logged."""
        return (self.folder / "workers.log").read_text(encoding="utf-8", errors="replace")

    def close(self) -> None:
        """Kill what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()


async def ended(process: subprocess.Popen[bytes], seconds: float = PATIENCE) -> int:
    """Wait for the end of a process; its exit code, negative for a signal."""
    await until(lambda: process.poll() is not None, f"the end of process {process.pid}", seconds)
    assert process.returncode is not None
    return process.returncode


def microseconds() -> int:
    return time.time_ns() // 1000


def killed(process: subprocess.Popen[bytes]) -> int:
    """Kill at once; the time at which the process was gone."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return microseconds()
