"""DBOS at its best, as a program of its own: `peer_dbos.py WORKLOAD SIZE [--store URL]`.

It runs in the environment locked in `requirements/bench-dbos.txt` and prints one JSON object; SIZE is a number of runs
for sleeps and signals, else of seconds. Without --store it makes a fresh SQLite file. Its best was found by trying
(`docs/bench.md` has the figures; the options below are what was tried):

- SQLite: a WAL file, `synchronous=FULL` (as for everybody), sync workflows on two executor threads (more only fight for
  the interpreter), at full load three processes with one thread each; a pool of four connections, polling every 10 ms
  instead of every second.
- PostgreSQL: three processes (one is bound by its interpreter), sync workflows on two executor threads each, no ping
  before each use of a connection, handles awaited in order and polled every 10 ms.

Waits would hold those two threads, so sleeps and signals are async workflows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import collector
from dbos import DBOS, DBOSConfig

POLL = 0.01
PAYLOAD = {"order": "o-1", "cents": 4200}


@DBOS.step()
def work(order: dict[str, Any], number: int) -> dict[str, Any]:
    return {"order": order["order"], "step": number}


@DBOS.step()
async def async_work(order: dict[str, Any], number: int) -> dict[str, Any]:
    return {"order": order["order"], "step": number}


@DBOS.workflow()
def steps(order: dict[str, Any], count: int) -> int:
    for number in range(count):
        work(order, number)
    return count


@DBOS.workflow()
async def async_steps(order: dict[str, Any], count: int) -> int:
    for number in range(count):
        await async_work(order, number)
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
    return rates(runs, per_run, time.perf_counter() - began)


async def async_throughput(seconds: float, concurrency: int, per_run: int) -> dict[str, float]:
    """The same with async workflows and steps; each of `concurrency` tasks starts one after another."""
    began = time.perf_counter()
    runs = 0

    async def one_after_another() -> None:
        nonlocal runs
        while time.perf_counter() - began < seconds:
            handle = await DBOS.start_workflow_async(async_steps, PAYLOAD, per_run)
            await handle.get_result(polling_interval_sec=POLL)
            runs += 1

    await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
    return rates(runs, per_run, time.perf_counter() - began)


def rates(runs: int, per_run: int, seconds: float) -> dict[str, float]:
    return {"runs": runs, "runs_per_s": runs / seconds, "steps_per_s": runs * per_run / seconds}


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
        started = time.perf_counter()
        handle = await DBOS.start_workflow_async(nap, 1.0)
        waiting.append(asyncio.ensure_future(late(handle, started)))
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


def measured(asked: argparse.Namespace, store: str) -> dict[str, Any]:
    config: DBOSConfig = {
        "name": "bench",
        "executor_id": str(os.getpid()),
        "system_database_url": store,
        "sys_db_pool_size": asked.pool,
        "max_executor_threads": asked.threads,
        "notification_listener_polling_interval_sec": POLL,
        "log_level": "ERROR",
    }
    if not store.startswith("sqlite"):
        config["db_engine_kwargs"] = {"pool_pre_ping": asked.ping}
    DBOS(config=config)
    DBOS.launch()
    steps(PAYLOAD, 3)
    if asked.at:
        time.sleep(max(0.0, asked.at - time.time()))

    def throughput_of(per_run: int) -> dict[str, float]:
        if asked.asynchronous:
            return asyncio.run(async_throughput(asked.size, asked.concurrency, per_run))
        return throughput(asked.size, asked.concurrency, per_run)

    workloads: dict[str, Callable[[], dict[str, Any]]] = {
        "steps-3": lambda: throughput_of(3),
        "steps-100": lambda: throughput_of(100),
        "latency": lambda: latency(asked.size),
        "sleeps": lambda: asyncio.run(sleeps(int(asked.size))),
        "signals": lambda: asyncio.run(signals(int(asked.size))),
        "migrate": dict,
    }
    answer = workloads[asked.workload]()
    DBOS.destroy()
    return answer


def together(asked: argparse.Namespace, store: str) -> dict[str, Any]:
    """Several processes on one database, each with its part of the concurrency; their rates are added."""
    command = [sys.executable, __file__, "--processes=1", f"--store={store}"]
    subprocess.run([*command, "migrate", "0"], check=True)
    share = [f"--concurrency={asked.concurrency // asked.processes}", f"--threads={asked.threads}"]
    share += [f"--pool={asked.pool}", *(["--async"] if asked.asynchronous else []), *(["--ping"] if asked.ping else [])]
    command += [*share, f"--at={time.time() + 3}", asked.workload, str(asked.size)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(asked.processes)]
    answers = [json.loads(each.communicate()[0].splitlines()[-1]) for each in processes]
    return {name: sum(each[name] for each in answers) for name in ("runs", "runs_per_s", "steps_per_s")}


def settings(asked: argparse.Namespace, store: str) -> str:
    """What this measurement was set to, for the table."""
    kind = "async workflows" if asked.asynchronous or asked.workload in ("sleeps", "signals") else "sync workflows"
    if asked.workload == "latency":
        kind += ", a plain call or a handle"
    ping = "" if store.startswith("sqlite") else f", ping={'on' if asked.ping else 'off'}"
    return f"{kind}, processes={asked.processes}, threads={asked.threads}, pool={asked.pool}, poll={POLL:g} s{ping}"


def main() -> None:
    collector.settle()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", choices=("steps-3", "steps-100", "latency", "sleeps", "signals", "migrate"))
    parser.add_argument("size", type=float)
    parser.add_argument("--store", help="a URL; default: a new SQLite file, removed afterwards")
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="executor threads for sync workflows")
    parser.add_argument("--pool", type=int, default=4, help="connections")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--async", action="store_true", dest="asynchronous", help="async workflows and steps")
    parser.add_argument("--ping", action="store_true", help="ask each connection whether it lives before using it")
    parser.add_argument("--at", type=float, default=0.0, help="Unix time: when to begin")
    asked = parser.parse_args()
    measure = together if asked.processes > 1 else measured
    said = settings(asked, asked.store or "sqlite")
    if asked.store:
        answer = measure(asked, asked.store)
    else:
        with tempfile.TemporaryDirectory(prefix="bench-dbos-") as folder:
            file = Path(folder, "dbos.db")
            with sqlite3.connect(file) as made:
                made.execute("PRAGMA journal_mode=WAL")
            answer = measure(asked, f"sqlite:///{file}")
    print(json.dumps({**answer, "settings": said, "version": version("dbos"), "python": sys.version.split()[0]}))


if __name__ == "__main__":
    main()
