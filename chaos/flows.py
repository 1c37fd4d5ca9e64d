"""What the runs of all scenarios do. Every step's function writes into the ledger of effects where it begins and ends.

A step called `after-NAME` stands behind the sleep NAME: the audit sees to it that it never begins before its time.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import time
from typing import Any, Final

from chaos.ledger import note
from perdure import Context, Retry, activity, current_step, workflow
from perdure.sync import Context as SyncContext

SOON: Final = Retry(max_attempts=4, first_delay=0.02)
ONCE: Final = Retry(max_attempts=1)
FAR: Final = 100
"""What the last step of an order adds."""


# --- steps ---


async def effect(value: int, most: float = 0.03) -> int:
    note("begin")
    try:
        await asyncio.sleep(random.uniform(0, most))
    finally:
        note("end")
    return value + 1


def sync_effect(value: int) -> int:
    note("begin")
    time.sleep(random.uniform(0, 0.02))
    note("end")
    return value * 2


async def flaky(value: int) -> int:
    note("begin")
    note("end")
    if current_step().attempt == 1:
        raise ValueError("the first attempt fails")
    return value


async def at_once(value: int) -> int:
    note("begin")
    note("end")
    return value


@activity(queue="remote", retry=SOON)
async def remote(value: int) -> int:
    note("begin")
    try:
        await asyncio.sleep(random.uniform(0, 0.03))
    finally:
        note("end")
    return value + FAR


async def long_effect(seconds: float) -> str:
    note("begin")
    try:
        await asyncio.sleep(seconds)
    finally:
        note("end")
    return str(os.getpid())


# --- the ordinary load ---


@workflow
async def quick(ctx: Context, n: int) -> int:
    a = await ctx.step.run("a", effect, n)
    return int(await ctx.step.run("b", effect, a))


def pay(db: Any, table: str) -> None:
    """Writes a row of the user's own, by either driver; the audit counts them."""
    note("begin")
    info = current_step()
    try:
        db.execute(f"INSERT INTO {table} VALUES ('{info.run_id}', '{info.id}')")
    finally:
        note("end")  # also where the server was gone


@workflow
async def transfer(ctx: Context, n: int, table: str) -> int:
    a = await ctx.step.run("a", effect, n)
    await ctx.step.transaction("pay", pay, table)
    await ctx.step.transaction("pay-again", pay, table)
    return int(await ctx.step.run("b", effect, a))


@workflow
async def part(ctx: Context, n: int) -> int:
    a = await ctx.step.run("a", effect, n)
    await ctx.step.sleep("rest", 0.02)
    return int(await ctx.step.run("after-rest", effect, a))


@workflow
async def order(ctx: Context, n: int) -> int:
    a = await ctx.step.run("a", effect, n)
    await ctx.step.sleep("nap", 0.03)
    b, c = await asyncio.gather(ctx.step.run("after-nap", effect, a), ctx.step.run("c", sync_effect, a))
    go = await ctx.step.wait_signal("go", returns=int)
    d = await ctx.step.options(retry=SOON).run("d", flaky, b + c + go)
    child = await ctx.step.run_workflow("child", part, d)
    return int(await ctx.step.run("far", remote, child))


@workflow
def order_sync(ctx: SyncContext, n: int) -> int:
    a = ctx.step.run("a", sync_effect, n) // 2 + 1
    ctx.step.sleep("nap", 0.03)
    both = [ctx.step.start("after-nap", effect, a), ctx.step.start("c", sync_effect, a)]
    ctx.step.wait(both)
    go = ctx.step.wait_signal("go", returns=int)
    d = ctx.step.options(retry=SOON).run("d", flaky, both[0].result() + both[1].result() + go)
    child = ctx.step.run_workflow("child", part, d)
    return int(ctx.step.run("far", remote, child))


@workflow
def order_generator(ctx: Context, n: int) -> Any:
    a = yield ctx.step.run("a", effect, n)
    yield ctx.step.sleep("nap", 0.03)
    b, c = yield [ctx.step.run("after-nap", effect, a), ctx.step.run("c", sync_effect, a)]
    go = yield ctx.step.wait_signal("go", returns=int)
    d = yield ctx.step.options(retry=SOON).run("d", flaky, b + c + go)
    child = yield ctx.step.run_workflow("child", part, d)
    return (yield ctx.step.run("far", remote, child))


