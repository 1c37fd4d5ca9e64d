"""Dispatched activities: executed by whoever serves their queue, once in the record, whatever happens to a worker."""

# ruff: noqa: PT017  # what is asserted in an `except` block here is inside a workflow

from __future__ import annotations

import asyncio
import json
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from perdure import (
    Client,
    Context,
    NonRetryable,
    Retry,
    RetryAfter,
    RunCancelled,
    RunFailed,
    RunHandle,
    StepFailed,
    StepTimedOut,
    Workflow,
    activity,
    current_step,
    workflow,
)
from perdure.runtime.context import SyncContext
from tests.e2e.processes import Site, killed
from tests.e2e.processes import until as until_there
from tests.integration.helpers import ask, contents, engine, kinds, status_of, until, url_of

QUICK = Retry(first_delay=0.01, jitter=False)


class Declined(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(f"declined: {code}")
        self.code = code


async def test_the_longest_pauses_travel_with_it(tmp_path: Path) -> None:
    patient = activity(name="patient", queue="far", retry=Retry(max_delay=timedelta.max, first_delay=0.000_001))

    @patient
    def fails_once() -> str:
        if current_step().attempt == 1:
            raise ValueError("not yet")
        return "at last"

    @workflow
    async def waits(ctx: Context) -> str:
        return await ctx.step.run("a", fails_once)

    async with engine(tmp_path, waits, activities=[fails_once]) as it:
        assert await (await it.start(waits)).result(timeout=60) == "at last"


async def test_it_runs_on_its_own_queue_and_its_result_comes_back(tmp_path: Path) -> None:
    seen: list[Any] = []

    @activity(queue="gpu")
    async def render(size: int, *, colour: str = "red") -> tuple[int, str]:
        info = current_step()
        seen.append((info.id, info.attempt, info.key, info.workflow))
        return size, colour

    @workflow
    async def paints(ctx: Context) -> list[Any]:
        key = ctx.step.key("far")
        return [await ctx.step.run("far", render, 3, colour="blue"), key]

    @workflow
    def paints_sync(ctx: SyncContext) -> list[Any]:
        handles = [ctx.step.start(f"far{n}", render, n) for n in range(3)]
        done, _ = ctx.step.wait(handles)
        return sorted(handle.result()[0] for handle in done)

    async with engine(tmp_path, paints, paints_sync) as here:
        handle: RunHandle[Any] = await here.start(paints)
        await status_of(handle, "waiting")
        assert 'activity "render"' in await handle.why()
        assert seen == []
        async with engine(tmp_path, activities=[render], queues=("gpu",)):
            result = await handle.result(timeout=60)
            assert result[0] == (3, "blue")
            assert seen == [("far", 1, result[1], "paints")]
            assert await (await here.start(paints_sync)).result(timeout=60) == [0, 1, 2]
        assert kinds(await handle.history()) == ["started", "activity", "activity_ended", "ended"]


async def test_its_failures_are_tried_again_by_its_own_policy(tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []

    def count(name: str) -> int:
        calls.append((name, current_step().attempt))
        return len([each for each in calls if each[0] == name])

    @activity(queue="far", retry=QUICK)
    def flaky() -> str:
        if count("flaky") < 3:
            raise ValueError("not yet")
        return "done"

    @activity(queue="far", retry=QUICK)
    async def hopeless() -> None:
        count("hopeless")
        raise ValueError("never") from KeyError("why")

    @activity(queue="far", retry=QUICK)
    async def final() -> None:
        count("final")
        raise NonRetryable("no")

    @activity(queue="far", retry=QUICK, raises=Declined)
    async def declines() -> None:
        count("declines")
        raise Declined(7)

    @activity(queue="far", retry=QUICK)
    async def later() -> str:
        if count("later") == 1:
            raise RetryAfter(0.3)
        return "later"

    @workflow
    async def uses(ctx: Context) -> list[Any]:
        said: list[Any] = [await ctx.step.run("flaky", flaky)]
        try:
            await ctx.step.run("hopeless", hopeless)
        except ValueError as error:
            assert isinstance(error, StepFailed)
            assert error.cause is not None
            said += [error.attempts, error.cause.type, "in hopeless" in error.traceback]
        try:
            await ctx.step.run("final", final)
        except StepFailed as error:
            said += [error.attempts, error.type]
        try:
            await ctx.step.options(retry=Retry(max_attempts=1)).run("declines", declines)
        except Declined as error:
            said += [error.code]
        at = ctx.now()
        said += [await ctx.step.run("later", later)]
        assert (ctx.now() - at).total_seconds() >= 0.3
        return said

    async with engine(tmp_path, uses, activities=[flaky, hopeless, final, declines, later]) as it:
        handle: RunHandle[Any] = await it.start(uses)
        assert await handle.result(timeout=60) == [
            *("done", 3, "KeyError", True, 1, "perdure.NonRetryable", 7, "later"),
        ]
    assert [attempt for name, attempt in calls if name == "flaky"] == [1, 2, 3]
    assert len([1 for name, _ in calls if name == "declines"]) == 1


async def test_a_wait_for_its_next_attempt_belongs_to_no_worker(tmp_path: Path) -> None:
    calls: list[int] = []

    @activity(queue="far", retry=Retry(first_delay=1, jitter=False))
    def flaky() -> str:
        calls.append(current_step().attempt)
        if len(calls) == 1:
            raise ValueError("not yet")
        return "done"

    @workflow
    async def uses(ctx: Context) -> str:
        return str(await ctx.step.run("far", flaky))

    query = "SELECT owner, attempt, status FROM perdure_runs WHERE kind = 'activity'"
    async with engine(tmp_path, uses, activities=[flaky]) as first:
        await first.options(id="u").start(uses)
        await until(lambda: ask(tmp_path, query) == [(None, 2, "waiting")], "the wait")
        why = await first.handle("u/far").why()
        assert "attempt 2 of 3" in why
        assert "not yet" in why
    async with engine(tmp_path, uses, activities=[flaky]) as second:
        assert await second.handle("u").result(timeout=60) == "done"
    assert calls == [1, 2]


@pytest.mark.parametrize("style", ["task", "thread"])
async def test_its_timeouts(tmp_path: Path, style: str) -> None:
    release = threading.Event()

    async def slow_task() -> None:
        await asyncio.sleep(3600)

    def slow_thread() -> None:
        release.wait(20)

    slow = slow_task if style == "task" else slow_thread
    once = activity(name="once", queue="far", timeout=0.05, retry=Retry(max_attempts=2, first_delay=0.01))(slow)
    total = activity(name="total", queue="far", total_timeout=0.3)(slow)
    both = activity(
        name="both", queue="far", timeout=0.05, total_timeout=0.4, retry=Retry(max_attempts=None, first_delay=0.05)
    )(slow)
    nobody = activity(name="nobody", queue="nobody", total_timeout=0.3)(slow)

    @workflow
    async def uses(ctx: Context) -> list[Any]:
        said: list[Any] = []
        for each in (once, total, both, nobody):
            try:
                await ctx.step.run(each.name, each)
            except TimeoutError as error:
                assert isinstance(error, StepTimedOut)
                said.append(each.name)
        return said

    async with engine(tmp_path, uses, activities=[once, total, both, nobody]) as it:
        try:
            handle: RunHandle[Any] = await it.start(uses)
            assert await handle.result(timeout=60) == ["once", "total", "both", "nobody"]
        finally:
            release.set()


async def test_it_is_cancelled_with_its_run_and_given_up_by_its_code(tmp_path: Path) -> None:
    began, cancelled = [], []

    @activity(queue="far")
    async def endless(name: str) -> None:
        began.append(name)
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(name)
            raise

    @workflow
    async def uses(ctx: Context) -> str:
        far = ctx.step.start("given up", endless, "given up")
        await ctx.step.wait_signal("go")
        await far.cancel()
        await ctx.step.run("cancelled", endless, "cancelled")
        return "ended"

    async with engine(tmp_path, uses, activities=[endless]) as it:
        handle = await it.options(id="u").start(uses)
        await until(lambda: began == ["given up"], "the first")
        await handle.signal("go")
        await until(lambda: cancelled == ["given up"], "its cancellation")
        await until(lambda: began == ["given up", "cancelled"], "the second")
        await handle.cancel("enough")
        with pytest.raises(RunCancelled, match="enough"):
            await handle.result(timeout=60)
        await until(lambda: cancelled == ["given up", "cancelled"], "the second's cancellation")
        for step in ("given up", "cancelled"):
            await status_of(it.handle(f"u/{step}"), "cancelled")


def using(act: Any) -> Workflow[[], None]:
    """A workflow that dispatches this activity and waits for it."""

    @workflow
    async def uses(ctx: Context) -> None:
        await ctx.step.run("far", act)

    return uses


async def test_one_that_was_never_claimed_is_cancelled_without_being_executed(tmp_path: Path) -> None:
    calls = []

    @activity(queue="gpu")
    async def render() -> None:
        calls.append(1)

    uses = using(render)
    async with engine(tmp_path, uses) as here:
        handle = await here.options(id="u").start(uses)
        await status_of(handle, "waiting")
        await handle.cancel()
        with pytest.raises(RunCancelled):
            await handle.result(timeout=60)
        async with engine(tmp_path, activities=[render], queues=("gpu",)):
            await status_of(here.handle("u/far"), "cancelled")
    assert calls == []


async def test_one_that_is_cancelled_by_hand_says_why(tmp_path: Path) -> None:
    @activity(queue="gpu")
    async def render() -> None: ...

    uses = using(render)
    async with engine(tmp_path, uses) as here:
        handle = await here.options(id="u").start(uses)
        await status_of(handle, "waiting")
        await here.handle("u/far").cancel("no more paper")
        async with engine(tmp_path, activities=[render], queues=("gpu",)):
            with pytest.raises(RunFailed, match="no more paper"):
                await handle.result(timeout=60)


def test_its_parameters_may_have_any_name() -> None:
    @activity
    def takes(**given: int) -> dict[str, int]:
        return given

    assert takes(self=1) == {"self": 1}


async def test_arguments_that_do_not_fit_fail_the_run_at_the_call(tmp_path: Path) -> None:
    @activity(queue="far")
    async def typed(n: int) -> int:
        return n

    @workflow
    async def uses(ctx: Context) -> list[str]:
        said: list[str] = []
        for args in ((), (1, 2), ("x",)):
            try:
                await ctx.step.run(f"far{len(said)}", typed, *args)  # type: ignore[call-overload,unused-ignore]
            except Exception as error:
                said.append(type(error).__name__)
        return said

    async with engine(tmp_path, uses, activities=[typed]) as it:
        handle: RunHandle[Any] = await it.start(uses)
        assert await handle.result(timeout=60) == ["TypeError", "TypeError", "PayloadError"]
    assert ask(tmp_path, "SELECT count(*) FROM perdure_runs") == [(1,)]


async def test_without_a_queue_it_runs_where_its_workflow_runs(tmp_path: Path) -> None:
    @activity(retry=QUICK, timeout=5)
    def local() -> int:
        if current_step().attempt == 1:
            raise ValueError
        return threading.get_ident()

    @workflow
    async def uses(ctx: Context) -> list[Any]:
        return [await ctx.step.run("a", local), await ctx.step.options(queue="far").run("b", local)]

    async with engine(tmp_path, uses, activities=[local]) as it:
        handle: RunHandle[Any] = await it.start(uses)
        await handle.result(timeout=60)
        assert kinds(await handle.history()) == [
            *("started", "attempt_failed", "step_completed", "activity", "activity_ended", "ended"),
        ]


async def test_a_worker_that_is_killed_in_the_middle_of_one_costs_one_more_execution(tmp_path: Path) -> None:
    site = Site(tmp_path)
    try:
        first = site.worker(queues=["remote"])
        await site.serving(first)
        # The workflow itself lives here; its activity in processes.
        from tests.e2e import worker_process

        async with engine(tmp_path, worker_process.uses_slow_remote) as it:
            handle: RunHandle[Any] = await it.start(worker_process.uses_slow_remote, 2.5)
            await until_there(lambda: site.ledger(step="far"), "the activity")
            second = site.worker(queues=["remote"])
            await site.serving(second)
            killed(first)
            at = time.monotonic()
            assert await handle.result(timeout=60) == str(second.pid)
            print(f"an activity of a killed worker was done by another after {time.monotonic() - at:.2f} s")
        lines = site.ledger(step="far")
        assert [line.pid for line in lines] == [first.pid, second.pid]
        assert len({line.key for line in lines}) == 1
        ends = [json.loads(event) for (event,) in site.ask("SELECT event FROM perdure_history WHERE seq = 3")]
        assert [end["kind"] for end in ends] == ["activity_ended"]
    finally:
        site.close()


async def test_an_activity_that_kills_its_workers_is_quarantined_and_its_run_is_told(tmp_path: Path) -> None:
    site = Site(tmp_path)
    from tests.e2e import worker_process

    async def keep_one_alive() -> None:
        while True:
            if not any(worker.poll() is None for worker in site.processes):
                site.worker(queues=["remote"])
            await asyncio.sleep(0.02)

    keeper = asyncio.create_task(keep_one_alive())
    try:
        async with engine(tmp_path, worker_process.uses_deadly_remote, queues=("default",)) as it:
            handle: RunHandle[Any] = await it.start(worker_process.uses_deadly_remote)
            told = await handle.result(timeout=60)
            assert "killed its worker 3 times" in told
    finally:
        keeper.cancel()
        site.close()
    assert len(site.ledger(step="far")) == 3


async def test_a_cancel_that_comes_while_an_attempt_ends_is_not_lost(tmp_path: Path) -> None:
    """The request arrives in the moment in which a failed attempt is being recorded."""

    @activity(queue="far", retry=Retry(max_attempts=None, first_delay=0.002, jitter=False))
    async def fails() -> None:
        raise ValueError

    @workflow
    async def uses(ctx: Context) -> None:
        await ctx.step.run("far", fails)

    async with engine(tmp_path, uses, activities=[fails]) as it:
        handles = [await it.options(id=f"u{n}").start(uses) for n in range(20)]
        for handle in handles:
            await handle.cancel()
        for n in range(20):
            await status_of(it.handle(f"u{n}/far"), "cancelled")
        before = contents(tmp_path)
        assert contents(tmp_path) == before
    async with Client(url_of(tmp_path)) as client:
        assert await client.counts() == {"cancelled": 40}
