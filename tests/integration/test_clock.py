"""A store whose clock is wrong for a while."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from perdure import Context, Engine, SQLiteStore, workflow

HOURS = 3 * 3_600_000_000


@workflow
async def nap(ctx: Context, seconds: float) -> str:
    await ctx.step.sleep("nap", seconds)
    return "awake"


async def test_a_timer_comes_soon_after_a_clock_that_went_back_was_put_right(tmp_path: Path) -> None:
    wrong_by = 0
    store = SQLiteStore(tmp_path / "runs.db", clock=lambda: time.time_ns() // 1000 + wrong_by)
    async with Engine(store, workflows=[nap]) as engine:
        handle = await engine.start(nap, 0.3)
        await asyncio.sleep(0.1)
        wrong_by = -HOURS
        await asyncio.sleep(0.5)
        assert await handle.status() == "waiting"
        wrong_by = 0
        assert await handle.result(timeout=5) == "awake"
    store.close()
