"""A worker whose own code fails at a run, or for which the system has no thread or memory: no run is lost by it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perdure import Context, activity, workflow
from perdure.runtime.context import SyncContext
from perdure.runtime.drive_sync import BodyThreads
from perdure.worker import residents
from perdure.worker.activities import ActivityRun
from perdure.worker.residents import Resident
from perdure.worker.shift import Shift
from tests.integration.helpers import engine


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
