"""DBOS on SQLite at its best, as a program of its own: `peer_dbos.py WORKLOAD SIZE [CONCURRENCY]`.

It runs in the environment locked in `requirements/bench-dbos.txt`, on a fresh file in a temporary folder, and prints
one JSON object; SIZE is a number of runs for sleeps and signals, else of seconds. Its best, found by trying: a WAL
file, `synchronous=FULL` (as for everybody), sync workflows on two executor threads (more only fight for the
interpreter), a pool of four connections, polling every 10 ms instead of every second. Waits would hold those two
threads, so sleeps and signals are async workflows.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dbos import DBOS, DBOSConfig

POLL = 0.01
PAYLOAD = {"order": "o-1", "cents": 4200}


@DBOS.step()
def work(order: dict[str, Any], number: int) -> dict[str, Any]:
    return {"order": order["order"], "step": number}


@DBOS.workflow()
def steps(order: dict[str, Any], count: int) -> int:
    for number in range(count):
        work(order, number)
    return count


@DBOS.workflow()
async def nap(seconds: float) -> None:
    await DBOS.sleep_async(seconds)


@DBOS.workflow()
async def waiter() -> Any:
    return await DBOS.recv_async("go", timeout_seconds=60)


def throughput(seconds: float, concurrency: int, per_run: int) -> dict[str, float]:
    """Runs and steps per second while `concurrency` runs are under way; at 1 the workflow is simply called."""
    began = time.perf_counter()
    runs = 0
    under_way: deque[Any] = deque()
    while time.perf_counter() - began < seconds:
        runs += 1
        if concurrency == 1:
            steps(PAYLOAD, per_run)
            continue
        if len(under_way) == concurrency:
            under_way.popleft().get_result(polling_interval_sec=POLL)
        under_way.append(DBOS.start_workflow(steps, PAYLOAD, per_run))
    for handle in under_way:
        handle.get_result(polling_interval_sec=POLL)
    taken = time.perf_counter() - began
    return {"runs_per_s": runs / taken, "steps_per_s": runs * per_run / taken}


def latency(seconds: float) -> dict[str, Any]:
    """Start to result of one run alone with 3 steps: the faster of a plain call and start + get_result."""

    def started() -> None:
        DBOS.start_workflow(steps, PAYLOAD, 3).get_result(polling_interval_sec=POLL)

    samples = [timed(way, seconds / 2) for way in (lambda: steps(PAYLOAD, 3), started)]
    return {"ms": min(samples, key=lambda each: sorted(each)[len(each) // 2])}


def timed(act: Callable[[], object], seconds: float) -> list[float]:
    taken = []
    end = time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        act()
        taken.append((time.perf_counter() - began) * 1000)
    return taken


async def sleeps(runs: int) -> dict[str, Any]:
    """For each run the milliseconds from its start to its result, less the second that was asked for."""

    async def late(handle: Any, started: float) -> float:
        await handle.get_result(polling_interval_sec=POLL)
        return (time.perf_counter() - started - 1.0) * 1000

    waiting = []
    for _ in range(runs):
        handle = await DBOS.start_workflow_async(nap, 1.0)
        waiting.append(asyncio.ensure_future(late(handle, time.perf_counter())))
    return {"ms": await asyncio.gather(*waiting)}


async def signals(times: int) -> dict[str, list[float]]:
    """Milliseconds from the send to the result of a run that was waiting."""
    taken = []
    for _ in range(times):
        handle = await DBOS.start_workflow_async(waiter)
        await asyncio.sleep(0.05)
        began = time.perf_counter()
        await DBOS.send_async(handle.workflow_id, "yes", "go")
        await handle.get_result(polling_interval_sec=POLL)
        taken.append((time.perf_counter() - began) * 1000)
    return {"ms": taken}


def main(workload: str, size: float, concurrency: int = 1) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-dbos-") as folder:
        file = Path(folder, "dbos.db")
        with sqlite3.connect(file) as made:
            made.execute("PRAGMA journal_mode=WAL")
        config: DBOSConfig = {
            "name": "bench",
            "system_database_url": f"sqlite:///{file}",
            "sys_db_pool_size": 4,
            "max_executor_threads": 2,
            "notification_listener_polling_interval_sec": POLL,
            "log_level": "ERROR",
        }
        DBOS(config=config)
        DBOS.launch()
        workloads: dict[str, Callable[[], dict[str, Any]]] = {
            "steps-3": lambda: throughput(size, concurrency, 3),
            "steps-100": lambda: throughput(size, concurrency, 100),
            "latency": lambda: latency(size),
            "sleeps": lambda: asyncio.run(sleeps(int(size))),
            "signals": lambda: asyncio.run(signals(int(size))),
        }
        steps(PAYLOAD, 3)
        answer = workloads[workload]()
        DBOS.destroy()
    return {"workload": workload, "version": version("dbos"), "python": sys.version.split()[0], **answer}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], float(sys.argv[2]), *map(int, sys.argv[3:]))))
