"""The workflows of the benchmark, the same in every row and every process."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from perdure import Context, Workflow, current_step, sync, workflow

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


async def signature() -> tuple[int, float]:
    """Which process executes this step, and since when."""
    return os.getpid(), time.time()


@workflow
async def signed(ctx: Context, order: str, count: int) -> list[Any]:
    """As `steps`; says which process did the last step and when the first one began."""
    first = await ctx.step.run("step-0", signature)
    for number in range(1, count - 1):
        await ctx.step.run(f"step-{number}", work, order, number)
    last = await ctx.step.run(f"step-{count - 1}", signature)
    return [last[0], first[1]]


ticked: dict[str, list[float]] = {}
"""For each run the milliseconds that it waited between two ticks, a commit each time, in this process."""


async def tick(number: int) -> int:
    run, now = current_step().run_id, time.perf_counter()
    if number:
        ticked[run].append((now - ticked[run].pop()) * 1000)
    else:
        ticked[run] = []
    await asyncio.sleep(0.005)
    ticked[run].append(time.perf_counter())
    return number


@workflow
async def ticking(ctx: Context, count: int) -> int:
    for number in range(count):
        await ctx.step.run(f"tick-{number}", tick, number)
    return count


def no_effect(connection: Any) -> None: ...


def one_effect(connection: Any) -> None:
    connection.execute("INSERT INTO bench_effect VALUES (1)")


@workflow
async def compared(ctx: Context, blocks: int) -> dict[str, float]:
    """Milliseconds per step: an ordinary one, one in a transaction that does nothing, one that inserts a row.

    In blocks of 20, because the body goes on before the commit of an ordinary step's outcome is acknowledged: the next
    step then waits for it. Interleaved, so that a busy moment meets all alike. This run is never replayed.
    """
    ways: dict[str, Callable[[str], Awaitable[Any]]] = {
        "step": lambda step: ctx.step.run(step, work, "o-1", 1),
        "empty": lambda step: ctx.step.transaction(step, no_effect),
        "insert": lambda step: ctx.step.transaction(step, one_effect),
    }
    taken: dict[str, list[float]] = {kind: [] for kind in ways}
    for block in range(blocks):
        for kind, way in ways.items():
            began = time.perf_counter()
            for number in range(20):
                await way(f"{kind}-{block}-{number}")
            taken[kind].append((time.perf_counter() - began) * 1000 / 20)
    return {kind: sorted(each)[blocks // 2] for kind, each in taken.items()}


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


ALL: list[Workflow[..., Any]] = [
    steps,
    sync_steps,
    nap,
    nap_until,
    waiter,
    steps_then_wait,
    signed,
    ticking,
    compared,
    slow_steps,
]
