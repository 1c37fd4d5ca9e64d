"""This engine's measurements, each a program of its own that prints one JSON object.

python bench/ours.py throughput --concurrency 256
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import collector
import workflows
from meter import Meter, Server
from workflows import ALL, compared, nap, nap_until, steps, steps_then_wait, sync_steps, ticking, waiter

from perdure import Engine

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
        "runs": len(ms),
        "runs_per_s": len(ms) / spent,
        "steps_per_s": len(ms) * per_run / spent,
        "ms": ms if concurrency == 1 else [],
        "worst_start_ms": max(starts),
    }


async def throughput(store: str, asked: argparse.Namespace) -> Answer:
    server = Server(store) if store.startswith("postgres") else None
    before = server.transactions() if server else 0
    async with engine_on(store) as engine:
        kind = sync_steps if asked.sync else steps
        size = {"per_run": asked.steps, "concurrency": asked.concurrency}
        warm = await flow(engine, kind, seconds=0.3, **size)
        if asked.at:
            await asyncio.sleep(asked.at - time.time())
        meter = Meter(store)
        answer = await flow(engine, kind, seconds=asked.seconds, **size)
        answer |= meter.per_run(answer["runs"])
    if server:
        # The engine's connections are closed by now, so that the server has counted all of their transactions.
        turns = (warm["runs"] + answer["runs"]) * (asked.steps + 1)
        answer["turns_per_transaction"] = turns / (server.transactions() - before)
        server.close()
    return answer


async def sleeps(store: str, asked: argparse.Namespace) -> Answer:
    """For each run the milliseconds from its start to its result, less the second that was asked for."""
    ms: list[float] = []

    async def one(engine: Engine) -> None:
        started = time.perf_counter()
        run = await engine.start(nap, 1.0)
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
    """CPU seconds per second of a worker that has nothing to do but a parked run; on a server also its statements."""
    server = Server(store) if store.startswith("postgres") else None
    if server:
        server.log_statements()
    async with engine_on(store) as engine:
        await engine.start(waiter)
        # What polls slows down when nothing happens; this is about what is left then.
        await asyncio.sleep(5 if server else 2)
        began, said = time.process_time(), server.statements() if server else 0
        await asyncio.sleep(asked.seconds)
        answer = {"core": (time.process_time() - began) / asked.seconds}
        if server:
            answer["statements_per_s"] = (server.statements() - said) / asked.seconds
        return answer


async def beside(store: str, asked: argparse.Namespace) -> Answer:
    """Commits of runs that a user's open transaction has signalled, against those beside one that signalled others.

    Any open transaction makes the server keep old rows, so that commits cost more: both have one, as old and as large.
    In the end the runs want to end; how many of the signalled ones did before that transaction, and how long after it
    the last of them did.
    """
    server = Server(store)
    waited, early, after = 0, 0, 0.0
    async with engine_on(store) as engine:

        def signal_all(user: Any, runs: list[Any]) -> None:
            client = engine.sync.options(connection=user)
            for run in runs:
                client.handle(run.id).signal("note", "not yet sent")

        for part, signalled in enumerate((False, True, True, False)):
            name = "beside" if signalled else "alone"
            kinds = ((ticking, 60),) if signalled else ((ticking, 60), (waiter,))
            runs, *others = [
                [await engine.options(id=f"{kind[0].name}-{name}-{part}-{n}").start(*kind) for n in range(asked.runs)]
                for kind in kinds
            ]
            user = server.another()

            await asyncio.to_thread(signal_all, user, others[0] if others else runs)
            results = [asyncio.ensure_future(run.result()) for run in runs]
            until = time.perf_counter() + asked.seconds / 2
            while time.perf_counter() < until:
                await asyncio.sleep(0.02)
                locks = server.waiting_for_locks()
                if signalled:
                    waited = max(waited, locks)
                    early += sum(each.done() for each in results)
            began = time.perf_counter()
            user.commit()
            await asyncio.gather(*results)
            if signalled:
                after = max(after, (time.perf_counter() - began) * 1000)
            for run in others[0] if others else ():
                await run.signal("go", "now")
    gaps = {
        name: [ms for run, each in workflows.ticked.items() if f"-{name}-" in run for ms in each[:-1]]
        for name in ("alone", "beside")
    }
    server.close()
    return {**gaps, "waited_for_locks": waited, "ended_before": early, "ended_after_ms": after}


async def transactions(store: str, asked: argparse.Namespace) -> Answer:
    """Milliseconds of an ordinary step and of transaction steps, in one run alone; as many blocks as --runs."""
    if store.startswith("postgres"):
        server = Server(store)
        server.db.execute("CREATE TABLE bench_effect (n bigint)")
        server.close()
    else:
        with sqlite3.connect(store.removeprefix("sqlite:///")) as db:
            db.execute("CREATE TABLE bench_effect (n bigint)")
    async with engine_on(store) as engine:
        await (await engine.start(compared, 1)).result()
        found: Answer = await (await engine.start(compared, asked.runs)).result()
    return found


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


def megabytes(field: str) -> float:
    """VmRSS (now) or VmHWM (at most, ever) of this process; Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


MEASUREMENTS = {
    each.__name__: each
    for each in (throughput, sleeps, signals, flat, park, wake, idle, record, replay, beside, transactions)
}


def main() -> None:
    collector.settle()
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
