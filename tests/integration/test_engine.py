"""An engine on a SQLite file: what its users rely on from the first call to the last."""

# ruff: noqa: PT017  # what is asserted in an `except` block here is inside a workflow

from __future__ import annotations

import asyncio
import gc
import logging
import sqlite3
import threading
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from perdure import (
    Client,
    Context,
    Engine,
    Limits,
    NonRetryable,
    NotAStore,
    Retry,
    RetryAfter,
    RunFailed,
    RunHandle,
    RunTerminated,
    RunTimedOut,
    SQLiteStore,
    StepFailed,
    StepTimedOut,
    StoreError,
    StoreLocked,
    StoreUnavailable,
    UnknownWorkflow,
    Worker,
    activity,
    current_step,
    workflow,
)
from perdure.runtime.context import SyncContext
from perdure.worker import shift as shift_module
from perdure.worker.residents import Resident
from tests.integration.helpers import AT_ONCE, ONCE, PATIENCE, ask, engine, kinds, status_of, until, url_of

# --- life ----------------------------------------------------------------------------------------------


@workflow
async def double(ctx: Context, n: int) -> int:
    return int(await ctx.step.run("double", lambda: n * 2))


@workflow
async def waiting(ctx: Context) -> Any:
    return await ctx.step.wait_signal("go")


async def test_more_runs_than_a_worker_has_room_for_follow_each_other_without_a_pause(tmp_path: Path) -> None:
    async with engine(tmp_path, double) as first:
        await first.start(double, 0)
    async with Client(url_of(tmp_path)) as client:
        for n in range(60):
            await client.options(id=f"d{n}").start(double, n)
    async with engine(tmp_path, double, concurrency=1) as second:
        at = time.monotonic()
        results = [await second.handle(f"d{n}").result(timeout=60) for n in range(60)]
        took = time.monotonic() - at
    assert results == [n * 2 for n in range(60)]
    print(f"60 runs, four at a time: {took * 1000:.0f} ms")
    # Found by hints: by the safety poll alone it would take 15 s.
    assert took < 12


async def test_an_open_client_serves_many_first_calls_at_once(tmp_path: Path) -> None:
    async with engine(tmp_path, double):
        client = Client(url_of(tmp_path))
        try:
            handles: list[RunHandle[Any]] = await asyncio.gather(*(client.start(double, n) for n in range(20)))
            assert [await handle.result(timeout=60) for handle in handles] == [n * 2 for n in range(20)]
        finally:
            await client.close()


