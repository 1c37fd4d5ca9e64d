"""A worker as a user runs one: a script with `Worker(...)` and `asyncio.run`. Arguments: store URL, ledger, settings.

Every function of a step or activity appends two lines to the ledger, one where it begins and one where it ends: what
really happened, beside what the store says. A line is one `write` to a file opened with O_APPEND, so that lines of
several processes do not mix and none is half there after a kill.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import random
import sys
import time
from typing import Any

import perdure.engine
from perdure import Context, Retry, StepFailed, Worker, activity, current_step, workflow
from perdure.core.turn import Announcement
from perdure.runtime.context import SyncContext
from perdure.worker.lease import Heartbeat
from perdure.worker.shift import Shift

SOON = Retry(max_attempts=4, first_delay=0.02)
_ledger = -1
_worker: Worker | None = None
_shifts: list[Shift] = []


_begin = Shift.begin


def _kept(self: Shift, announcement: Announcement) -> None:
    _shifts[:] = [self]
    _begin(self, announcement)


Shift.begin = _kept  # type: ignore[method-assign]


def note(what: str) -> None:
    """One line: what, run, step, attempt, key, process, epoch of the claim, time."""
    global _ledger
    info = current_step()
    epoch = 0
    if _ledger < 0:
        # In a process that was given to one run: this module is imported there, with the arguments of the script.
        _ledger = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
    [shift] = _shifts
    for resident in list(shift.residents.values()):
        if resident.this.id == info.run_id:
            epoch = resident.epoch
    for running in list(shift.activities.values()):
        if running.row.parent_id == info.run_id and running.row.parent_step == info.id:
            epoch = running.row.epoch
    line = {
        "what": what,
        "run": info.run_id,
        "step": info.id,
        "attempt": info.attempt,
        "key": info.key,
        "pid": os.getpid(),
        "epoch": epoch,
        "at": time.time_ns() // 1000,
    }
    os.write(_ledger, json.dumps(line).encode() + b"\n")


async def effect(value: int) -> int:
    note("begin")
    await asyncio.sleep(random.uniform(0, 0.04))
    note("end")
    return value + 1


def sync_effect(value: int) -> int:
    note("begin")
    time.sleep(random.uniform(0, 0.02))
    note("end")
    return value * 2


async def flaky(value: int) -> int:
    note("begin")
    if current_step().attempt == 1:
        note("end")
        raise ValueError("the first attempt fails")
    note("end")
    return value


@activity(queue="remote", retry=SOON)
async def remote(value: int) -> int:
    note("begin")
    await asyncio.sleep(random.uniform(0, 0.04))
    note("end")
    return value + 100


@workflow
async def part(ctx: Context, n: int) -> int:
    a = await ctx.step.run("a", effect, n)
    await ctx.step.sleep("nap", 0.02)
    return int(await ctx.step.run("b", effect, a))


@workflow
async def order(ctx: Context, n: int) -> int:
    a = await ctx.step.run("a", effect, n)
    await ctx.step.sleep("nap", 0.03)
    b, c = await asyncio.gather(ctx.step.run("b", effect, a), ctx.step.run("c", sync_effect, a))
    go = await ctx.step.wait_signal("go", returns=int)
    d = await ctx.step.options(retry=SOON).run("d", flaky, b + c + go)
    child = await ctx.step.run_workflow("child", part, d)
    return int(await ctx.step.run("far", remote, child))


@workflow
def order_sync(ctx: SyncContext, n: int) -> int:
    a = ctx.step.run("a", sync_effect, n) // 2 + 1
    ctx.step.sleep("nap", 0.03)
    both = [ctx.step.start("b", effect, a), ctx.step.start("c", sync_effect, a)]
    ctx.step.wait(both)
    go = ctx.step.wait_signal("go", returns=int)
    d = ctx.step.options(retry=SOON).run("d", flaky, both[0].result() + both[1].result() + go)
    child = ctx.step.run_workflow("child", part, d)
    return int(ctx.step.run("far", remote, child))


@workflow
def order_generator(ctx: Context, n: int) -> Any:
    a = yield ctx.step.run("a", effect, n)
    yield ctx.step.sleep("nap", 0.03)
    b, c = yield [ctx.step.run("b", effect, a), ctx.step.run("c", sync_effect, a)]
    go = yield ctx.step.wait_signal("go", returns=int)
    d = yield ctx.step.options(retry=SOON).run("d", flaky, b + c + go)
    child = yield ctx.step.run_workflow("child", part, d)
    return (yield ctx.step.run("far", remote, child))


ORDERS = ("order", "order_sync", "order_generator")


def result_of(n: int, go: int) -> int:
    """What the orders return: the test's own calculation."""
    a = n + 1
    return (a + 1 + a * 2 + go) + 2 + 100


