"""The floor on PostgreSQL: the engine's own rows, in its form and batches, written by psycopg without the engine.

Its transactions hold as many turns as the engine's did (`--batch`), those of runs at every stage, and are sent as one
pipeline each on one connection. The rows and tables are what `pg_shape.py` saw the engine write. `--bare` only inserts
them: no row is updated, locked or fenced. The better of two ways counts: each transaction packed and then written, or
packed by another thread while the one before is written. Alone (`--concurrency 1`) a run is its commits one after
another.

    python bench/pg_floor.py --store postgresql://… --steps 3 --seconds 3 --batch 64 [--bare]
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import psycopg
from engine_rows import watched
from meter import Meter
from pg_shape import FIRST, Packed, PostgresWatch, Shape, Write, packed

Commits = tuple[tuple[Write, ...], ...]
Statements = list[tuple[bytes, list[Packed]]]


def engine_shape(store: str, steps: int) -> Shape:
    """What the engine writes for a run with so many steps, watched at work in a database of its own."""
    with psycopg.connect(store, autocommit=True) as db:
        watch = watched(store, steps, lambda: PostgresWatch(db))
        assert isinstance(watch, PostgresWatch)
        return watch.postgres_shape()


def transaction(commits: Commits, turns: list[tuple[int, range]]) -> Statements:
    """One statement per table and set of columns, with the rows of all these turns: (number of commit, runs)."""
    alike: dict[bytes, tuple[Write, list[tuple[Any, ...]]]] = {}
    for commit, runs in turns:
        for write in commits[commit]:
            _, rows = alike.setdefault(write.sql, (write, []))
            rows.extend(write.values(run, f"{run:08d}") for run in runs)
    return [(sql, packed(write, rows)) for sql, (write, rows) in alike.items()]


def staggered(commits: Commits, each: int) -> Iterator[Statements]:
    """Transactions without end; `each` runs are at each stage, so that one of them ends `each` runs."""
    for turn in count():
        turns = []
        for commit in range(len(commits)):
            first = FIRST + each * (turn - commit)
            if first >= FIRST:
                turns.append((commit, range(first, first + each)))
        yield transaction(commits, turns)


def connected(store: str) -> psycopg.Connection[Any]:
    """With what makes the updates quickest: tables that were never analysed would be hashed or merged."""
    settings = "-c enable_hashjoin=off -c enable_mergejoin=off -c enable_seqscan=off"
    return psycopg.connect(store, autocommit=True, options=settings)


def write(db: psycopg.Connection[Any], statements: Statements) -> None:
    with db.pipeline():
        db.execute(b"BEGIN", prepare=True)
        for sql, arrays in statements:
            db.execute(sql, arrays, prepare=True)
        db.execute(b"COMMIT", prepare=True)


def in_turn(db: psycopg.Connection[Any], source: Iterator[Statements], until: float) -> int:
    written = 0
    while time.perf_counter() < until:
        write(db, next(source))
        written += 1
    return written


def ahead(db: psycopg.Connection[Any], source: Iterator[Statements], until: float) -> int:
    ready: queue.Queue[Statements] = queue.Queue(maxsize=2)
    over = threading.Event()

    def pack() -> None:
        while not over.is_set():
            ready.put(next(source))

    packer = threading.Thread(target=pack, daemon=True)
    packer.start()
    written = 0
    while time.perf_counter() < until:
        write(db, ready.get())
        written += 1
    over.set()
    while packer.is_alive():
        try:
            ready.get(timeout=0.01)
        except queue.Empty:
            pass
    return written


WAYS: dict[str, Callable[[psycopg.Connection[Any], Iterator[Statements], float], int]] = {
    "in turn": in_turn,
    "ahead": ahead,
}


def throughput(store: str, commits: Commits, asked: argparse.Namespace) -> dict[str, Any]:
    each = max(1, round(asked.batch / len(commits)))
    source = staggered(commits, each)
    found: dict[str, dict[str, Any]] = {}
    with connected(store) as db:
        # The first transactions have no run at the later stages yet.
        in_turn(db, source, time.perf_counter() + 0.3)
        for name, way in WAYS.items():
            meter = Meter(store)
            transactions = way(db, source, time.perf_counter() + asked.seconds / len(WAYS))
            found[name] = {"way": name, **meter.per_run(transactions * each)}
    best = max(found.values(), key=lambda one: one["runs_per_s"])
    return {**best, "steps_per_s": best["runs_per_s"] * asked.steps}


def latency(store: str, commits: Commits, asked: argparse.Namespace) -> dict[str, Any]:
    ms: list[float] = []
    commit_ms: list[float] = []
    with connected(store) as db:
        end = time.perf_counter() + asked.seconds
        for run in count(FIRST):
            began = last = time.perf_counter()
            for commit in range(len(commits)):
                write(db, transaction(commits, [(commit, range(run, run + 1))]))
                last, before = time.perf_counter(), last
                commit_ms.append((last - before) * 1000)
            ms.append((last - began) * 1000)
            if last > end:
                break
    return {"ms": ms, "commit_ms": commit_ms}


def rows(commits: Commits) -> dict[str, int]:
    counted: dict[str, int] = defaultdict(int)
    for commit in commits:
        for each in commit:
            counted["inserted" if each.inserts else "updated"] += 1
    return dict(counted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="an empty database, whose tables the engine makes")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--batch", type=float, default=64.0, help="turns in a transaction")
    parser.add_argument("--bare", action="store_true")
    asked = parser.parse_args()
    shape = engine_shape(asked.store, asked.steps)
    commits = shape.bare() if asked.bare else shape.commits
    measure = latency if asked.concurrency == 1 else throughput
    print(json.dumps({**measure(asked.store, commits, asked), "rows_per_run": rows(commits), "batch": asked.batch}))


if __name__ == "__main__":
    main()
