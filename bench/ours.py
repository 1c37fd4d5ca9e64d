"""This engine's measurements, each a program of its own that prints one JSON object.

python bench/ours.py throughput --concurrency 256
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import workflows
from workflows import ALL, nap, nap_until, slow_steps, steps, steps_then_wait, sync_steps, waiter

from perdure import Client, Engine, Worker

Answer = dict[str, Any]


def engine_on(store: str) -> Engine:
    return Engine(store, workflows=ALL)


async def many(act: Callable[[int], Awaitable[object]], numbers: range, *, at_once: int = 256) -> None:
    """`act` on each number, at most so many at a time."""
    left = iter(numbers)

    async def one_after_another() -> None:
        for number in left:
            await act(number)

    await asyncio.gather(*(one_after_another() for _ in range(at_once)))


async def flow(engine: Engine, kind: Any, *, per_run: int, seconds: float, concurrency: int) -> Answer:
    """Keeps `concurrency` runs under way for so many seconds."""
    began = time.perf_counter()
    starts: list[float] = []
    ms: list[float] = []

    async def one_after_another() -> None:
        while (start := time.perf_counter()) < began + seconds:
            run = await engine.start(kind, "o-1", per_run)
            starts.append((time.perf_counter() - start) * 1000)
            await run.result()
            ms.append((time.perf_counter() - start) * 1000)

    await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
    spent = time.perf_counter() - began
    return {
        "runs_per_s": len(ms) / spent,
        "steps_per_s": len(ms) * per_run / spent,
        "ms": ms if concurrency == 1 else [],
        "worst_start_ms": max(starts),
    }


async def throughput(store: str, asked: argparse.Namespace) -> Answer:
    async with engine_on(store) as engine:
        kind = sync_steps if asked.sync else steps
        size = {"per_run": asked.steps, "concurrency": asked.concurrency}
        await flow(engine, kind, seconds=0.3, **size)
        if asked.at:
            await asyncio.sleep(asked.at - time.time())
        return await flow(engine, kind, seconds=asked.seconds, **size)


async def sleeps(store: str, asked: argparse.Namespace) -> Answer:
    """For each run the milliseconds from its start to its result, less the second that was asked for."""
    ms: list[float] = []

    async def one(engine: Engine) -> None:
        run = await engine.start(nap, 1.0)
        started = time.perf_counter()
        await run.result()
        ms.append((time.perf_counter() - started - 1.0) * 1000)

    async with engine_on(store) as engine:
        await asyncio.gather(*(one(engine) for _ in range(asked.runs)))
    return {"ms": ms}


async def signals(store: str, asked: argparse.Namespace) -> Answer:
    """Milliseconds from the signal to the result of a run that was waiting for it."""
    ms: list[float] = []
    async with engine_on(store) as engine:
        for _ in range(asked.runs):
            run = await engine.start(waiter)
            await asyncio.sleep(0.01)
            began = time.perf_counter()
            await run.signal("go", "yes")
            await run.result()
            ms.append((time.perf_counter() - began) * 1000)
    return {"ms": ms}


async def flat(store: str, asked: argparse.Namespace) -> Answer:
    """Milliseconds and CPU milliseconds per run around the 1,000th and around the last one, all in one store."""

    async def run_some(engine: Engine, number: int) -> tuple[float, float]:
        async def one(_: int) -> None:
            await (await engine.start(steps, "o-1", 3)).result()

        wall, cpu = time.perf_counter(), time.process_time()
        await many(one, range(number))
        return (time.perf_counter() - wall) * 1000 / number, (time.process_time() - cpu) * 1000 / number

    async with engine_on(store) as engine:
        await run_some(engine, 500)
        early = [await run_some(engine, 250) for _ in range(8)]
        await run_some(engine, asked.runs - 4500)
        late = [await run_some(engine, 250) for _ in range(8)]
    return {
        "early_ms": [wall for wall, _ in early],
        "late_ms": [wall for wall, _ in late],
        "early_cpu_ms": [cpu for _, cpu in early],
        "late_cpu_ms": [cpu for _, cpu in late],
    }


async def park(store: str, asked: argparse.Namespace) -> Answer:
    """Leaves runs in the store: most wait for a signal, the last 2,000 for one instant, 12 seconds from then."""
    async with engine_on(store) as engine:

        async def wait_for_signal(number: int) -> None:
            await engine.options(id=f"waiter-{number}").start(waiter)

        async def wait_for_instant(number: int) -> None:
            await engine.options(id=f"sleeper-{number}").start(nap_until, when)

        began = time.perf_counter()
        await many(wait_for_signal, range(asked.runs - 2000))
        when = datetime.now(timezone.utc) + timedelta(seconds=12)
        await many(wait_for_instant, range(2000))
        seconds = time.perf_counter() - began
        memory = megabytes("VmRSS")
    return {"at": when.timestamp(), "starts_per_s": asked.runs / seconds, "mb_having_parked": memory}


async def wake(store: str, asked: argparse.Namespace) -> Answer:
    """A worker that never saw the parked runs: its memory, and how long after the instant the last one ends."""
    async with engine_on(store) as engine:
        await asyncio.sleep(max(0.0, asked.at - 1 - time.time()))
        memory = megabytes("VmRSS")
        missed = time.time() > asked.at
        await asyncio.gather(*(engine.handle(f"sleeper-{number}").result() for number in range(2000)))
        late = time.time() - asked.at
    return {"mb": memory, "mb_peak": megabytes("VmHWM"), "late_s": late, "opened_too_late": missed}


async def idle(store: str, asked: argparse.Namespace) -> Answer:
    """CPU seconds per second of a worker that has nothing to do but a parked run."""
    async with engine_on(store) as engine:
        await engine.start(waiter)
        await asyncio.sleep(2)
        began = time.process_time()
        await asyncio.sleep(asked.seconds)
        return {"core": (time.process_time() - began) / asked.seconds}


async def record(store: str, asked: argparse.Namespace) -> Answer:
    """Leaves one run with many recorded steps and ten with one, all waiting for a signal."""
    async with engine_on(store) as engine:
        await engine.options(id="long").start(steps_then_wait, "o-1", asked.steps)
        for number in range(10):
            await engine.options(id=f"short-{number}").start(steps_then_wait, "o-1", 1)
        while (await engine.handle("long").info()).history_size < asked.steps:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
    return {}


async def replay(store: str, asked: argparse.Namespace) -> Answer:
    """Signal to result of runs that must be rebuilt first: the long one, and the median of the short ones."""
    async with engine_on(store) as engine:
        await asyncio.sleep(0.5)

        async def rebuilt(run_id: str) -> float:
            began = time.perf_counter()
            await engine.handle(run_id).signal("go", "yes")
            await engine.handle(run_id).result()
            return (time.perf_counter() - began) * 1000

        short = sorted([await rebuilt(f"short-{number}") for number in range(10)])
        return {"short_ms": short[5], "long_ms": await rebuilt("long")}


async def serve(store: str, asked: argparse.Namespace) -> Answer:
    await Worker(store, workflows=ALL).run()
    return {}


async def recovery(store: str, asked: argparse.Namespace) -> Answer:
    """Two workers; the one that does more is killed with SIGKILL; the ledger tells what the other one did about it."""
    ledger = Path(tempfile.mkdtemp(prefix="bench-ledger-"), "ledger.txt")
    environment = {**os.environ, workflows.LEDGER: str(ledger)}
    command = [sys.executable, __file__, "serve", "--store", store]
    workers = [await asyncio.create_subprocess_exec(*command, env=environment) for _ in range(2)]
    async with Client(store) as client:
        await asyncio.sleep(1.5)
        runs = [await client.options(id=f"run-{n}").start(slow_steps, 60) for n in range(asked.runs)]
        await asyncio.sleep(1.5)
        before = notes(ledger)
        victim = max(workers, key=lambda each: sum(pid == each.pid for _, _, pid, _ in before))
        killed_at = time.time()
        victim.kill()
        await victim.wait()
        results = await asyncio.gather(*(run.result(timeout=60) for run in runs), return_exceptions=True)
    for worker in workers:
        if worker.returncode is None:
            worker.terminate()
            await worker.wait()
    lines = notes(ledger)
    owned = {run: pid for run, _, pid, at in lines if at <= killed_at}
    orphans = {run for run, pid in owned.items() if pid == victim.pid}
    first = {run: at for run, _, pid, at in reversed(lines) if pid != victim.pid and at > killed_at}
    return {
        "gone_on_ms": sorted((first[run] - killed_at) * 1000 for run in orphans if run in first),
        "orphans": len(orphans),
        "lost": asked.runs - results.count(60),
        "re_executed": len(lines) - len({(run, step) for run, step, _, _ in lines}),
    }


def notes(ledger: Path) -> list[tuple[str, str, int, float]]:
    parts = [line.split() for line in ledger.read_text().splitlines()]
    return [(run, step, int(pid), float(at)) for run, step, pid, at in parts]


def megabytes(field: str) -> float:
    """VmRSS (now) or VmHWM (at most, ever) of this process; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


MEASUREMENTS = {
    each.__name__: each
    for each in (throughput, sleeps, signals, flat, park, wake, idle, record, replay, serve, recovery)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("--store", help="default: a new SQLite file, removed afterwards")
    parser.add_argument("--sync", action="store_true", help="a def workflow with def steps")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--at", type=float, default=0.0, help="Unix time: when to begin, or the instant of waking")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-perdure-") as folder:
        store = asked.store or f"sqlite:///{folder}/bench.db"
        answer = asyncio.run(MEASUREMENTS[asked.measurement](store, asked))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
