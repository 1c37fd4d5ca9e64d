"""Cancelling: a reason that arrives at the current wait in every style, cleanup after it, steps that are given up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from perdure import Cancelled, Context, Pending, RunCancelled, RunFailed, StepFailed, workflow
from perdure.runtime.context import SyncContext
from tests.integration.helpers import AT_ONCE, ONCE, engine, kinds, status_of, until


class Ledger:
    """What the steps of one test did."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.release = threading.Event()

    def note(self, text: str) -> str:
        self.lines.append(text)
        return text

    async def endless(self) -> None:
        self.note("endless began")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.note("endless cancelled")
            raise

    def blocking(self) -> str:
        self.note("blocking began")
        self.release.wait(20)
        return self.note("blocking ended")


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.mark.parametrize("style", ["async", "sync", "generator"])
@pytest.mark.parametrize("restarted", [False, True])
async def test_the_reason_arrives_at_the_wait_and_cleanup_runs(
    tmp_path: Path, ledger: Ledger, style: str, restarted: bool
) -> None:
    @workflow(name="w")
    async def in_async(ctx: Context) -> str:
        try:
            await ctx.step.wait_signal("never")
        except Cancelled:
            assert ctx.cancelled
            await ctx.step.run("clean up", ledger.note, ctx.cancel_reason)
            await ctx.step.sleep("rest", 0.05)
            await ctx.step.run("clean more", ledger.note, "more")
            raise
        return "not cancelled"

    @workflow(name="w")
    def in_sync(ctx: SyncContext) -> str:
        try:
            ctx.step.wait_signal("never")
        except Cancelled:
            assert ctx.cancelled
            ctx.step.run("clean up", ledger.note, ctx.cancel_reason)
            ctx.step.sleep("rest", 0.05)
            ctx.step.run("clean more", ledger.note, "more")
            raise
        return "not cancelled"

    @workflow(name="w")
    def in_generator(ctx: Context) -> Generator[Any, Any, str]:
        try:
            yield ctx.step.wait_signal("never")
        except Cancelled:
            assert ctx.cancelled
            yield ctx.step.run("clean up", ledger.note, ctx.cancel_reason)
            yield ctx.step.sleep("rest", 0.05)
            yield ctx.step.run("clean more", ledger.note, "more")
            raise
        return "not cancelled"

    each: Any = {"async": in_async, "sync": in_sync, "generator": in_generator}[style]
    async with engine(tmp_path, each) as it:
        handle = await it.options(id="w").start(each)
        await status_of(handle, "waiting")
        if not restarted:
            await handle.cancel("changed my mind")
            await handle.cancel("again")
            with pytest.raises(RunCancelled, match="changed my mind"):
                await handle.result(timeout=60)
    if restarted:
        async with engine(tmp_path, each) as it:
            handle = it.handle("w")
            await handle.cancel("changed my mind")
            with pytest.raises(RunCancelled, match="changed my mind"):
                await handle.result(timeout=60)
            assert await handle.status() == "cancelled"
    assert ledger.lines == ["changed my mind", "more"]


async def test_a_second_cancel_does_not_interrupt_cleanup(tmp_path: Path, ledger: Ledger) -> None:
    @workflow
    async def careful(ctx: Context) -> None:
        try:
            await ctx.step.wait_signal("never")
        finally:
            await ctx.step.run("cleaning", ledger.note, "cleaning")
            await ctx.step.wait_signal("cleaned")
            await ctx.step.run("cleaned up", ledger.note, "cleaned")

    async with engine(tmp_path, careful) as it:
        handle: Any = await it.start(careful)
        await status_of(handle, "waiting")
        await handle.cancel("first")
        await until(lambda: ledger.lines == ["cleaning"], "the cleanup")
        await handle.cancel("second")
        await status_of(handle, "waiting")
        assert 'asked to cancel ("first")' in await handle.why()
        await handle.signal("cleaned")
        with pytest.raises(RunCancelled, match="first"):
            await handle.result(timeout=60)
    assert ledger.lines == ["cleaning", "cleaned"]


