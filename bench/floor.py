"""The floor: the engine's own rows and commits, written without the engine.

A run is a coroutine that awaits its step and then its commit, as in the engine; a commit is acknowledged after
`COMMIT` with `synchronous=FULL`. There are three ways to write, and the best counts: *inline* (each commit its own
transaction, at once), *turn* (all commits of one turn of the event loop share a transaction), *thread* (a writing
thread takes whatever has gathered). The rows are what `shape.py` saw the engine write; `--bare` writes only five rows
of history per 3-step run (start, steps, end), without an index, and never touches a run's row.

    python bench/floor.py --steps 3 --seconds 3 --concurrency 256
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

from engine_rows import watched
from shape import Shape, Watch

BARE = "CREATE TABLE history (run INTEGER NOT NULL, seq INTEGER NOT NULL, body TEXT NOT NULL)"
ROWS_PER_STATEMENT = 64
"""More rows in one statement gain nothing, and SQLite binds at most 32,766 values."""

Commit = tuple[int, int]
"""(number of the commit in its run, number of the run)"""


def opened(path: Path, schema: Iterable[str] = ()) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=1024)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    for sql in schema:
        db.execute(sql)
    return db


class Writer:
    """Writes a batch of commits in one transaction of a few statements with many rows each."""

    def __init__(self, db: sqlite3.Connection, shape: Shape) -> None:
        self.db, self.shape = db, shape

    def write(self, batch: list[Commit]) -> None:
        alike: dict[int, list[int]] = defaultdict(list)
        for commit, run in batch:
            alike[commit].append(run)
        execute = self.db.execute
        execute("BEGIN IMMEDIATE")
        for commit, runs in alike.items():
            numbered = [(run, f"{run:08d}") for run in runs]
            for write in self.shape.commits[commit]:
                for start in range(0, len(numbered), ROWS_PER_STATEMENT):
                    some = numbered[start : start + ROWS_PER_STATEMENT]
                    bound = [value for n, s in some for value in write.values(n, s)]
                    execute(f"{write.head}{', '.join([write.row] * len(some))}{write.tail}", bound)
        execute("COMMIT")


class Inline:
    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    async def commit(self, commit: int, run: int) -> None:
        self.writer.write([(commit, run)])

    def close(self) -> None: ...


class PerTurn:
    def __init__(self, writer: Writer) -> None:
        self.writer, self.loop = writer, asyncio.get_running_loop()
        self.batch: list[Commit] = []
        self.done = self.loop.create_future()

    def commit(self, commit: int, run: int) -> asyncio.Future[None]:
        if not self.batch:
            self.loop.call_soon(self.flush)
        self.batch.append((commit, run))
        return self.done

    def flush(self) -> None:
        batch, done = self.batch, self.done
        self.batch, self.done = [], self.loop.create_future()
        self.writer.write(batch)
        done.set_result(None)

    def close(self) -> None: ...


class InThread:
    def __init__(self, writer: Writer) -> None:
        self.writer, self.loop = writer, asyncio.get_running_loop()
        self.batch: list[Commit] = []
        self.done = self.loop.create_future()
        self.lock, self.work = threading.Lock(), threading.Semaphore(0)
        self.thread = threading.Thread(target=self.keep_writing, daemon=True)
        self.thread.start()

    def commit(self, commit: int, run: int) -> asyncio.Future[None]:
        with self.lock:
            self.batch.append((commit, run))
            if len(self.batch) == 1:
                # At the end of this turn of the loop, so that its other runs share the batch.
                self.loop.call_soon(self.work.release)
            return self.done

    def keep_writing(self) -> None:
        while self.work.acquire():
            with self.lock:
                batch, done = self.batch, self.done
                self.batch, self.done = [], self.loop.create_future()
            if not batch:
                return
            self.writer.write(batch)
            self.loop.call_soon_threadsafe(done.set_result, None)

    def close(self) -> None:
        self.work.release()
        self.thread.join()


WAYS: dict[str, type[Inline | PerTurn | InThread]] = {"inline": Inline, "turn": PerTurn, "thread": InThread}


async def work(order: str, number: int) -> dict[str, Any]:
    """What a step does here and in the engine's rows: nothing, with a small answer."""
    return {"order": order, "step": number}


