"""Worker processes are killed and stopped at random under load; store and ledger of effects say what happened."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

from perdure import Client
from tests.e2e import audit
from tests.e2e.processes import Site, ended, until
from tests.e2e.worker_process import ORDERS, result_of

SECONDS = float(os.environ.get("PERDURE_KILL_SECONDS", "30"))
STARTS_PER_SECOND = 50
WORKERS = 3
SETTINGS: tuple[dict[str, Any], ...] = (
    {"concurrency": 64},
    {"concurrency": 4},
    {"concurrency": 64, "resident": 0},
    {"concurrency": 64, "resident": 10, "threads": 2},
)


class Load:
    """Runs of all three styles, started and signalled from here, and what of that was acknowledged."""

    def __init__(self, client: Client, chance: random.Random) -> None:
        self.client = client
        self.chance = chance
        self.started: list[str] = []
        self.signalled: list[tuple[str, str]] = []

    async def run(self, seconds: float, enough: Callable[[], bool] = lambda: True) -> None:
        """Start runs for so long, or longer until it is enough."""
        deadline = time.monotonic() + seconds
        running: set[asyncio.Task[None]] = set()
        number = 0
        while time.monotonic() < deadline or not enough():
            number += 1
            task = asyncio.create_task(self._one(number))
            running.add(task)
            task.add_done_callback(running.discard)
            await asyncio.sleep(1 / STARTS_PER_SECOND)
        await asyncio.gather(*running)

    async def _one(self, number: int) -> None:
        """Start a run and send it its signal, sometimes at once, sometimes late, sometimes twice."""
        run = f"order-{number}"
        handle = await self.client.options(id=run).start(ORDERS[number % 3], number)
        self.started.append(run)
        await asyncio.sleep(self.chance.choice((0, 0, 0.05, 0.5)))
        message = f"go-{number}"
        for _ in range(self.chance.choice((1, 1, 2))):
            await handle.signal("go", number, message_id=message)
        self.signalled.append((run, message))

    async def healed(self) -> None:
        """Wait until all have ended, with the right results."""
        at = time.monotonic()
        results = await asyncio.wait_for(
            asyncio.gather(*(self.client.handle(run, returns=int).result() for run in self.started)), 200
        )
        print(f"after healing all ended within {time.monotonic() - at:.2f} s")
        numbers = [int(run.removeprefix("order-")) for run in self.started]
        assert results == [result_of(number, number) for number in numbers]


def seeded() -> random.Random:
    seed = int(os.environ.get("PERDURE_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"PERDURE_SEED={seed}")
    return random.Random(seed)


async def test_killing_workers_at_random_loses_and_repeats_nothing(site: Site) -> None:
    chance = seeded()
    audit.watch(site)
    workers = [site.worker(**chance.choice(SETTINGS)) for _ in range(WORKERS)]
    killed: list[int] = []
    await site.serving(*workers)

    def enough() -> bool:
        # On a busy machine the same takes longer.
        return len(killed) >= SECONDS / 4 and len(load.started) >= SECONDS * STARTS_PER_SECOND / 4

    async def nemesis() -> None:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline or not enough():
            await asyncio.sleep(chance.uniform(0.1, 1.5))
            place = chance.randrange(WORKERS)
            victim = workers[place]
            if chance.random() < 0.2:
                # Stopped first: what it holds is in the middle of something for a while.
                victim.send_signal(signal.SIGSTOP)
                await asyncio.sleep(chance.uniform(0, 0.3))
            victim.kill()
            killed.append(victim.pid)
            await asyncio.sleep(chance.uniform(0, 0.2))
            workers[place] = site.worker(**chance.choice(SETTINGS))

    async with Client(site.url) as client:
        load = Load(client, chance)
        await asyncio.gather(load.run(SECONDS, enough), nemesis())
        await load.healed()
    print(audit.check(site, killed=killed, started=load.started, signalled=load.signalled))
    assert enough()
    assert site.ask("SELECT count(*) FROM perdure_runs WHERE ended_at IS NULL") == [(0,)]
    assert "Traceback" not in site.log()


async def test_replacing_workers_one_by_one_repeats_not_even_a_step_in_flight(site: Site) -> None:
    chance = seeded()
    audit.watch(site)
    workers = [site.worker(**chance.choice(SETTINGS)) for _ in range(WORKERS)]
    await site.serving(*workers)
    left: list[int] = []

    async def deploys() -> None:
        for turn in range(9):
            new = site.worker(**chance.choice(SETTINGS))
            await site.serving(new)
            old, workers[turn % WORKERS] = workers[turn % WORKERS], new
            old.send_signal(signal.SIGTERM)
            assert await ended(old) == 0
            left.append(old.pid)

    async with Client(site.url) as client:
        load = Load(client, chance)
        await asyncio.gather(load.run(6), deploys())
        await load.healed()
    # No process was killed, so no execution is explained by one.
    print(audit.check(site, killed=[], started=load.started, signalled=load.signalled))
    assert len(left) == 9
    assert site.ask("SELECT sum(strikes) FROM perdure_runs") == [(0,)]
    assert "Traceback" not in site.log()


async def test_a_stopped_worker_that_goes_on_changes_nothing_and_begins_a_new_life(site: Site) -> None:
    audit.watch(site)
    first = site.worker(lease=1)
    await site.serving(first)
    async with Client(site.url) as client:
        handle = await client.options(id="stopped").start("held_step", str(site.folder / "release"))
        await until(lambda: site.ledger(step="long"), "the long step")
        first.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        second = site.worker(lease=1)
        await until(lambda: site.ledger(step="long")[1:], "the step in the other worker")
        (site.folder / "release").touch()
        assert await handle.result(timeout=60) == str(second.pid)
        print(f"taken over from a stopped worker after {time.monotonic() - stopped:.2f} s, with a lease of 1 s")
        before = site.ask("SELECT run, seq, event FROM perdure_history ORDER BY run, seq")

        first.send_signal(signal.SIGCONT)
        lives = "SELECT count(*) FROM perdure_workers WHERE name = ? AND dead = 0"
        await until(lambda: site.ask(lives, str(first.pid)) == [(1,)], "the new incarnation")
        second.send_signal(signal.SIGTERM)
        second.wait()
        again = await client.start("long_step", 0.0)
        assert await again.result(timeout=60) == str(first.pid)
    after = site.ask("SELECT run, seq, event FROM perdure_history ORDER BY run, seq")
    assert after[: len(before)] == before
    assert site.ask("SELECT count(*) FROM perdure_workers") == [(3,)]
    audit.check(site, killed=[first.pid], started=["stopped"], signalled=[])


async def test_the_commit_of_a_worker_that_was_taken_for_dead_changes_nothing(site: Site) -> None:
    audit.watch(site)
    first = site.worker(lease=1, heartless=True)
    await site.serving(first)
    async with Client(site.url) as client:
        handle = await client.options(id="late").start("held_step", str(site.folder / "release"))
        await until(lambda: site.ledger(step="long"), "the long step")
        second = site.worker(lease=1)
        await until(lambda: site.ledger(step="long")[1:], "the step in the other worker")
        (site.folder / "release").touch()
        # It learns it from its next commit: the one that names the long step, or the step's own end.
        await until(lambda: "run late: its lease was lost" in site.log(), "the refusal of its commit")
        assert await handle.result(timeout=60) == str(second.pid)
    audit.check(site, killed=[first.pid], started=["late"], signalled=[])