async def test_a_request_that_the_code_swallows_completes_the_run(tmp_path: Path) -> None:
    @workflow
    async def stubborn(ctx: Context) -> str:
        try:
            await ctx.step.wait_signal("never")
        except Cancelled:
            return f"kept on: {ctx.cancel_reason}"
        return "no"

    @workflow
    async def raises(ctx: Context) -> str:
        raise asyncio.CancelledError("nobody asked")

    async with engine(tmp_path, stubborn, raises) as it:
        handle: Any = await it.start(stubborn)
        await handle.cancel("x")
        assert await handle.result(timeout=60) == "kept on: x"
        with pytest.raises(RunFailed):
            await (await it.start(raises)).result(timeout=60)


async def test_steps_in_flight_are_given_up_and_their_late_results_change_nothing(
    tmp_path: Path, ledger: Ledger
) -> None:
    @workflow
    async def busy(ctx: Context) -> None:
        await asyncio.gather(ctx.step.run("task", ledger.endless), ctx.step.run("thread", ledger.blocking))

    async with engine(tmp_path, busy) as it:
        handle: Any = await it.start(busy)
        await until(lambda: len(ledger.lines) == 2, "both steps")
        await handle.cancel()
        with pytest.raises(RunCancelled):
            await handle.result(timeout=60)
        await until(lambda: "endless cancelled" in ledger.lines, "the cancellation of the task")
        before = await handle.history()
        assert kinds(before).count("step_cancelled") == 2
        ledger.release.set()
        await until(lambda: "blocking ended" in ledger.lines, "the end of the thread")
        await asyncio.sleep(0.05)
        assert await handle.history() == before


async def test_a_sync_body_is_cancelled_while_its_step_runs_on_its_own_thread(tmp_path: Path, ledger: Ledger) -> None:
    @workflow
    def busy(ctx: SyncContext) -> str:
        try:
            ctx.step.run("thread", ledger.blocking)
        except Cancelled:
            ctx.step.run("clean up", ledger.note, ctx.cancel_reason)
            raise
        return "no"

    async with engine(tmp_path, busy) as it:
        handle: Any = await it.start(busy)
        await until(lambda: ledger.lines == ["blocking began"], "the step")
        await handle.cancel("now")
        try:
            with pytest.raises(RunCancelled, match="now"):
                await handle.result(timeout=60)
        finally:
            ledger.release.set()
    assert ledger.lines[:2] == ["blocking began", "now"]


async def test_a_wait_for_the_next_attempt_is_cancelled(tmp_path: Path) -> None:
    calls = []

    def fails() -> None:
        calls.append(1)
        raise ValueError

    @workflow
    async def retrying(ctx: Context) -> None:
        await ctx.step.run("fails", fails)

    async with engine(tmp_path, retrying) as it:
        handle: Any = await it.start(retrying)
        await until(lambda: calls, "the first attempt")
        await handle.cancel()
        with pytest.raises(RunCancelled):
            await handle.result(timeout=60)
        count = len(calls)
        await asyncio.sleep(0.05)
        assert len(calls) == count


async def test_a_cancel_before_the_first_turn_is_not_lost(tmp_path: Path, ledger: Ledger) -> None:
    @workflow
    async def careful(ctx: Context) -> None:
        try:
            await ctx.step.sleep("long", days=1)
        finally:
            await ctx.step.run("clean up", ledger.note, "clean")

    async with engine(tmp_path, careful) as first:
        handle: Any = await first.options(queue="later").start(careful)
        await handle.cancel("early")
        async with engine(tmp_path, careful, queues=("later",)):
            with pytest.raises(RunCancelled, match="early"):
                await handle.result(timeout=60)
    assert ledger.lines == ["clean"]


async def test_one_step_is_given_up_and_the_run_goes_on(tmp_path: Path, ledger: Ledger) -> None:
    @workflow
    async def chooses(ctx: Context) -> list[str]:
        slow: Pending[None] = ctx.step.start("slow", ledger.endless)
        await ctx.step.wait_signal("go")
        await slow.cancel()
        said = [str(slow.done())]
        try:
            await slow.result()
        except Cancelled:
            said.append("cancelled")
        said.append(await ctx.step.run("after", ledger.note, "after"))
        task = asyncio.create_task(ctx.step.run("too slow", ledger.endless))
        done, _ = await asyncio.wait([task], timeout=0.05)
        if not done:
            task.cancel()
            said.append("timeout")
        return said

    async with engine(tmp_path, chooses) as it:
        handle: Any = await it.start(chooses)
        await until(lambda: ledger.lines == ["endless began"], "the step")
        await handle.signal("go")
        assert await handle.result(timeout=60) == ["True", "cancelled", "after", "timeout"]
        await until(lambda: ledger.lines.count("endless cancelled") == 2, "both cancellations")