ORDERS: Final = ("order", "order_sync", "order_generator")


def result_of(workflow: str, n: int) -> int:
    """What a run of the ordinary load returns: our own calculation. An order is signalled its own number."""
    if workflow in ("quick", "transfer"):
        return n + 2
    a = n + 1
    return (a + 1 + a * 2 + n) + 2 + FAR


# --- one thing at a time ---


@workflow
async def long_step(ctx: Context, seconds: float) -> str:
    await ctx.step.run("first", effect, 1)
    return str(await ctx.step.run("long", long_effect, seconds))


@workflow
async def parked(ctx: Context, n: int) -> int:
    a = await ctx.step.run("a", at_once, n)
    go = await ctx.step.wait_signal("go", returns=int)
    return int(await ctx.step.run("b", at_once, a + go))


@workflow
async def walks(ctx: Context, steps: int, pause: float) -> int:
    """Goes on with its steps while it waits for a signal."""

    async def walk() -> None:
        for number in range(steps):
            await ctx.step.run(f"walk-{number}", effect, number, pause)

    go, _ = await asyncio.gather(ctx.step.wait_signal("go", returns=int), walk())
    return int(go)


@workflow
async def alarm(ctx: Context, at: float, timers: int) -> int:
    """Many timers of one run, all due at the same instant: seconds since the epoch."""

    async def one(number: int) -> int:
        await ctx.step.sleep(f"timer-{number}", max(0.0, at - ctx.now().timestamp()))
        return 1

    return sum(await asyncio.gather(*(one(number) for number in range(timers))))


@workflow
async def nap(ctx: Context, seconds: float) -> int:
    a = await ctx.step.run("a", at_once, 1)
    await ctx.step.sleep("nap", seconds)
    return int(await ctx.step.run("after-nap", at_once, a))


# --- poison: each harms its process in another way ---


def ends_process() -> None:
    note("begin")
    os._exit(9)


def segfaults() -> None:
    note("begin")
    ctypes.string_at(0)


def eats_memory() -> None:
    note("begin")
    hoard = []
    while True:
        hoard.append(b"x" * 8_000_000)
        time.sleep(0.005)


def holds_the_interpreter(seconds: float, calm: float) -> str:
    """C code that keeps the interpreter's lock: no other thread of the process runs, not even the heartbeat's.

    calm: seconds before it does.
    """
    note("begin")
    time.sleep(calm)
    ctypes.PyDLL(None).usleep(int(seconds * 1_000_000))
    note("end")
    return str(os.getpid())


async def never_awaits(marker: str) -> None:
    """Keeps the loop of the first worker that executes it, whose heart is in a thread of its own."""
    note("begin")
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        note("end")
        return
    while True:
        pass


def recurses(depth: int = 0) -> int:
    if depth == 0:
        note("begin")
    return recurses(depth + 1) + 1


async def is_deaf() -> None:
    """Ignores its cancellation."""
    note("begin")
    while True:
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            note("ignored")


@workflow
async def exits(ctx: Context) -> None:
    await ctx.step.run("innocent", at_once, 1)
    await ctx.step.run("deadly", ends_process)


@workflow
async def crashes(ctx: Context) -> None:
    await ctx.step.run("innocent", at_once, 1)
    await ctx.step.run("deadly", segfaults)


@workflow
async def bombs(ctx: Context) -> None:
    await ctx.step.run("innocent", at_once, 1)
    await ctx.step.options(retry=ONCE).run("deadly", eats_memory)


@workflow
async def loops(ctx: Context) -> None:
    """Its own code never rests."""
    await ctx.step.run("innocent", at_once, 1)
    while True:
        pass


@workflow
async def hogs(ctx: Context, seconds: float, calm: float) -> str:
    return str(await ctx.step.run("long", holds_the_interpreter, seconds, calm))


@workflow
async def spins(ctx: Context, marker: str) -> None:
    await ctx.step.run("deadly", never_awaits, marker)


@workflow
async def digs(ctx: Context) -> int:
    return int(await ctx.step.options(retry=ONCE).run("deep", recurses))


@workflow
async def deaf(ctx: Context) -> str:
    try:
        await ctx.step.options(retry=ONCE, timeout=0.2).run("deaf", is_deaf)
    except TimeoutError:
        return "gave up"
    return "heard"
