"""Absurd at its best on PostgreSQL, as a program of its own: `peer_absurd.py WORKLOAD SECONDS --store URL`.

It runs in the environment locked in `requirements/bench-absurd.txt`; the schema is the one that `absurdctl` brings. It
prints one JSON object. Its best was found by trying (`docs/bench.md` has the figures; the options below are what was
tried): sync workers in processes of their own, each taking its tasks one after another in batches; tasks are spawned
through the SDK by one more process. That one keeps `concurrency` tasks under way by counting them with one indexed
statement, because `await_task_result`, a poll per task that begins with 50 ms, would hold Absurd back.

Alone, a run is fastest without any polling: spawned, worked off and fetched by one process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Final

import collector
import psycopg
from absurd_sdk import Absurd, AsyncAbsurd
from absurdctl import BUNDLED_SCHEMA_SQL

QUEUE: Final = "bench"
PAYLOAD = {"order": "o-1", "cents": 4200, "count": 3}

Database = psycopg.Connection[tuple[int]]


def steps(params: dict[str, Any], ctx: Any) -> int:
    for number in range(params["count"]):
        ctx.step(f"step-{number}", lambda number=number: {"order": params["order"], "step": number})
    return int(params["count"])


async def async_steps(params: dict[str, Any], ctx: Any) -> int:
    for number in range(params["count"]):

        async def work(number: int = number) -> dict[str, Any]:
            return {"order": params["order"], "step": number}

        await ctx.step(f"step-{number}", work)
    return int(params["count"])


def opened(store: str) -> Absurd:
    app = Absurd(store, queue_name=QUEUE)
    app.register_task(name="steps")(steps)
    return app


def install(store: str) -> None:
    """What `absurdctl init` does, without needing `psql`."""
    with psycopg.connect(store) as made:
        made.execute(BUNDLED_SCHEMA_SQL)
    Absurd(store, queue_name=QUEUE).create_queue()


def work(store: str, asked: argparse.Namespace) -> None:
    """One worker; it says when it is ready, and ends with its standard input, so that none outlives the measurement."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    if asked.asynchronous:
        asyncio.run(work_async(store, asked))
        return
    app = opened(store)
    print("ready", flush=True)
    app.start_worker(concurrency=asked.threads, batch_size=asked.batch, poll_interval=asked.poll)


async def work_async(store: str, asked: argparse.Namespace) -> None:
    app = AsyncAbsurd(store, queue_name=QUEUE)
    app.register_task(name="steps")(async_steps)
    print("ready", flush=True)
    await app.start_worker(concurrency=asked.threads, batch_size=asked.batch, poll_interval=asked.poll)


def throughput(store: str, asked: argparse.Namespace) -> dict[str, float]:
    """Runs and steps per second while `concurrency` tasks are under way."""
    command = [sys.executable, __file__, "work", "0", f"--store={store}", f"--threads={asked.threads}"]
    command += [f"--batch={asked.batch}", f"--poll={asked.poll}", *(["--async"] if asked.asynchronous else [])]
    pipe = subprocess.PIPE
    workers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(asked.workers)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    app = opened(store)
    with psycopg.connect(store, autocommit=True) as watch:
        keep_under_way(app, watch, asked.concurrency, 1.0)
        before, began = ended(watch), time.perf_counter()
        keep_under_way(app, watch, asked.concurrency, asked.seconds)
        runs, seconds = ended(watch) - before, time.perf_counter() - began
    for worker in workers:
        worker.communicate()
    return {"runs": runs, "runs_per_s": runs / seconds, "steps_per_s": runs * 3 / seconds}


def keep_under_way(app: Absurd, watch: Database, concurrency: int, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        under_way = count(watch, f"SELECT count(*) FROM absurd.r_{QUEUE} WHERE state IN ('pending', 'running')")
        with app._conn.transaction():
            for _ in range(concurrency - under_way):
                app.spawn("steps", PAYLOAD)
        time.sleep(0.02)


def ended(watch: Database) -> int:
    return count(watch, f"SELECT count(*) FROM absurd.t_{QUEUE} WHERE state = 'completed'")


def count(watch: Database, sql: str) -> int:
    row = watch.execute(sql.encode()).fetchone()
    assert row is not None
    return int(row[0])


def latency(store: str, asked: argparse.Namespace) -> dict[str, list[float]]:
    """Start to result of one run alone: spawned, worked off and fetched by one process."""
    app = opened(store)

    def one() -> None:
        task = app.spawn("steps", PAYLOAD)["task_id"]
        app.work_batch()
        found = app.fetch_task_result(task)
        assert found is not None
        assert found.state == "completed"

    timed(one, 0.3)
    return {"ms": timed(one, asked.seconds)}


def timed(act: Callable[[], object], seconds: float) -> list[float]:
    taken = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        act()
        taken.append((time.perf_counter() - began) * 1000)
    return taken


def settings(asked: argparse.Namespace) -> str:
    """What this measurement was set to, for the table."""
    if asked.workload == "latency":
        return "one process that spawns, works off and fetches"
    kind = "async workers" if asked.asynchronous else "sync workers"
    return f"{kind}, processes={asked.workers}, threads={asked.threads}, batch={asked.batch}, poll={asked.poll:g} s"


def main() -> None:
    collector.settle()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=("steps-3", "latency", "work"))
    parser.add_argument("seconds", type=float)
    parser.add_argument("--store", required=True)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--threads", type=int, default=1, help="tasks at once in each worker")
    parser.add_argument("--batch", type=int, default=32, help="tasks claimed at once")
    parser.add_argument("--poll", type=float, default=0.01, help="seconds between looks of an idle worker")
    parser.add_argument("--async", action="store_true", dest="asynchronous", help="async workers and steps")
    asked = parser.parse_args()
    if asked.workload == "work":
        work(asked.store, asked)
        return
    install(asked.store)
    measure: Callable[..., dict[str, Any]] = throughput if asked.workload == "steps-3" else latency
    said = {"settings": settings(asked), "version": version("absurd-sdk"), "python": sys.version.split()[0]}
    print(json.dumps({**measure(asked.store, asked), **said}))


if __name__ == "__main__":
    main()
