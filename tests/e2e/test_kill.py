"""Worker processes are killed and stopped at random under load; store and ledger of effects say what happened."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time

from perdure import Client
from tests.e2e import audit
from tests.e2e.processes import Site, until
from tests.e2e.worker_process import result_of

SECONDS = float(os.environ.get("PERDURE_KILL_SECONDS", "30"))
STARTS_PER_SECOND = 50
WORKERS = 3


async def test_killing_workers_at_random_loses_and_repeats_nothing(site: Site) -> None:
    seed = int(os.environ.get("PERDURE_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"PERDURE_SEED={seed}")
    chance = random.Random(seed)
    audit.watch(site)
    workers = [site.worker(concurrency=64) for _ in range(WORKERS)]
    killed: list[int] = []
    started: list[str] = []
    signalled: list[tuple[str, str]] = []
    until_ = time.monotonic() + SECONDS
    await site.serving(*workers)

    async with Client(site.url) as client:

        async def one(number: int) -> None:
            """Start a run and send it its signal, sometimes at once, sometimes late, sometimes twice."""
            run = f"order-{number}"
            handle = await client.options(id=run).start("order", number)
            started.append(run)
            await asyncio.sleep(chance.choice((0, 0, 0.05, 0.5)))
            message = f"go-{number}"
            for _ in range(chance.choice((1, 1, 2))):
                await handle.signal("go", number, message_id=message)
            signalled.append((run, message))

        async def load() -> None:
            number = 0
            running: set[asyncio.Task[None]] = set()
            while time.monotonic() < until_:
                number += 1
                task = asyncio.create_task(one(number))
                running.add(task)
                task.add_done_callback(running.discard)
                await asyncio.sleep(1 / STARTS_PER_SECOND)
            await asyncio.gather(*running)

        async def nemesis() -> None:
            while time.monotonic() < until_:
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
                workers[place] = site.worker(concurrency=64)

        await asyncio.gather(load(), nemesis())
        healed = time.monotonic()
        results = await asyncio.wait_for(
            asyncio.gather(*(client.handle(run, returns=int).result() for run in started)), 60
        )
        print(f"after healing all ended within {time.monotonic() - healed:.2f} s")
    numbers = [int(run.removeprefix("order-")) for run in started]
    assert results == [result_of(number, number) for number in numbers]
    said = audit.check(site, killed=killed, started=started, signalled=signalled)
    print(said)
    assert len(started) >= SECONDS * STARTS_PER_SECOND / 4
    assert len(killed) >= SECONDS / 4
    assert site.ask("SELECT count(*) FROM perdure_runs WHERE ended_at IS NULL") == [(0,)]
    assert "Traceback" not in site.log()


async def test_a_stopped_worker_that_goes_on_changes_nothing_and_begins_a_new_life(site: Site) -> None:
    audit.watch(site)
    first = site.worker(lease=1)
    await site.serving(first)
    async with Client(site.url) as client:
        handle = await client.options(id="stopped").start("long_step", 0.3)
        await until(lambda: site.ledger(step="long"), "the long step")
        first.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        second = site.worker(lease=1)
        assert await handle.result(timeout=20) == str(second.pid)
        print(f"taken over from a stopped worker after {time.monotonic() - stopped:.2f} s, with a lease of 1 s")
        before = site.ask("SELECT run, seq, event FROM perdure_history ORDER BY run, seq")

        first.send_signal(signal.SIGCONT)
        lives = "SELECT count(*) FROM perdure_workers WHERE name = ? AND dead = 0"
        await until(lambda: site.ask(lives, str(first.pid)) == [(1,)], "the new incarnation")
        second.send_signal(signal.SIGTERM)
        second.wait()
        again = await client.start("long_step", 0.0)
        assert await again.result(timeout=20) == str(first.pid)
    after = site.ask("SELECT run, seq, event FROM perdure_history ORDER BY run, seq")
    assert after[: len(before)] == before
    assert site.ask("SELECT count(*) FROM perdure_workers") == [(3,)]
    audit.check(site, killed=[first.pid], started=["stopped"], signalled=[])


async def test_the_commit_of_a_worker_that_was_taken_for_dead_changes_nothing(site: Site) -> None:
    audit.watch(site)
    first = site.worker(lease=1, heartless=True)
    await site.serving(first)
    async with Client(site.url) as client:
        handle = await client.options(id="late").start("long_step", 3.0)
        await until(lambda: site.ledger(step="long"), "the long step")
        second = site.worker(lease=1)
        await until(lambda: site.ledger(step="long")[1:], "the step in the other worker")
        await until(lambda: [x for x in site.ledger("end", step="long") if x.pid == first.pid], "the late end")
        await until(lambda: "run late: its lease was lost" in site.log(), "the refusal of its commit")
        assert await handle.result(timeout=20) == str(second.pid)
    audit.check(site, killed=[first.pid], started=["late"], signalled=[])
