"""Somebody else has the SQLite file: holds its write lock, or moves it away."""

from __future__ import annotations

import asyncio
import time

from chaos.load import Load
from chaos.sqlite import SQLiteBase
from chaos.stage import Stage, Violated
from perdure import Client


async def lock(stage: Stage) -> None:
    """Another program's transaction holds the file's one write lock for longer than anybody waits."""
    base = _sqlite(stage)
    await stage.workers(2)
    url = f"{base.url}?busy_timeout=0.5"
    async with Client(url) as client:
        load = Load(stage, client)
        for _ in range(stage.pick(1, 4, 10)):
            held = stage.pick(1.5, 8.0, 300.0)
            running = asyncio.create_task(load.run(held + 1.0, 30))
            await asyncio.sleep(0.5)
            with base.connection() as db:
                db.execute("BEGIN IMMEDIATE")
                await asyncio.sleep(held)
                at = time.monotonic()
                db.execute("ROLLBACK")
            stage.did("seconds of a held lock", round(held))
            await running
            stage.note(f"{time.monotonic() - at:.2f} s after the lock was free everything was acknowledged")
        await stage.healed()
    if not stage.report.refusals["StoreLocked"]:
        stage.violated("nobody was told that the store was locked")
    if set(stage.report.refusals) - {"StoreLocked"}:
        stage.violated(f"a locked store was called {sorted(stage.report.refusals)}")


async def moved(stage: Stage) -> None:
    """The file is moved away under load and put back: nothing is written into the void, all goes on."""
    base = _sqlite(stage)
    await stage.workers(2)
    async with Client(base.url) as client:
        load = Load(stage, client)
        for _ in range(stage.pick(1, 5, 20)):
            running = asyncio.create_task(load.run(stage.pick(1.5, 5.0, 20.0), 30))
            await asyncio.sleep(0.5)
            away = base.path.with_name("away.db")
            base.path.rename(away)
            await asyncio.sleep(stage.pick(0.6, 3.0, 10.0))
            away.rename(base.path)
            stage.did("moves")
            await running
        await stage.healed()
    if not stage.report.refusals["StoreUnavailable"]:
        stage.violated("nobody was told that the file was gone")


def _sqlite(stage: Stage) -> SQLiteBase:
    if not isinstance(stage.base, SQLiteBase):
        raise Violated("this scenario is one of a file")
    return stage.base
