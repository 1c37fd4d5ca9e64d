"""Watches the engine write one run, commit by commit, so that the floor can write the same rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from shape import Watch

from perdure import Context, Engine, workflow


def watched(store: str, steps: int, watch: Callable[[], Watch]) -> Watch:
    """A step's function begins only when the commit before it is acknowledged: there is the place to look."""
    watches: list[Watch] = []

    async def work(order: str, number: int) -> dict[str, Any]:
        watches[0].look()
        return {"order": order, "step": number}

    @workflow(name="steps")
    async def flow(ctx: Context, order: str, count: int) -> int:
        for number in range(count):
            await ctx.step.run(f"step-{number}", work, order, number)
        return count

    async def run_two() -> Watch:
        async with Engine(store, workflows=[flow]) as engine:
            # A run before the first look makes all that is made once: workers, names, migrations.
            watches.append(watch())
            await (await engine.start(flow, "o-0", steps)).result()
            watches[0] = watch()
            for order in ("o-1", "o-2"):
                await asyncio.sleep(0.1)
                watches[0].look()
                await (await engine.start(flow, order, steps)).result()
                watches[0].look()
            return watches[0]

    return asyncio.run(run_two())