@workflow
async def quick(ctx: Context, n: int) -> int:
    a = await ctx.step.run("a", effect, n)
    return int(await ctx.step.run("b", effect, a))


async def long_effect(seconds: float) -> str:
    note("begin")
    await asyncio.sleep(seconds)
    note("end")
    return str(os.getpid())


@workflow
async def long_step(ctx: Context, seconds: float) -> str:
    await ctx.step.run("first", effect, 1)
    return str(await ctx.step.run("long", long_effect, seconds))


async def held_effect(until: str) -> str:
    note("begin")
    while not os.path.exists(until):
        await asyncio.sleep(0.01)
    note("end")
    return str(os.getpid())


@workflow
async def held_step(ctx: Context, until: str) -> str:
    """A long step that ends when the test says so: when this file is there."""
    await ctx.step.run("first", effect, 1)
    return str(await ctx.step.run("long", held_effect, until))


@workflow
async def two_signals(ctx: Context) -> str:
    await ctx.step.run("before", effect, 1)
    await ctx.step.wait_signal("go")
    return str(await ctx.step.run("after", long_effect, 0))


async def deaf_effect() -> None:
    note("begin")
    while True:
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            note("ignored")


def deaf_thread() -> None:
    note("begin")
    while True:
        time.sleep(0.05)


@workflow
async def deaf(ctx: Context) -> None:
    await asyncio.gather(ctx.step.run("task", deaf_effect), ctx.step.run("thread", deaf_thread))


def kill_own_process() -> None:
    note("begin")
    os._exit(9)


@workflow
async def poison(ctx: Context) -> None:
    await ctx.step.run("innocent", effect, 1)
    await ctx.step.run("deadly", kill_own_process)


def fall() -> None:
    note("begin")
    ctypes.string_at(0)


@workflow
async def falls(ctx: Context) -> None:
    await ctx.step.run("innocent", effect, 1)
    await ctx.step.run("deadly", fall)


@workflow
async def spins_at_last(ctx: Context) -> None:
    await ctx.step.run("deadly", die_at_first, 2, "then spin")


@workflow
async def slow_at_last(ctx: Context, seconds: float) -> str:
    await ctx.step.run("deadly", die_at_first, 2, str(seconds))
    return str(await ctx.step.run("after", long_effect, 0))


@workflow
async def mother(ctx: Context) -> str:
    try:
        await ctx.step.run_workflow("child", poison)
    except StepFailed as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@workflow
async def slow_poison(ctx: Context, deaths: int) -> str:
    await ctx.step.run("deadly", die_at_first, deaths)
    await ctx.step.wait_signal("go")
    return "survived"


def die_at_first(deaths: int, then: str = "") -> None:
    """Kills the process as often as that, as the ledger says."""
    note("begin")
    info = current_step()
    with open(sys.argv[2], encoding="utf-8") as ledger:
        begun = sum(1 for line in map(json.loads, ledger) if (line["run"], line["step"]) == (info.run_id, info.id))
    if begun <= deaths:
        os._exit(9)
    while then == "then spin":
        pass
    if then:
        time.sleep(float(then))
        note("end")


@activity(queue="remote")
async def slow_remote(seconds: float) -> str:
    note("begin")
    await asyncio.sleep(seconds)
    note("end")
    return str(os.getpid())


@activity(queue="remote")
def deadly_remote() -> None:
    kill_own_process()


@workflow
async def uses_slow_remote(ctx: Context, seconds: float) -> str:
    return str(await ctx.step.run("far", slow_remote, seconds))


@workflow
async def uses_deadly_remote(ctx: Context) -> str:
    try:
        await ctx.step.run("far", deadly_remote)
    except StepFailed as error:
        return str(error)
    return "no error"


async def main(url: str, ledger: str, settings: dict[str, Any]) -> int:
    global _ledger, _worker
    _ledger = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    perdure.engine.GRACE = settings.pop("grace", perdure.engine.GRACE)
    if settings.pop("heartless", False):
        # It lives, but nobody can tell.
        Heartbeat.step = lambda self: None  # type: ignore[method-assign]
    module = sys.modules[__name__]
    _worker = Worker(url, workflows=[module], activities=[module], name=str(os.getpid()), **settings)
    await _worker.run()
    return 0 if _worker.drained else 1


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s")
    logging.getLogger("perdure.worker").setLevel(logging.DEBUG)
    sys.exit(asyncio.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))))
