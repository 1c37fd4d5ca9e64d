"""Worker processes are killed, stopped, replaced, and all restarted at once."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any, Final

from chaos.load import Load
from chaos.stage import Stage
from perdure import Client

SETTINGS: Final[tuple[dict[str, Any], ...]] = (
    {"concurrency": 64},
    {"concurrency": 4},
    {"concurrency": 64, "resident": 0},
    {"concurrency": 64, "resident": 10, "threads": 2},
)
LEASE: Final = 1.0


async def kill(stage: Stage) -> None:
    """Workers are killed at random under load, some of them while they are stopped."""
    chance = stage.chance
    seconds = stage.pick(4.0, 40.0, 600.0)
    kills = stage.pick(6, 30, 10_000)
    workers = await stage.workers(3, **chance.choice(SETTINGS))
    busy = True

    async def nemesis() -> None:
        nonlocal busy
        pause = seconds / kills if stage.report.size != "long" else 0.5
        while busy or stage.report.did["kills"] < kills:
            await asyncio.sleep(chance.uniform(0.2, 1.8) * pause)
            place = chance.randrange(len(workers))
            victim = workers[place]
            if chance.random() < 0.2:
                # Stopped first: what it holds is in the middle of something for a while.
                victim.send_signal(signal.SIGSTOP)
                await asyncio.sleep(chance.uniform(0, 0.2))
            stage.kill(victim)
            await asyncio.sleep(chance.uniform(0, 0.2))
            workers[place] = stage.worker(**chance.choice(SETTINGS))

    async def loaded() -> None:
        nonlocal busy
        while busy:
            await load.run(seconds, stage.pick(40, 60, 200))
            busy = stage.report.size == "long" and stage.report.did["kills"] < kills

    async with Client(stage.base.url) as client:
        load = Load(stage, client)
        await asyncio.gather(loaded(), nemesis())
        await stage.healed()


async def pause(stage: Stage) -> None:
    """Workers are stopped past their lease and go on: what they still commit is fenced."""
    chance = stage.chance
    workers = await stage.workers(3, lease=LEASE)

    async def nemesis() -> None:
        for turn in range(stage.pick(1, 12, 200)):
            victim = workers[turn % len(workers)]
            victim.send_signal(signal.SIGSTOP)
            await asyncio.sleep(LEASE + 0.5 + chance.uniform(0, 0.5))
            victim.send_signal(signal.SIGCONT)
            stage.did("pauses")
            stage.promised.harmed.add(str(victim.pid))
            await asyncio.sleep(chance.uniform(0, 0.5))

    async with Client(stage.base.url) as client:
        load = Load(stage, client)
        # One that is certain to be in flight when its worker is stopped, and one whose heart does not beat.
        late = await stage.workers(1, lease=LEASE, heartless=True)
        await load.start("long_step", stage.pick(2.0, 4.0, 8.0), id="late")
        await asyncio.gather(load.run(stage.pick(2.0, 30.0, 600.0), stage.pick(30, 50, 100)), nemesis())
        await stage.healed()
        stage.kill(late[0])
    fenced = stage.log().count("its lease was lost")
    lives = stage.base.ask("SELECT count(*) FROM {workers}")[0][0]
    stage.note(
        f"{fenced} commits came too late and were fenced; {lives} incarnations of {len(stage.processes)} processes"
    )
    if lives <= len(stage.processes):
        stage.violated("INV-9: no worker that was taken for dead began a new life")


async def hold(stage: Stage) -> None:
    """A step holds the interpreter for longer than the lease: its worker is taken for dead; all other runs end."""
    await stage.workers(2, lease=LEASE)
    async with Client(stage.base.url) as client:
        load = Load(stage, client)
        # Whoever takes it is taken for dead: for the store it kills its workers, and is put aside in the end.
        stage.promised.deadly.add("hog")
        # Not before most of the load is written: a process that holds its interpreter in the middle of a write to
        # SQLite holds everybody's writes up too, and nobody can take it for dead until it goes on.
        await load.start("hogs", 3.0 * LEASE, 2.0 * LEASE, id="hog")
        await stage.until(lambda: stage.lines(step="long"), "the step that holds the interpreter")
        await load.run(stage.pick(1.5, 5.0, 30.0), 20)
        await stage.healed()
    stage.did("hogs", len(stage.lines(step="long")))


async def replace(stage: Stage) -> None:
    """Workers are replaced one by one, as a deploy does: not even a step in flight is repeated."""
    chance = stage.chance
    workers = await stage.workers(2, **chance.choice(SETTINGS))
    slowest = 0.0

    async def deploys() -> None:
        nonlocal slowest
        for turn in range(stage.pick(2, 12, 100)):
            new = (await stage.workers(1, **chance.choice(SETTINGS)))[0]
            old, workers[turn % 2] = workers[turn % 2], new
            old.send_signal(signal.SIGTERM)
            at = time.monotonic()
            await stage.until(lambda old=old: old.poll() is not None, "the end of a worker")  # type: ignore[misc]
            slowest = max(slowest, time.monotonic() - at)
            stage.did("replacements")
            if old.returncode != 0:
                stage.violated(f"a worker that was asked to leave left with {old.returncode}")

    async with Client(stage.base.url) as client:
        load = Load(stage, client)
        await asyncio.gather(load.run(stage.pick(2.0, 20.0, 300.0), 40), deploys())
        await stage.healed()
    stage.note(f"a worker left within {slowest:.2f} s")
    stage.repeats = 0


async def restart(stage: Stage) -> None:
    """All workers are killed and started again while very many runs wait: all of them go on."""
    number = stage.pick(300, 10_000, 10_000)
    workers = await stage.workers(2)
    async with Client(stage.base.url) as client:
        load = Load(stage, client)
        runs = [f"parked-{n}" for n in range(number)]
        await _many(lambda run: load.start("parked", 1, id=run), runs)
        waiting = "SELECT count(*) FROM {runs} WHERE status = 'waiting'"
        await stage.until(lambda: stage.base.ask(waiting)[0][0] == number, "all runs at their signal", 300)
        at = time.monotonic()
        for worker in workers:
            stage.kill(worker)
        await stage.workers(2)
        stage.did("restarts")
        up = time.monotonic() - at
        await _many(lambda run: load.signal(run, "go", 7, message=f"go-{run}"), runs)
        stage.promised.results.update((run, "8") for run in runs)
        await stage.healed(300)
    stage.note(
        f"{number} open runs: workers served again {up:.2f} s after the kill, "
        f"all had ended {time.monotonic() - at:.2f} s after it"
    )
    handed_back = stage.base.ask("SELECT count(*) FROM {runs} WHERE strikes > 0")[0][0]
    if handed_back:
        stage.violated(f"INV-20: {handed_back} runs that only waited were given a strike")


async def timers(stage: Stage) -> None:
    """Very many timers come due at one instant: none early, all of them fire."""
    runs, each = stage.pick((100, 10), (5_000, 20), (100_000, 1))
    await stage.workers(2)
    async with Client(stage.base.url) as client:
        load = Load(stage, client)
        # As long as the starts may take: a timer that is due at once is none.
        at = stage.base.now() / 1_000_000 + stage.pick(2.0, 30.0, 240.0)
        names = [f"alarm-{n}" for n in range(runs)]
        await _many(lambda run: load.start("alarm", at, each, id=run), names)
        stage.promised.results.update((run, str(each)) for run in names)
        set_ = "SELECT count(*) FROM {runs} WHERE status = 'waiting'"
        left = at - stage.base.now() / 1_000_000
        if left < 0:
            stage.note("the last runs were started after the instant")
        else:
            await stage.until(
                lambda: stage.base.now() / 1_000_000 > at or stage.base.ask(set_)[0][0] == runs, "all timers", 300
            )
        await asyncio.sleep(max(0.0, at - stage.base.now() / 1_000_000))
        await stage.healed(stage.pick(60, 300, 900))
        took = stage.base.now() / 1_000_000 - at
    early = [
        event
        for event in (await asyncio.to_thread(stage.base.facts)).history.values()
        if event[-1]["kind"] == "ended" and max(e.get("at", 0) for e in event) < int(at * 1_000_000)
    ]
    if early:
        stage.violated(f"INV-11: {len(early)} runs ended before their timers")
    stage.did("timers", runs * each)
    stage.note(f"{runs * each} timers of {runs} runs at one instant: the last run ended {took:.2f} s after it")
    if took > stage.pick(5, 60, 300):
        stage.violated(f"INV-11: the last timer was {took:.1f} s late")


async def _many(act: Any, names: list[str], at_once: int = 200) -> None:
    """Do it for all, so many at once."""
    left = iter(names)

    async def some() -> None:
        for name in left:
            await act(name)

    await asyncio.gather(*(some() for _ in range(at_once)))
