"""Measurements with several workers, each a process of its own, on one store; prints one JSON object.

python bench/fleet.py workers --store postgresql://… --workers 2
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import threading
import time
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import proc
import workflows
from meter import Server
from table import percentile
from workflows import ALL, signed, slow_steps

from perdure import Client, UnknownWorkflow, Worker

Answer = dict[str, Any]
SLOW = 0.05
"""Seconds that a step of `slow_steps` takes."""


async def serve(asked: argparse.Namespace) -> Answer:
    # With its standard input, so that none outlives a measurement that was killed.
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    await Worker(asked.store, workflows=ALL, lease=asked.lease).run()
    return {}


@asynccontextmanager
async def working(asked: argparse.Namespace, **environment: str) -> AsyncIterator[list[Process]]:
    """So many workers, all started at once on what may still be an empty database."""
    command = [sys.executable, __file__, "serve", f"--store={asked.store}", f"--lease={asked.lease}"]
    processes = [
        await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, **environment},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
        )
        for _ in range(asked.workers)
    ]
    try:
        yield processes
    finally:
        for each in processes:
            if each.returncode is None:
                each.send_signal(signal.SIGCONT)
                each.terminate()
        await asyncio.gather(*(each.wait() for each in processes))


class Load:
    """Runs of `signed`, so many under way at a time, or so many per second."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.done: Counter[int] = Counter()
        self.started = 0
        self.claim_ms: list[tuple[float, float]] = []
        """(when it was started, until its first step began)"""
        self.ms: list[float] = []

    async def one(self) -> None:
        self.started += 1
        began = time.time()
        run = await self.client.start(signed, "o-1", 3)
        pid, first_step = await run.result()
        self.done[pid] += 1
        self.claim_ms.append((began, (first_step - began) * 1000))
        self.ms.append((time.time() - began) * 1000)

    async def keep(self, concurrency: int, seconds: float) -> None:
        until = time.perf_counter() + seconds

        async def one_after_another() -> None:
            while time.perf_counter() < until:
                await self.one()

        await asyncio.gather(*(one_after_another() for _ in range(concurrency)))

    async def paced(self, rate: float, seconds: float) -> None:
        began = time.perf_counter()
        begun: set[asyncio.Future[None]] = set()
        while (passed := time.perf_counter() - began) < seconds:
            for _ in range(int(rate * passed) - len(begun)):
                begun.add(asyncio.ensure_future(self.one()))
            await asyncio.sleep(0.01)
        await asyncio.gather(*begun)


async def ready(client: Client, processes: list[Process]) -> None:
    """Until each worker has done a run."""
    load = Load(client)
    until = time.monotonic() + 60
    while not load.done.keys() >= {each.pid for each in processes}:
        if time.monotonic() > until or any(each.returncode is not None for each in processes):
            raise RuntimeError("not every worker has begun to work")
        try:
            await load.keep(32 * len(processes), 0.3)
        except UnknownWorkflow:
            # Nobody has announced anything yet.
            await asyncio.sleep(0.1)


async def workers(asked: argparse.Namespace) -> Answer:
    """CPU seconds per step of all workers and of the server; how the runs were shared, and whether any was lost."""
    server = Server(asked.store)
    async with working(asked) as processes, Client(asked.store) as client:
        await ready(client, processes)
        await Load(client).keep(asked.concurrency, 1.0)
        load = Load(client)
        began = time.perf_counter()
        cpu = sum(proc.of_process(each.pid) for each in processes)
        server_cpu = server.cpu()
        await load.keep(asked.concurrency, asked.seconds)
        spent = time.perf_counter() - began
        cpu = sum(proc.of_process(each.pid) for each in processes) - cpu
        server_cpu = server.cpu() - server_cpu
    server.close()
    runs = load.done.total()
    return {
        "steps_per_s": 3 * runs / spent,
        "worker_us_per_step": 1e6 * cpu / runs / 3,
        "server_us_per_step": 1e6 * server_cpu / runs / 3,
        "runs": [load.done[each.pid] for each in processes],
        "lost": load.started - runs,
    }


