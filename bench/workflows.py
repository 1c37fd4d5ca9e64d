"""The workflows of the benchmark, the same in every row and every process."""

from __future__ import annotations

import asyncio
import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from perdure import Context, current_step, sync, workflow

LEDGER = "PERDURE_BENCH_LEDGER"
"""Names the file in which `slow_work` notes each execution, one line each."""


async def work(order: str, number: int) -> dict[str, Any]:
    return {"order": order, "step": number}


def sync_work(order: str, number: int) -> dict[str, Any]:
    return {"order": order, "step": number}


@workflow
async def steps(ctx: Context, order: str, count: int) -> int:
    for number in range(count):
        await ctx.step.run(f"step-{number}", work, order, number)
    return count


@workflow
def sync_steps(ctx: sync.Context, order: str, count: int) -> int:
    for number in range(count):
        ctx.step.run(f"step-{number}", sync_work, order, number)
    return count


@workflow
async def nap(ctx: Context, seconds: float) -> None:
    await ctx.step.sleep("nap", seconds)


@workflow
async def nap_until(ctx: Context, when: datetime) -> None:
    await ctx.step.sleep_until("nap", when)


@workflow
async def waiter(ctx: Context) -> Any:
    return await ctx.step.wait_signal("go")


@workflow
async def steps_then_wait(ctx: Context, order: str, count: int) -> Any:
    for number in range(count):
        await ctx.step.run(f"step-{number}", work, order, number)
    return await ctx.step.wait_signal("go")


async def slow_work(number: int) -> int:
    step = current_step()
    line = f"{step.run_id} {step.id} {os.getpid()} {time.time():.6f}\n"
    with Path(os.environ[LEDGER]).open("a") as ledger:  # noqa: ASYNC230 (one short append; it must be there when we die)
        ledger.write(line)
    await asyncio.sleep(0.05)
    return number


@workflow
async def slow_steps(ctx: Context, count: int) -> int:
    for number in range(count):
        await ctx.step.run(f"step-{number}", slow_work, number)
    return count


ALL = [steps, sync_steps, nap, nap_until, waiter, steps_then_wait, slow_steps]
