"""A user's own transaction that has signalled runs, and stays open."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import threading
import time

from chaos.load import Load
from chaos.stage import Stage
from perdure import Client


async def signalled(stage: Stage) -> None:
    """A user's transaction that has signalled stays open: on PostgreSQL only an end it signalled waits for it."""
    server = stage.base.kind == "postgres"
    # On SQLite it holds the one write lock there is. Who waits for that longer than 5 s is told so.
    held = stage.pick(1.0, 20.0, 180.0) if server else stage.pick(1.0, 8.0, 20.0)
    await stage.workers(2)
    async with Client(stage.base.url) as client:
        load = Load(stage, client)
        for turn, commits in enumerate((True, False)):
            walkers, parked, ending = ([f"{name}-{turn}-{n}" for n in range(5)] for name in ("walks", "parked", "ends"))
            before = len(load.latencies)
            await load.run(stage.pick(0.4, 2.0, 10.0), 20)
            usual = [took for _, took in load.latencies[before:]]
            for run in parked:
                await load.start("parked", 1, id=run)
            for run in walkers:
                await load.start("walks", 20, held / 25, id=run)
            for run in ending:
                await load.start("long_step", 0.8, id=run)
            opened = threading.Event()
            runs = [*walkers, *parked, *ending]
            user = asyncio.create_task(asyncio.to_thread(_user, stage, client, runs, held, commits, opened))
            await stage.until(lambda opened=opened, user=user: opened.is_set() or user.done(), "the signals")  # type: ignore[misc]
            before = len(load.latencies)
            running = asyncio.create_task(load.run(held - 0.4, 20))
            await asyncio.sleep(held - 0.3)
            if server:
                early = stage.base.ask(
                    f"SELECT count(*) FROM {{runs}} WHERE id LIKE 'ends-{turn}-%' AND status = 'completed'"
                )
                stage.note(f"{early[0][0]} of 5 signalled runs had ended before the transaction")
            await user
            await running
            stage.did("open transactions")
            stage.did("seconds open", round(held))
            meanwhile = [took for _, took in load.latencies[before:]]
            stage.note(f"a start took {_ms(usual)} before, {_ms(meanwhile)} beside the open transaction of {held:g} s")
            if server and max(meanwhile) > 1.0:
                stage.violated(f"a start waited {max(meanwhile):.2f} s beside the user's open transaction")
            for run in runs:
                message = f"go-{run}"
                if commits:
                    stage.promised.signalled.append((run, message))
                elif not run.startswith("ends"):
                    await load.signal(run, "go", 7, message=f"{message}-again")
            stage.promised.results.update((run, "8") for run in parked)
            await stage.healed()
            if server:
                _walked_on(stage, walkers)
            if not commits:
                _never_was(stage, runs)


def _user(stage: Stage, client: Client, runs: list[str], held: float, commits: bool, opened: threading.Event) -> None:
    """Somebody's own program: writes its own rows and signals, and takes its time until it commits, or rolls back."""
    with stage.base.connection() as db:
        db.execute("BEGIN IMMEDIATE" if stage.base.kind == "sqlite" else "BEGIN")
        face = client.sync.options(connection=db)
        for run in runs:
            face.handle(run).signal("go", 7, message_id=f"go-{run}")
        opened.set()
        time.sleep(held)
        db.execute("COMMIT" if commits else "ROLLBACK")


def _walked_on(stage: Stage, runs: list[str]) -> None:
    """The steps of a signalled run do not wait for the signal's transaction."""
    facts = stage.base.facts()
    for run in runs:
        times = [
            event["at"] for event in facts.history[facts.keys[run]] if str(event.get("step", "")).startswith("walk")
        ]
        longest = max((b - a for a, b in itertools.pairwise(times)), default=0) / 1_000_000
        if longest > stage.pick(1.0, 3.0, 10.0):
            stage.violated(f"a step of {run} waited {longest:.2f} s beside a transaction that had signalled it")


def _never_was(stage: Stage, runs: list[str]) -> None:
    """What was rolled back is nowhere."""
    facts = stage.base.facts()
    for run in runs:
        key = facts.keys[run]
        mail = [mail["id"] for mail in facts.mail if mail["run"] == key and mail["id"] == f"go-{run}"]
        text = json.dumps(facts.history[key])
        if mail or f'"go-{run}"' in text:
            stage.violated(f"INV-8: the signal to {run} was rolled back, and it is there")


def _ms(seconds: list[float]) -> str:
    if not seconds:
        return "nothing"
    return f"{statistics.median(seconds) * 1000:.1f} ms (at most {max(seconds) * 1000:.0f})"