async def recovery(asked: argparse.Namespace) -> Answer:
    """Two workers; the one that does more is hit by a signal; the ledger tells what the other one did about it.

    SIGTERM lets the steps in flight end; their time is not counted.
    """
    ledger = Path(tempfile.mkdtemp(prefix="bench-ledger-"), "ledger.txt")
    async with working(asked, **{workflows.LEDGER: str(ledger)}) as processes, Client(asked.store) as client:
        await ready(client, processes)
        runs = [await client.options(id=f"run-{n}").start(slow_steps, asked.steps) for n in range(asked.runs)]
        await asyncio.sleep(1.5)
        before = notes(ledger)
        victim = max(processes, key=lambda each: sum(pid == each.pid for _, _, pid, _ in before))
        hit_at = time.time()
        victim.send_signal(getattr(signal, asked.signal))
        results = await asyncio.gather(*(run.result(timeout=60) for run in runs), return_exceptions=True)
    lines = notes(ledger)
    owned = {run: (pid, at) for run, _, pid, at in lines if at <= hit_at}
    orphans = {run: at for run, (pid, at) in owned.items() if pid == victim.pid}
    if asked.signal == "SIGTERM":
        free = {run: max(hit_at, at + SLOW) for run, at in orphans.items()}
    else:
        free = dict.fromkeys(orphans, hit_at)
    first = {run: at for run, _, pid, at in reversed(lines) if pid != victim.pid and at > hit_at}
    return {
        "gone_on_ms": sorted((first[run] - at) * 1000 for run, at in free.items() if run in first),
        "orphans": len(orphans),
        "lost": asked.runs - results.count(asked.steps),
        "re_executed": len(lines) - len({(run, step) for run, step, _, _ in lines}),
    }


def notes(ledger: Path) -> list[tuple[str, str, int, float]]:
    parts = [line.split() for line in ledger.read_text().splitlines()]
    return [(run, step, int(pid), float(at)) for run, step, pid, at in parts]


async def soak(asked: argparse.Namespace) -> Answer:
    """Two workers under an even load; in the middle of each minute `perdure prune` removes what ended before."""
    server = Server(asked.store)
    minutes: list[Answer] = []
    quiet: list[float] = []
    cleaning: list[float] = []
    pruned = 0
    seconds: list[float] = []

    async with working(asked) as processes, Client(asked.store) as client:
        await ready(client, processes)

        def cpu() -> float:
            return sum(proc.of_process(each.pid) for each in processes) + server.cpu()

        await Load(client).paced(asked.rate, asked.minute / 6)
        for number in range(asked.minutes):
            load, spent = Load(client), cpu()
            pruning = asyncio.ensure_future(prune(asked, asked.minute / 2))
            await load.paced(asked.rate, asked.minute)
            began, over, removed = await pruning
            pruned += removed
            seconds.append(over - began)
            runs = load.done.total()
            for at, ms in load.claim_ms:
                (cleaning if began <= at <= over else quiet).append(ms)
            minute = {
                "cpu_ms": 1000 * (cpu() - spent) / runs,
                "p50_ms": percentile(load.ms, 0.5),
                "mb": server.size() / 1e6,
                "lost": load.started - runs,
            }
            minutes.append(minute)
            said = ", ".join(f"{name} {value:.4g}" for name, value in minute.items())
            print(f"minute {number + 1} of {asked.minutes}: {said}, {removed} runs pruned", file=sys.stderr, flush=True)
    server.close()
    return {
        "minutes": minutes,
        "rate": asked.rate,
        "pruned": pruned,
        "pruned_in_s": seconds,
        "quiet_claim_ms": percentile(quiet, 0.99),
        "cleaning_claim_ms": percentile(cleaning, 0.99),
    }


async def prune(asked: argparse.Namespace, wait: float) -> tuple[float, float, int]:
    """`perdure prune` after so many seconds: when it began, when it had ended, how many runs it removed."""
    await asyncio.sleep(wait)
    age = asked.minute / 6
    command = [sys.executable, "-m", "perdure", "prune", f"--store={asked.store}", f"--older-than={age:g}s", "--json"]
    began = time.time()
    pruning = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    said, _ = await pruning.communicate()
    if pruning.returncode:
        raise RuntimeError(f"perdure prune ended with {pruning.returncode}")
    return began, time.time(), json.loads(said)["runs"]


MEASUREMENTS = {each.__name__: each for each in (serve, workers, recovery, soak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurement", choices=MEASUREMENTS)
    parser.add_argument("--store", help="default: a new SQLite file, removed afterwards")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--lease", type=float, default=15.0)
    parser.add_argument("--signal", choices=("SIGKILL", "SIGSTOP", "SIGTERM"), default="SIGKILL")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--minute", type=float, default=60.0, help="seconds that a minute has")
    parser.add_argument("--rate", type=float, default=300.0, help="runs started per second")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-fleet-") as folder:
        asked.store = asked.store or f"sqlite:///{folder}/fleet.db"
        answer = asyncio.run(MEASUREMENTS[asked.measurement](asked))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
