"""Sync workflows: one thread and one baton, a thread that is given back, a body that starts again over its line."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from perdure.core.errors import NeverRests
from perdure.runtime import drive_sync
from perdure.runtime.drive_sync import BodyThreads
from tests.unit.playing import THREADS, Run, work


def two(ctx: Any) -> Any:
    first = ctx.step.run("a", work)
    second = ctx.step.run("b", work)
    return [first, second]


def idle_again() -> None:
    """Wait until every body's thread is back."""
    until = time.monotonic() + 5
    while THREADS.busy and time.monotonic() < until:
        time.sleep(0.001)


def test_each_call_waits() -> None:
    run = Run(two).value("a", "1")
    assert run.pending == ["b"]
    assert run.value("b", "2").result == "[1,2]"
    assert run.again().result == "[1,2]"


def test_an_unwound_body_starts_again_over_its_line() -> None:
    run = Run(two).value("a", "1")
    assert run.play.unwind()
    run.signal("unrelated")
    assert run.play.driver is not None
    assert run.value("b", "2").result == "[1,2]"


def test_the_deadline_of_a_wait_outlives_the_thread() -> None:
    def flow(ctx: Any) -> Any:
        handle = ctx.step.start("a", work)
        try:
            handle.result(timeout=5)
        except TimeoutError:
            return "late"

    run = Run(flow)
    assert run.play.unwind()
    idle_again()
    assert run.play.line.next_timer() == run.now + 5_000_000
    assert run.after(5).result == '"late"'


def test_an_input_that_resolves_nothing_takes_no_thread() -> None:
    def flow(ctx: Any) -> Any:
        handles = [ctx.step.start(name, work) for name in "abc"]
        ctx.step.wait(handles)
        return [h.result() for h in handles]

    run = Run(flow)
    assert run.play.unwind()
    driver = run.play.driver
    run.value("a", "1").value("b", "2")
    assert run.play.driver is driver
    assert run.value("c", "3").result == "[1,2,3]"


def test_cancellation_arrives_at_the_wait_also_of_an_unwound_body() -> None:
    def flow(ctx: Any) -> Any:
        try:
            ctx.step.run("a", work)
        except asyncio.CancelledError:
            return ctx.step.run("cleanup", work)

    run = Run(flow)
    run.play.unwind()
    run.cancel("enough")
    assert run.dropped == ["a"]
    assert run.pending == ["cleanup"]
    assert run.value("cleanup", "3").result == "3"
    assert run.again().result == "3"


def test_a_body_that_swallows_its_unwinding_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def flow(ctx: Any) -> Any:
        try:
            return ctx.step.run("a", work)
        except BaseException:
            return "swallowed"

    run = Run(flow)
    with caplog.at_level(logging.WARNING):
        run.play.unwind()
        idle_again()
    assert "swallowed" in caplog.text
    assert run.value("a", "1").result == "1"


def test_a_body_that_spins_while_it_is_unwound_is_parked() -> None:
    calls: list[int] = []

    def flow(ctx: Any) -> Any:
        while True:
            try:
                return ctx.step.run(f"a{len(calls)}", work) if not calls else ctx.step.run("a", work)
            except BaseException:
                calls.append(1)

    run = Run(flow)
    before = THREADS.busy
    run.play.unwind()
    until = time.monotonic() + 5
    while THREADS.busy >= before and time.monotonic() < until:
        time.sleep(0.001)
    assert THREADS.busy < before, "a parked thread no longer counts"
    assert len(calls) <= 102


@pytest.mark.parametrize("call", [lambda ctx: ctx.step.run("b", work), lambda ctx: ctx.now()])
def test_only_the_body_may_call_ctx(call: Callable[[Any], Any]) -> None:
    def flow(ctx: Any) -> Any:
        found: list[str] = []

        def elsewhere() -> None:
            try:
                call(ctx)
            except RuntimeError as error:
                found.append(str(error))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return found

    assert "outside the workflow's own body" in Run(flow).result


@pytest.mark.parametrize("timeout", [0, None])
def test_waiting_for_nothing_returns_at_once(timeout: float | None) -> None:
    def flow(ctx: Any) -> Any:
        done, pending = ctx.step.wait([], timeout=timeout)
        handle = ctx.step.start("a", work)
        done, pending = ctx.step.wait([handle], timeout=0)
        return [len(done), len(pending)]

    assert Run(flow).result == "[0,1]"


def test_a_result_with_timeout_zero_is_late_at_once_in_both_faces() -> None:
    def sync(ctx: Any) -> Any:
        try:
            ctx.step.start("a", work).result(timeout=0)
        except TimeoutError:
            return "late"

    async def not_sync(ctx: Any) -> Any:
        try:
            await ctx.step.start("a", work).result(timeout=0)
        except TimeoutError:
            return "late"

    assert Run(sync).result == Run(not_sync).result == '"late"'


def test_only_the_function_of_a_run_uses_the_thread_of_the_body() -> None:
    def flow(ctx: Any) -> Any:
        handle = ctx.step.start("a", work)
        handle.result()
        ctx.step.run("b", work)

    run = Run(flow)
    driver: Any = run.play.driver
    assert not driver.may_execute(run.play.line.ops["a"])
    run.value("a")
    assert driver.may_execute(run.play.line.ops["b"])
    run.close()


def test_a_body_that_starts_again_logs_nothing_twice(caplog: pytest.LogCaptureFixture) -> None:
    def flow(ctx: Any) -> None:
        ctx.log.warning("before")
        ctx.step.run("a", work)
        ctx.log.warning("after")

    run = Run(flow)
    assert run.play.unwind()
    run.value("a")
    assert run.status == "completed"
    assert [record.getMessage() for record in caplog.records] == ["[run-1] before", "[run-1] after"]


def test_a_thread_that_is_lost_at_its_job_counts_again_only_if_it_goes_on_with_it() -> None:
    pool = BodyThreads(limit=1)
    release, over = threading.Event(), threading.Event()

    def job() -> None:
        release.wait(20)
        over.set()

    thread = pool.run(job)
    assert pool.busy == 1
    pool.lose(thread, job)
    pool.lose(thread, job)
    assert pool.busy == 0
    pool.regain(thread, job)
    pool.regain(thread, job)
    assert pool.busy == 1
    pool.lose(thread, job)
    release.set()
    assert over.wait(20)
    until(lambda: thread.job is None)
    pool.regain(thread, job)
    # It has ended: a thread that was lost does not come back to others.
    assert (pool.busy, pool._idle) == (0, [])
    again = pool.run(lambda: None)
    assert again is not thread
    pool.lose(thread, job)
    until(lambda: pool.busy == 0)


def until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_interruption_that_comes_when_the_body_has_just_returned_is_the_bodys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    came: list[int] = []

    def arrives() -> None:
        came.append(1)
        raise NeverRests

    monkeypatch.setattr(drive_sync, "arrives", arrives)
    run = Run(two).value("a", "1").value("b", "2")
    assert came
    assert run.play.restless
    idle_again()
    assert THREADS.busy == 0
