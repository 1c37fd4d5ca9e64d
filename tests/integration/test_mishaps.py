"""A worker whose own code fails at a run, or for which the system has no thread or memory: no run is lost by it."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from perdure import Context, Retry, RunFailed, activity, workflow
from perdure.runtime.context import SyncContext
from perdure.runtime.drive_sync import BodyThreads
from perdure.worker import residents
from perdure.worker.activities import ActivityRun
from perdure.worker.residents import Resident
from perdure.worker.shift import Shift
from tests.integration.helpers import engine, status_of, until


async def on_loop(n: int) -> int:
    return n + 1


def in_thread(n: int) -> int:
    return n + 1


@workflow
async def adds(ctx: Context, n: int) -> int:
    n = await ctx.step.run("a", on_loop, n)
    await ctx.step.sleep("nap", 0.01)
    return await ctx.step.run("b", in_thread, n)


@workflow
def adds_sync(ctx: SyncContext, n: int) -> int:
    n = ctx.step.run("a", in_thread, n)
    ctx.step.sleep("nap", 0.01)
    return int(ctx.step.run("b", on_loop, n))


@workflow
async def signalled(ctx: Context) -> int:
    go: int = await ctx.step.wait_signal("go", returns=int)
    return go


def fails_at(what: Callable[..., Any], times: list[int]) -> Callable[..., Any]:
    """The method, failing for want of memory at those of its calls."""
    calls = iter(range(1, 1000))

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) in times:
            raise MemoryError
        return what(self, *args, **kwargs)

    return method


@pytest.mark.parametrize("time", [1, 2, 3, 5])
@pytest.mark.parametrize("name", ["answered", "_step_ended", "tick", "settle", "_begin_step"])
async def test_what_fails_at_one_run_costs_no_run(
    name: str, time: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residents, "FIRST_BACK_OFF", 10_000)
    monkeypatch.setattr(Resident, name, fails_at(getattr(Resident, name), [time]))
    async with engine(tmp_path, adds, adds_sync, lease=1) as e:
        handles = [await e.start(flow, n) for n, flow in enumerate([adds, adds_sync] * 3)]
        results = [await handle.result(timeout=30) for handle in handles]
    assert results == [n + 2 for n in range(6)]


async def test_why_says_what_put_a_run_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residents, "FIRST_BACK_OFF", 60_000_000)
    monkeypatch.setattr(Resident, "_step_ended", fails_at(Resident._step_ended, [1]))
    async with engine(tmp_path, adds, lease=1) as e:
        handle = await e.start(adds, 1)
        await status_of(handle, "blocked")
        why = await handle.why()
    assert (
        f"Run {handle.id} was put aside because its worker failed at it, not its own code (MemoryError). It is" in why
    )


async def test_mail_that_cannot_be_taken_in_is_taken_in_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residents, "FIRST_BACK_OFF", 10_000)
    monkeypatch.setattr(Resident, "post", fails_at(Resident.post, [1]))
    async with engine(tmp_path, signalled, lease=1) as e:
        handle = await e.start(signalled)
        await handle.signal("go", 7)
        assert await handle.result(timeout=30) == 7


@pytest.mark.parametrize("refusals", [1, 4])
async def test_a_system_without_threads_delays_steps_and_bodies_and_loses_none(
    refusals: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residents, "FIRST_BACK_OFF", 10_000)
    calls = iter(range(1000))
    run = BodyThreads.run

    def refuses(self: BodyThreads, job: Callable[[], None]) -> Any:
        if next(calls) < refusals:
            raise RuntimeError("can't start new thread")
        return run(self, job)

    monkeypatch.setattr(BodyThreads, "run", refuses)
    async with engine(tmp_path, adds, adds_sync, lease=1) as e:
        handles = [await e.start(flow, n) for n, flow in enumerate([adds_sync, adds] * 2)]
        assert [await handle.result(timeout=30) for handle in handles] == [2, 3, 4, 5]


async def test_a_read_waits_for_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    refused: list[str] = []

    def refuses(self: threading.Thread) -> None:
        if self.name == "perdure-reader" and not refused:
            refused.append(self.name)
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuses)
    async with engine(tmp_path, adds) as e:
        shift = e._core.shift
        assert isinstance(shift, Shift)
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        shift._read(lambda: 5, done.set_result)
        assert await asyncio.wait_for(done, 30) == 5
    assert refused


@activity
def far(n: int) -> int:
    return n + 1


@workflow
async def asks_far(ctx: Context, n: int) -> int:
    return await ctx.step.options(queue="far").run("far", far, n)


@pytest.mark.parametrize("name", ["_begin", "_ended", "_answered"])
async def test_an_activity_at_which_the_worker_fails_is_executed_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residents, "FIRST_BACK_OFF", 10_000)
    monkeypatch.setattr(ActivityRun, name, fails_at(getattr(ActivityRun, name), [1]))
    async with engine(tmp_path, asks_far, activities=[far], lease=1) as e:
        handles = [await e.start(asks_far, n) for n in range(3)]
        assert [await handle.result(timeout=30) for handle in handles] == [1, 2, 3]


class Hoard:
    """Stands for all the memory that a function has taken before it failed."""

    kept: ClassVar[weakref.WeakSet[Hoard]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.kept.add(self)


def fails_in_thread(*args: Any) -> None:
    hoard = Hoard()
    raise ValueError(str(type(hoard)))


async def fails_at_once() -> None:
    fails_in_thread()


async def fails_later() -> None:
    hoard = Hoard()
    await asyncio.sleep(0.001)
    raise ValueError(str(type(hoard)))


@workflow
async def fails(ctx: Context, how: str) -> str:
    step = ctx.step.options(retry=Retry(max_attempts=2, first_delay=0.001))
    try:
        match how:
            case "in a thread":
                await step.run("a", fails_in_thread)
            case "at once":
                await step.run("a", fails_at_once)
            case "later":
                await step.run("a", fails_later)
            case "an activity":
                await step.options(queue="far").run("a", fails_far)
            case "a transaction":
                await step.transaction("a", fails_in_thread)
    except ValueError:
        return "failed"
    fails_in_thread()
    return ""


@activity(queue="far")
def fails_far() -> None:
    fails_in_thread()


@workflow
def fails_sync(ctx: SyncContext, how: str) -> str:
    try:
        if how == "a step of a sync body":
            ctx.step.options(retry=Retry(max_attempts=2, first_delay=0.001)).run("a", fails_in_thread)
    except ValueError:
        return "failed"
    fails_in_thread()
    return ""


STEPS = ("in a thread", "at once", "later", "an activity", "a transaction", "a step of a sync body")


@pytest.mark.parametrize("how", [*STEPS, "a body", "a sync body"])
async def test_what_a_function_had_taken_is_free_when_it_has_failed(how: str, tmp_path: Path) -> None:
    """At once, not when the collector comes by: it may be all the memory there is."""
    flow: Any = fails_sync if "sync" in how else fails
    gc.collect()
    Hoard.kept.clear()
    gc.disable()
    try:
        async with engine(tmp_path, flow, activities=[fails_far]) as e:
            handle = await e.start(flow, how)
            if how in STEPS:
                assert await handle.result(timeout=30) == "failed"
            else:
                with pytest.raises(RunFailed):
                    await handle.result(timeout=30)
            # The thread of its function lets go of it a moment later.
            await until(lambda: not Hoard.kept, "what it had taken", 10)
    finally:
        gc.enable()
