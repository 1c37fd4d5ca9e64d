"""Several worker processes on one file, and runs that kill the process they are in."""

from __future__ import annotations

import asyncio
import functools
import subprocess
from collections import Counter

from perdure import Client
from tests.e2e import audit
from tests.e2e.processes import Site, until


async def test_all_worker_processes_get_work_and_nothing_is_lost(site: Site) -> None:
    audit.watch(site)
    workers = [site.worker(concurrency=8) for _ in range(4)]
    await site.serving(*workers)
    async with Client(site.url) as client:
        handles = await asyncio.gather(*(client.options(id=f"q{n}").start("quick", n) for n in range(600)))
        assert await asyncio.gather(*(handle.result(timeout=60) for handle in handles)) == [n + 2 for n in range(600)]
    share = Counter(line.pid for line in site.ledger())
    print(f"executions of each process: {sorted(share.values())}")
    assert set(share) == {worker.pid for worker in workers}
    assert min(share.values()) * 12 >= max(share.values())
    audit.check(site, killed=[], started=[f"q{n}" for n in range(600)], signalled=[])
    assert len(site.ledger()) == 1200


async def test_a_signal_from_elsewhere_reaches_the_worker_that_has_the_run(site: Site) -> None:
    workers = [site.worker() for _ in range(2)]
    await site.serving(*workers)
    async with Client(site.url) as client:
        handles = [await client.start("two_signals") for _ in range(20)]
        await until(lambda: len(site.ledger("end", step="before")) == 20, "the waits")
        await asyncio.gather(*(handle.signal("go") for handle in handles))
        for handle in handles:
            assert int(await handle.result(timeout=60)) in {worker.pid for worker in workers}


async def test_a_run_that_kills_its_worker_three_times_is_quarantined_and_the_others_go_on(site: Site) -> None:
    async def keep_two_alive() -> None:
        while True:
            alive = [worker for worker in site.processes if worker.poll() is None]
            if len(alive) < 2:
                site.worker()
            await asyncio.sleep(0.02)

    keeper = asyncio.create_task(keep_two_alive())
    try:
        async with Client(site.url) as client:
            await until(lambda: site.ask("SELECT count(*) FROM perdure_workers") >= [(2,)], "the workers")
            mother = await client.options(id="mother").start("mother")
            others = [await client.start("long_step", 0.2) for _ in range(10)]
            told = await mother.result(timeout=60)
            assert told.startswith("ChildFailed: ")
            assert "quarantined" in told
            for other in others:
                await other.result(timeout=60)
            child = client.handle("mother/child")
            assert await child.status() == "quarantined"
            assert "killed its worker 3 times" in await child.why()
            await child.terminate("seen")
            assert await child.status() == "terminated"
    finally:
        keeper.cancel()
    assert len(site.ledger(step="deadly")) == 3
    # What was recorded before it, was done once.
    assert len(site.ledger(run="mother/child", step="innocent")) == 1
    # The third time it had a process of its own.
    assert [x.returncode for x in site.processes].count(9) == 2


async def test_a_run_with_two_strikes_that_makes_progress_no_longer_stops_its_worker(site: Site) -> None:
    async with Client(site.url) as client:
        first = site.worker()
        await site.serving(first)
        survivor = await client.options(id="survivor").start("slow_poison", 2)
        for _ in range(2):
            worker = site.processes[-1]
            await until(functools.partial(_is_dead, worker), "a death")
            await site.serving(site.worker())
        await until(lambda: len(site.ledger(step="deadly")) == 3, "the third try")
        assert await client.start("quick", 1) is not None
        # It waits for a signal now: the worker takes other work.
        other = await client.start("quick", 5)
        assert await other.result(timeout=60) == 7
        assert (await survivor.info()).status == "waiting"
        await survivor.signal("go")
        assert await survivor.result(timeout=60) == "survived"


def _is_dead(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is not None