async def drive(
    way: str, writer: Writer, *, steps: int, seconds: float, concurrency: int, rest: float = 0.0
) -> list[float]:
    """Runs `concurrency` at a time until the seconds are over; milliseconds from start to result of each.

    rest: seconds of quiet before each commit; then the milliseconds are those of each commit alone. A disk and a
    processor that have rested take longer than in a loop that leaves them no time to.
    """
    committer = WAYS[way](writer)
    numbers = count()
    end = time.perf_counter() + seconds
    taken: list[float] = []

    async def one_after_rest() -> None:
        while time.perf_counter() < end:
            run = next(numbers)
            for step in range(steps + 1):
                await asyncio.sleep(rest)
                began = time.perf_counter()
                await committer.commit(step, run)
                taken.append((time.perf_counter() - began) * 1000)

    async def one_after_another() -> None:
        while (began := time.perf_counter()) < end:
            run = next(numbers)
            await committer.commit(0, run)
            for step in range(1, steps + 1):
                await work("o-1", step)
                await committer.commit(step, run)
            taken.append((time.perf_counter() - began) * 1000)

    await asyncio.gather(*((one_after_rest if rest else one_after_another)() for _ in range(concurrency)))
    committer.close()
    return taken


def measured(
    way: str, shape: Shape, *, steps: int, seconds: float, concurrency: int, rest: float = 0.0
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-floor-") as folder:
        db = opened(Path(folder, "floor.db"), shape.schema)
        began = time.perf_counter()
        ms = asyncio.run(
            drive(way, Writer(db, shape), steps=steps, seconds=seconds, concurrency=concurrency, rest=rest)
        )
        spent = time.perf_counter() - began
        db.close()
    return {"way": way, "runs_per_s": len(ms) / spent, "steps_per_s": len(ms) * steps / spent, "ms": ms}


def bare_shape(steps: int) -> Shape:
    """Rows of history alone: start, each step, end; the last step and the end are one commit."""
    with tempfile.TemporaryDirectory() as folder:
        db = opened(Path(folder, "bare.db"), [BARE])
        watch = Watch(db)
        for run in (1, 2):
            watch.look()
            for commit in range(steps + 1):
                for seq in (commit, commit + 1) if commit == steps else (commit,):
                    db.execute(
                        "INSERT INTO history VALUES (?, ?, ?)", (run, seq, f'{{"order":"o-{run}","step":{seq}}}')
                    )
                watch.look()
        return watch.shape()


def engine_shape(steps: int) -> tuple[Shape, str]:
    """What the engine writes for a run with this many steps, watched at work on a file of its own; and whose rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "watched.db")
        watch = watched(f"sqlite:///{path}", steps, lambda: Watch(sqlite3.connect(path)))
        return watch.shape(), "the rows of the engine"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--way", choices=WAYS, help="this way instead of the best")
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--rest", type=float, default=0.0, help="seconds of quiet before each commit")
    asked = parser.parse_args()
    shape, whose = (bare_shape(asked.steps), "history alone") if asked.bare else engine_shape(asked.steps)
    size = {"steps": asked.steps, "concurrency": asked.concurrency}
    trials = {way: measured(way, shape, seconds=asked.seconds / 8, **size)["runs_per_s"] for way in WAYS}
    # A short trial cannot tell two ways apart that are close: both are measured.
    ways = [asked.way] if asked.way else [way for way in WAYS if trials[way] > 0.7 * max(trials.values())]
    runs = (measured(way, shape, seconds=asked.seconds, rest=asked.rest, **size) for way in ways)
    best = max(runs, key=lambda one: one["runs_per_s"])
    if asked.concurrency > 1:
        del best["ms"]
    print(json.dumps({**best, "rows_per_run": shape.rows, "rows_of": whose}))


if __name__ == "__main__":
    main()