async def test_a_client_that_could_not_open_says_so_again_and_opens_when_it_can(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    client = Client(url_of(folder))
    try:
        for _ in range(2):
            with pytest.raises(NotAStore, match="no folder"):
                await client.start("double", 1)
        folder.mkdir()
        with pytest.raises(UnknownWorkflow):
            await client.start("double", 1)
    finally:
        await client.close()


async def test_an_engine_that_could_not_open_leaves_nothing_behind(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(NotAStore, match="no folder"):
        async with Engine(url_of(tmp_path / "nowhere")):
            raise AssertionError("it opened")
    await until(lambda: threading.active_count() <= before + 1, "the end of its threads")


async def test_stop_before_run_is_not_lost(tmp_path: Path) -> None:
    worker = Worker(url_of(tmp_path), workflows=[double])
    await worker.stop()
    await asyncio.wait_for(worker.run(), 10)


async def test_a_run_that_is_terminated_leaves_memory_and_tells_who_waits(tmp_path: Path) -> None:
    async with engine(tmp_path, waiting) as here, Client(url_of(tmp_path)) as elsewhere:
        own: RunHandle[Any] = await here.start(waiting)
        await status_of(own, "waiting")
        result = asyncio.ensure_future(own.result(timeout=60))
        await own.terminate("by the engine itself")
        with pytest.raises(RunTerminated, match="by the engine itself"):
            await result

        other: RunHandle[Any] = await here.start(waiting)
        await status_of(other, "waiting")
        result = asyncio.ensure_future(other.result(timeout=60))
        await elsewhere.handle(other.id).terminate("by somebody else")
        with pytest.raises(RunTerminated, match="by somebody else"):
            await result
        shift = here._core.shift
        assert shift is not None
        await until(lambda: not shift.residents, "both to leave memory")


async def test_a_run_timeout_ends_it_without_its_code_and_tells_who_waits(tmp_path: Path) -> None:
    cleaned = []

    @workflow(timeout=0.2)
    async def slow(ctx: Context) -> None:
        try:
            await ctx.step.wait_signal("never")
        finally:
            cleaned.append("code")

    async with engine(tmp_path, slow) as it:
        handle: RunHandle[Any] = await it.start(slow)
        with pytest.raises(RunTimedOut):
            await handle.result(timeout=60)
        assert await handle.status() == "timed_out"
        assert kinds(await handle.history())[-1] == "ended"


async def test_a_step_of_a_run_that_was_terminated_is_cancelled(tmp_path: Path) -> None:
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def endless() -> None:
        began.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    @workflow
    async def busy(ctx: Context) -> None:
        await ctx.step.run("endless", endless)

    async with engine(tmp_path, busy) as it:
        handle: RunHandle[Any] = await it.start(busy)
        await asyncio.wait_for(began.wait(), 10)
        await handle.terminate()
        await asyncio.wait_for(cancelled.wait(), 10)


async def test_rules_of_a_retry_judge_an_attempt_that_took_too_long_too(tmp_path: Path) -> None:
    calls: list[str] = []

    async def slow(name: str) -> None:
        calls.append(name)
        await asyncio.sleep(60)

    far = activity(name="far", queue="far", timeout=0.05, retry=Retry(first_delay=0, give_up_on=(TimeoutError,)))(slow)

    @workflow
    async def tries(ctx: Context) -> list[str]:
        for name, rules in (
            ("given up", {"give_up_on": (TimeoutError,)}),
            ("not wanted", {"retry_if": lambda error: not isinstance(error, TimeoutError)}),
            ("again", {}),
        ):
            retry = Retry(max_attempts=2, first_delay=0, **rules)
            try:
                await ctx.step.options(timeout=0.05, retry=retry).run(name, slow, name)
            except StepTimedOut:
                pass
        try:
            await ctx.step.run("far", far, "far")
        except StepTimedOut:
            pass
        return []

    async with engine(tmp_path, tries, activities=[far]) as it:
        await (await it.start(tries)).result(timeout=60)
        assert calls == ["given up", "not wanted", "again", "again", "far"]


async def test_a_run_that_has_ended_is_gone_from_memory_whatever_its_timers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @workflow
    async def waits(ctx: Context) -> str:
        return str(await ctx.step.wait_signal("go", timeout=timedelta(days=7)))

    async with engine(tmp_path, waits) as it:
        for number in range(20):
            handle = await it.start(waits)
            await handle.signal("go", number)
            assert await handle.result(timeout=60) == str(number)
        gc.collect()
        # The watchdog remembers the last one, a frame of the loop perhaps another.
        assert len([each for each in gc.get_objects() if type(each) is Resident]) < 5
        core: Any = it._core
        assert len(core.shift._timers) <= 20
        monkeypatch.setattr(shift_module, "FEW_TIMERS", 5)
        await status_of(await it.start(waits), "waiting")
        assert len(core.shift._timers) == 1


async def test_a_quarantined_run_still_has_its_timeout(tmp_path: Path) -> None:
    async with engine(tmp_path, double) as first:
        await first.start(double, 1)
    async with Client(url_of(tmp_path)) as client:
        handle = await client.options(timeout=1.5).start(double, 2)
        with closing(sqlite3.connect(tmp_path / "runs.db")) as db:
            db.execute("UPDATE perdure_runs SET strikes = 3 WHERE id = ?", (handle.id,))
            db.commit()
        async with engine(tmp_path, double):
            await status_of(handle, "quarantined")
            with pytest.raises(RunFailed):
                await handle.result(timeout=0)
            await status_of(handle, "timed_out")


# --- steps that fail -----------------------------------------------------------------------------------


async def test_what_a_run_and_a_step_log_names_them_whatever_their_ids(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def charge() -> None:
        current_step().log.info("%d cents, 100 %%", 42)

    @workflow
    async def pays(ctx: Context) -> None:
        ctx.log.info("%d orders, 100 %%", 1)
        ctx.log.info("100 %")
        await ctx.step.run("charge %s", charge)

    caplog.set_level(logging.INFO, logger="perdure")
    async with engine(tmp_path, pays) as it:
        await (await it.options(id="p-%d").start(pays)).result(timeout=60)
    said = [record for record in caplog.records if record.name in ("perdure.run", "perdure.step")]
    assert [record.getMessage() for record in said] == [
        "[p-%d] 1 orders, 100 %",
        "[p-%d] 100 %",
        "[p-%d charge %s] 42 cents, 100 %",
    ]
    assert (said[2].run, said[2].step) == ("p-%d", "charge %s")  # type: ignore[attr-defined]
    assert {record.filename for record in said} == {Path(__file__).name}


async def test_a_run_that_waits_for_its_next_attempt_is_parked_and_survives_a_restart(tmp_path: Path) -> None:
    attempts: list[int] = []

    def flaky() -> str:
        attempts.append(current_step().attempt)
        if len(attempts) == 1:
            raise ValueError("not yet")
        return "done"

    @workflow
    async def patient(ctx: Context) -> str:
        return str(await ctx.step.options(retry=Retry(first_delay=1.5, jitter=False)).run("flaky", flaky))

    async with engine(tmp_path, patient) as first:
        handle = await first.options(id="p").start(patient)
        await status_of(handle, "waiting")
        why = await handle.why()
        assert 'waits to try step "flaky"' in why
        assert "attempt 2 of 3" in why
        assert "ValueError: not yet" in why
        [wait] = (await handle.info()).waits.waits
        due = wait.until
    assert ask(tmp_path, "SELECT status, owner, due_at FROM perdure_runs") == [("waiting", None, due)]
    assert attempts == [1]
    async with engine(tmp_path, patient) as second:
        assert await second.handle("p").result(timeout=60) == "done"
        history = await second.handle("p").history()
    assert attempts == [1, 2]
    assert kinds(history) == ["started", "attempt_failed", "step_completed", "ended"]
    assert history[1].attempt == 1
    assert history[2].attempt == 2


async def test_what_a_step_raised_is_kept_and_shown_and_caught_by_its_type(tmp_path: Path) -> None:
    class Declined(Exception):
        def __init__(self, code: int) -> None:
            super().__init__(f"declined with {code}")
            self.code = code

    def fails() -> None:
        try:
            dict[str, int]()["missing"]
        except KeyError as error:
            raise ValueError("bad \udc80 text") from error

    def declines() -> None:
        raise Declined(7)

    @workflow
    async def catching(ctx: Context) -> list[Any]:
        caught: list[Any] = []
        try:
            await ctx.step.options(retry=AT_ONCE).run("fails", fails)
        except ValueError as error:
            assert isinstance(error, StepFailed)
            assert error.cause is not None
            caught += [error.type, error.attempts, error.cause.type, "in fails" in error.traceback]
        try:
            await ctx.step.options(retry=ONCE, raises=Declined).run("declines", declines)
        except Declined as error:
            caught += [error.code]
        try:
            await ctx.step.options(retry=ONCE).run("declines again", declines)
        except StepFailed as error:
            caught += [error.message, isinstance(error, Declined)]
        return caught

    async with engine(tmp_path, catching) as it:
        handle: RunHandle[Any] = await it.start(catching)
        result = await handle.result(timeout=60)
        assert result == ["ValueError", 3, "KeyError", True, 7, "declined with 7", False]
        history = await handle.history()
    failed = [event for event in history if event.step == "fails"]
    assert kinds(failed) == ["attempt_failed", "attempt_failed", "step_failed"]
    error = failed[0].data["error"]
    assert error["type"] == "ValueError"
    assert error["cause"]["type"] == "KeyError"
    assert "in fails" in error["traceback"]


async def test_an_error_that_leaves_the_workflow_reaches_the_caller_with_its_chain(tmp_path: Path) -> None:
    def fails() -> None:
        raise LookupError("no such order")

    @workflow
    async def failing(ctx: Context) -> None:
        try:
            await ctx.step.options(retry=ONCE).run("fails", fails)
        except LookupError as error:
            raise RuntimeError("the order cannot be shipped") from error

    async with engine(tmp_path, failing) as it:
        handle: RunHandle[Any] = await it.start(failing)
        with pytest.raises(RunFailed, match="cannot be shipped") as raised:
            await handle.result(timeout=60)
        cause = raised.value.cause
        assert cause.type == "RuntimeError"
        assert cause.cause.type == "LookupError"
        assert "in failing" in cause.traceback


async def test_non_retryable_and_retry_after_are_obeyed(tmp_path: Path) -> None:
    calls: dict[str, list[float]] = {"final": [], "later": [], "given up": [], "judged": []}

    def final() -> None:
        calls["final"].append(time.monotonic())
        raise NonRetryable("never")

    def later() -> str:
        calls["later"].append(time.monotonic())
        if len(calls["later"]) == 1:
            raise RetryAfter(0.3, "busy")
        return "done"

    def given_up() -> None:
        calls["given up"].append(time.monotonic())
        raise KeyError("x")

    def judged() -> None:
        calls["judged"].append(time.monotonic())
        raise OSError(28, "full")

    @workflow
    async def obedient(ctx: Context) -> str:
        for name, fn, retry in (
            ("final", final, AT_ONCE),
            ("given up", given_up, Retry(first_delay=0.001, give_up_on=LookupError)),
            ("judged", judged, Retry(first_delay=0.001, retry_if=lambda error: getattr(error, "errno", 0) != 28)),
        ):
            try:
                await ctx.step.options(retry=retry).run(name, fn)
            except StepFailed:
                continue
            raise AssertionError(name)
        return str(await ctx.step.options(retry=AT_ONCE).run("later", later))

    async with engine(tmp_path, obedient) as it:
        handle: RunHandle[Any] = await it.start(obedient)
        assert await handle.result(timeout=60) == "done"
    assert {name: len(times) for name, times in calls.items()} == {"final": 1, "later": 2, "given up": 1, "judged": 1}
    assert calls["later"][1] - calls["later"][0] >= 0.3


@pytest.mark.parametrize("style", ["task", "thread"])
async def test_timeouts_of_a_step(tmp_path: Path, style: str) -> None:
    release = threading.Event()
    attempts = []

    async def slow_task() -> None:
        attempts.append(1)
        await asyncio.sleep(3600)

    def slow_thread() -> None:
        attempts.append(1)
        release.wait(20)

    slow = slow_task if style == "task" else slow_thread

    @workflow
    async def limited(ctx: Context) -> list[str]:
        said = []
        for name, options in (
            ("attempts", {"timeout": 0.05, "retry": Retry(max_attempts=2, first_delay=0.001)}),
            ("total", {"total_timeout": 0.2}),
            ("both", {"timeout": 0.05, "total_timeout": 0.3, "retry": Retry(max_attempts=None, first_delay=0.02)}),
        ):
            try:
                await ctx.step.options(**options).run(name, slow)
            except TimeoutError as error:
                assert isinstance(error, StepTimedOut)
                said.append(error.message if name == "attempts" else name)
        return said

    async with engine(tmp_path, limited) as it:
        handle: RunHandle[Any] = await it.start(limited)
        try:
            longer = "Attempt 2 took longer than its timeout of 50 ms."
            assert await handle.result(timeout=60) == [longer, "total", "both"]
            history = await handle.history()
        finally:
            release.set()
    assert kinds([event for event in history if event.step == "attempts"]) == ["attempt_failed", "step_failed"]
    assert kinds([event for event in history if event.step == "total"]) == ["step_failed"]
    assert len(attempts) >= 5


async def test_a_total_timeout_counts_across_a_restart(tmp_path: Path) -> None:
    def fails() -> None:
        raise ValueError("again")

    @workflow
    async def limited(ctx: Context) -> str:
        retry = Retry(max_attempts=None, first_delay=0.3, factor=1, jitter=False)
        try:
            await ctx.step.options(retry=retry, total_timeout=0.8).run("fails", fails)
        except StepTimedOut as error:
            assert error.cause is not None
            return error.cause.type
        return "no error"

    async with engine(tmp_path, limited) as first:
        await first.options(id="t").start(limited)
        await until(lambda: ask(tmp_path, "SELECT 1 FROM perdure_history WHERE seq = 2"), "the first attempt")
    async with engine(tmp_path, limited) as second:
        assert await second.handle("t").result(timeout=60) == "ValueError"
        history = await second.handle("t").history()
    took = history[-2].at - history[0].at
    assert took.total_seconds() < 5


# --- code that misbehaves ------------------------------------------------------------------------------


async def test_except_exception_does_not_swallow_suspension(tmp_path: Path) -> None:
    swallowed: list[str] = []

    @workflow
    async def greedy(ctx: Context) -> str:
        try:
            await ctx.step.wait_signal("go")
        except Exception as error:
            swallowed.append(repr(error))
        return "went on"

    @workflow
    def greedy_sync(ctx: SyncContext) -> str:
        try:
            ctx.step.wait_signal("go")
        except Exception as error:
            swallowed.append(repr(error))
        return "went on"

    async with engine(tmp_path, greedy, greedy_sync) as first:
        for each in (greedy, greedy_sync):
            handle = await first.options(id=each.name).start(each)
            await status_of(handle, "waiting")
    async with engine(tmp_path, greedy, greedy_sync, resident=0) as second:
        for name in ("greedy", "greedy_sync"):
            await second.handle(name).signal("go")
            assert await second.handle(name).result(timeout=60) == "went on"
    assert swallowed == []


async def test_code_that_never_rests_delays_its_process_by_at_most_the_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @workflow
    async def restless(ctx: Context) -> None:
        await ctx.step.run("first", lambda: 1)
        while True:
            pass

    @workflow
    def restless_sync(ctx: SyncContext) -> None:
        ctx.step.run("first", lambda: 1)
        while True:
            pass

    for each in (restless, restless_sync):
        async with engine(tmp_path, restless, restless_sync, double, limits=Limits(busy=0.5)) as it:
            with caplog.at_level(logging.WARNING):
                at = time.monotonic()
                bad: RunHandle[Any] = await it.start(each)
                await until(lambda: "has not rested" in caplog.text, "the warning")
            assert await (await it.start(double, 4)).result(timeout=60) == 8
            took = time.monotonic() - at
            print(f"{each.name}: the other run went on after {took * 1000:.0f} ms")
            assert took < 4
            await status_of(bad, "waiting", "ready")
            why = await bad.why()
            assert "did not rest" in why
            assert "test_engine.py" in why
            await bad.terminate()
        caplog.clear()


async def test_an_error_in_one_run_is_no_trouble_for_the_others(tmp_path: Path) -> None:
    @workflow
    async def leaves(ctx: Context) -> None:
        await ctx.step.run("first", lambda: 1)
        raise SystemExit(3)

    @workflow
    def leaves_sync(ctx: SyncContext) -> None:
        ctx.step.run("first", lambda: 1)
        raise SystemExit(3)

    def exits() -> None:
        raise SystemExit(4)

    async def exits_async() -> None:
        raise SystemExit(4)

    @workflow
    async def step_leaves(ctx: Context) -> str:
        for name, fn in (("thread", exits), ("task", exits_async)):
            try:
                await ctx.step.options(retry=AT_ONCE).run(name, fn)
            except StepFailed as error:
                assert error.type == "SystemExit"
        return "both caught"

    async with engine(tmp_path, leaves, leaves_sync, step_leaves, double) as it:
        for each in (leaves, leaves_sync):
            handle: RunHandle[Any] = await it.start(each)
            with pytest.raises(RunFailed, match="SystemExit"):
                await handle.result(timeout=60)
        assert await (await it.start(step_leaves)).result(timeout=60) == "both caught"
        assert await (await it.start(double, 4)).result(timeout=60) == 8


async def test_a_history_that_cannot_be_read_harms_only_its_run(tmp_path: Path) -> None:
    async with engine(tmp_path, waiting, double) as first:
        for n in range(3):
            await first.options(id=f"w{n}").start(waiting)
        for n in range(3):
            await status_of(first.handle(f"w{n}"), "waiting")
    with closing(sqlite3.connect(tmp_path / "runs.db")) as db:
        db.execute(
            'UPDATE perdure_history SET event = \'{"kind":"from_the_future"}\' WHERE seq = 2 AND run = '
            "(SELECT key FROM perdure_runs WHERE id = 'w1')"
        )
        db.commit()
    async with Client(url_of(tmp_path)) as client:
        for n in range(3):
            await client.handle(f"w{n}").signal("go", n)
    async with engine(tmp_path, waiting, double) as second:
        assert await second.handle("w0").result(timeout=60) == 0
        assert await second.handle("w2").result(timeout=60) == 2
        assert await (await second.start(double, 4)).result(timeout=60) == 8
        await status_of(second.handle("w1"), "blocked")
        assert "from_the_future" in await second.handle("w1").why()


# --- a store in trouble --------------------------------------------------------------------------------


class Troubled(SQLiteStore):
    """A store whose calls can be made to fail."""

    failing: frozenset[str] = frozenset()
    error: Exception = StoreUnavailable("as the test wants it")

    def write(self, batch: Any) -> Any:
        self._maybe("write")
        return super().write(batch)

    def write_at_once(self, batch: Any) -> Any:
        self._maybe("write")
        return super().write_at_once(batch)

    def mail(self, incarnation: str) -> Any:
        self._maybe("mail")
        return super().mail(incarnation)

    def history(self, run: int, after: int = 0) -> Any:
        self._maybe("history")
        return super().history(run, after)

    def reap(self, *, limit: int = 1000) -> Any:
        self._maybe("reap")
        return super().reap(limit=limit)

    def heartbeat(self, incarnation: str) -> Any:
        self._maybe("heartbeat")
        return super().heartbeat(incarnation)

    def _maybe(self, call: str) -> None:
        if call in self.failing:
            raise self.error


async def test_a_signal_that_was_kept_is_kept_also_when_reading_fails(tmp_path: Path) -> None:
    store = Troubled(tmp_path / "runs.db")
    async with Engine(store, workflows=[waiting]) as it:
        handle = await it.start(waiting)
        await status_of(handle, "waiting")
        store.failing = frozenset({"mail"})
        await handle.signal("go", 1)
        store.failing = frozenset()
        assert await handle.result(timeout=60) == 1
    store.close()


@pytest.mark.parametrize("error", [StoreUnavailable("as the test wants it"), RuntimeError("a bug of the store")])
async def test_trouble_with_the_store_is_told_to_callers_and_outlived_by_runs(tmp_path: Path, error: Exception) -> None:
    calls: list[int] = []

    def work() -> int:
        calls.append(1)
        return 5

    @workflow
    async def works(ctx: Context) -> int:
        await ctx.step.wait_signal("go")
        return await ctx.step.run("work", work)

    store = Troubled(tmp_path / "runs.db")
    store.error = error
    async with Engine(store, workflows=[works], lease=1) as it:
        handle = await it.start(works)
        await status_of(handle, "waiting")
        store.failing = frozenset({"write"})
        with pytest.raises(StoreError, match=str(error)):
            await it.start(works)
        store.failing = frozenset()
        await handle.signal("go")
        await until(lambda: calls, "the step")
        store.failing = frozenset({"write", "mail", "history", "reap", "heartbeat"})
        again = asyncio.ensure_future(it.start(works))
        with pytest.raises(StoreError):
            await again
        await asyncio.sleep(1.5)
        store.failing = frozenset()
        assert await handle.result(timeout=60) == 5
        assert len(calls) <= 2
        later = await it.start(works)
        await later.signal("go")
        assert await later.result(timeout=60) == 5
    store.close()


class Slow(SQLiteStore):
    """A store that holds turns up for as long as the test wants."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.free = threading.Event()
        self.free.set()
        self.held = threading.Event()

    def write_at_once(self, batch: Any) -> Any:
        raise StoreLocked("What is held up is a thread's.", store=self.url)

    def write(self, batch: Any) -> Any:
        if batch.turns and not self.free.is_set():
            self.held.set()
            self.free.wait(20)
        return super().write(batch)


async def test_a_step_that_a_leaving_worker_was_about_to_begin_is_begun_by_another(tmp_path: Path) -> None:
    @workflow
    async def works(ctx: Context) -> int:
        await ctx.step.wait_signal("go")
        return await ctx.step.run("work", lambda: 5)

    store = Slow(tmp_path / "runs.db")
    async with Engine(store, workflows=[works]) as first:
        handle: RunHandle[Any] = await first.start(works)
        await status_of(handle, "waiting")
        store.free.clear()
        await handle.signal("go")
        await until(store.held.is_set, "the turn that holds the signal")
        shift = first._core.shift
        assert shift is not None
        shift.drain()
        store.free.set()
        async with engine(tmp_path, works) as second:
            assert await second.handle(handle.id).result(timeout=60) == 5
    store.close()


async def test_a_run_that_may_only_be_executed_alone_is_made_way_for_under_steady_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.worker.claiming.PATIENCE", 0.3)
    path = tmp_path / "runs.db"

    @workflow
    async def brief(ctx: Context) -> None:
        await ctx.step.run("nap", asyncio.sleep, 0.05)

    async with Engine(f"sqlite:///{path}", workflows=[brief]) as it:
        suspect = await it.options(delay=0.2).start(brief)
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("UPDATE perdure_runs SET strikes = 2")
        db.close()
        done = asyncio.ensure_future(suspect.result(timeout=60))
        while not done.done():
            await it.start(brief)
            await asyncio.sleep(0.02)
        await done


async def test_a_function_that_was_abandoned_takes_no_thread_from_others_and_one_that_waits_never_begins(
    tmp_path: Path,
) -> None:
    began: list[str] = []
    end = threading.Event()

    def hangs(name: str) -> None:
        began.append(name)
        end.wait(PATIENCE)

    def quick() -> str:
        return "quick"

    @workflow
    async def impatient(ctx: Context) -> str:
        ctx.step.options(timeout=0.4, retry=ONCE).start("first", hangs, "first")
        second = ctx.step.options(timeout=0.1, retry=ONCE).start("second", hangs, "second")
        await ctx.step.sleep("a while", 0.2)
        assert not second.done(), "its time counts from its beginning"
        await second.cancel()
        return await ctx.step.run("quick", quick)

    try:
        async with engine(tmp_path, impatient, threads=1) as running:
            # The second is given up while it waits for the thread, the first while it has it.
            handle = await running.start(impatient)
            assert await handle.result(timeout=PATIENCE / 2) == "quick"
    finally:
        end.set()
    assert began == ["first"]


async def test_who_waits_for_a_result_is_told_that_the_engine_was_closed(tmp_path: Path) -> None:
    async with engine(tmp_path, waiting) as it:
        asked = asyncio.ensure_future((await it.start(waiting)).result())
        await asyncio.sleep(0)
        await it.counts()
    with pytest.raises(RuntimeError, match="was closed while a result was awaited"):
        await asked


async def test_a_workflow_is_no_function_of_a_step(tmp_path: Path) -> None:
    @workflow
    async def confused(ctx: Context) -> None:
        await ctx.step.run("child", waiting)  # type: ignore[call-overload]  # the mistake under test

    async with engine(tmp_path, confused) as it:
        with pytest.raises(RunFailed, match="run_workflow"):
            await (await it.start(confused)).result(timeout=60)


async def test_why_warns_of_a_step_that_is_called_with_other_arguments_than_recorded(tmp_path: Path) -> None:
    given = [1]

    @workflow
    async def pays(ctx: Context) -> int:
        paid = await ctx.step.run("pay", lambda cents: cents, given[0])
        await ctx.step.wait_signal("go")
        await ctx.step.wait_signal("on")
        return int(paid)

    async with engine(tmp_path, pays) as it:
        handle: RunHandle[int] = await it.start(pays)
        await status_of(handle, "waiting")
        assert "other arguments" not in await handle.why()
    given[0] = 2
    async with engine(tmp_path, pays) as it:
        handle = it.handle(handle.id, returns=int)
        await handle.signal("go")
        await until(lambda: ask(tmp_path, "SELECT 1 FROM perdure_runs WHERE waits LIKE '%changed%'"), "the warning")
        why = await handle.why()
        assert 'for signal "on"' in why
        assert 'Step "pay" (' in why
        assert "is called with other arguments than recorded; the recorded outcome was used." in why
        await handle.signal("on")
        assert await handle.result(timeout=60) == 1