async def test_a_failed_cleanup_step_fails_the_run_with_its_own_error(tmp_path: Path) -> None:
    def fails() -> None:
        raise ValueError("cannot clean")

    @workflow
    async def careful(ctx: Context) -> None:
        try:
            await ctx.step.wait_signal("never")
        finally:
            await ctx.step.options(retry=AT_ONCE).run("clean up", fails)

    async with engine(tmp_path, careful) as it:
        handle: Any = await it.start(careful)
        await handle.cancel()
        with pytest.raises(RunFailed, match="cannot clean") as raised:
            await handle.result(timeout=60)
        assert isinstance(raised.value, RunFailed)
        assert not isinstance(raised.value, StepFailed)


async def test_terminate_runs_no_cleanup(tmp_path: Path, ledger: Ledger) -> None:
    @workflow
    async def careful(ctx: Context) -> None:
        try:
            await ctx.step.run("endless", ledger.endless)
        finally:
            await ctx.step.run("clean up", ledger.note, "clean")

    async with engine(tmp_path, careful) as it:
        handle: Any = await it.start(careful)
        await until(lambda: ledger.lines, "the step")
        await handle.terminate("now")
        await until(lambda: "endless cancelled" in ledger.lines, "its cancellation")
        assert (await handle.history())[-1].kind == "ended"
    assert "clean" not in ledger.lines


@pytest.mark.parametrize("how", ["run", "start"])
async def test_a_function_that_was_given_up_holds_none_of_the_threads(tmp_path: Path, ledger: Ledger, how: str) -> None:
    @workflow
    def blocked(ctx: SyncContext, timeout: float) -> str:
        step = ctx.step.options(timeout=timeout, retry=ONCE)
        try:
            if how == "run":
                step.run("blocks", ledger.blocking)
            else:
                step.start("blocks", ledger.blocking).result()
        except StepFailed:
            return ctx.step.run("after", ledger.note, "after")
        return "not given up"

    async with engine(tmp_path, blocked, threads=2) as opened:
        shift = opened._core.shift
        assert shift is not None
        handles = [await opened.start(blocked, 0.05) for _ in range(6)]
        assert [await handle.result(timeout=60) for handle in handles] == ["after"] * 6
        # One that was out of time before its thread came to it is never called.
        began = ledger.lines.count("blocking began")
        assert 1 <= began <= 6
        await until(lambda: shift.threads.busy == 0, "all threads")
        assert (shift.executor.in_threads, shift.executing) == (0, 0)
        ledger.release.set()
        await until(lambda: ledger.lines.count("blocking ended") == began, "the functions' end")
        assert await (await opened.start(blocked, 60)).result(timeout=60) == "not given up"
        await until(lambda: shift.threads.busy == 0, "all threads again")


@pytest.mark.parametrize("restarted", [False, True])
async def test_the_message_of_a_cancelled_task_arrives_at_its_step(
    tmp_path: Path, ledger: Ledger, restarted: bool
) -> None:
    @workflow
    async def w(ctx: Context) -> list[str]:
        async def waits() -> list[str]:
            try:
                await ctx.step.run("endless", ledger.endless)
            except asyncio.CancelledError as cancelled:
                return list(cancelled.args)
            return ["not cancelled"]

        task = asyncio.create_task(waits())
        await ctx.step.wait_signal("enough")
        task.cancel("enough of it")
        said = await task
        await ctx.step.wait_signal("go")
        return said

    async with engine(tmp_path, w) as opened:
        handle = await opened.options(id="w").start(w)
        await until(lambda: "endless began" in ledger.lines, "the step")
        await handle.signal("enough")
        await until(lambda: "endless cancelled" in ledger.lines, "the cancellation")
        if not restarted:
            await handle.signal("go")
            assert await handle.result(timeout=60) == ["enough of it"]
    if restarted:
        async with engine(tmp_path, w) as opened:
            await opened.handle("w").signal("go")
            assert await opened.handle("w").result(timeout=60) == ["enough of it"]
