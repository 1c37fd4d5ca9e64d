"""A worker whose own code fails at a run, or for which the system has no thread or memory: no run is lost by it."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import threading
import weakref
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from perdure import Client, Context, Retry, RunFailed, SQLiteStore, StepTimedOut, activity, workflow
from perdure.runtime.context import SyncContext
from perdure.runtime.drive_sync import BodyThreads
from perdure.worker import residents
from perdure.worker.activities import ActivityRun
from perdure.worker.residents import Resident
from perdure.worker.shift import Shift
from tests.integration.helpers import engine, status_of, until, url_of


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


failures: list[str] = []


@pytest.fixture(autouse=True)
def nothing_failed_yet() -> None:
    failures.clear()


def fails_at(what: Callable[..., Any], times: list[int]) -> Callable[..., Any]:
    """The method, failing for want of memory at those of its calls."""
    calls = iter(range(1, 1000))

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) in times:
            failures.append(what.__name__)
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
    assert failures == [name]


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


async def test_what_cannot_even_be_put_aside_is_handed_back_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Resident, "answered", fails_at(Resident.answered, [2]))
    monkeypatch.setattr(Resident, "leave", fails_at(Resident.leave, [1]))
    async with engine(tmp_path, adds, lease=1) as e:
        handles = [await e.start(adds, n) for n in range(4)]
        results = [await handle.result(timeout=30) for handle in handles]
        shift = e._core.shift
        assert shift is not None
        assert not shift.lease_sure
    assert results == [2, 3, 4, 5]
    assert failures == ["answered", "leave"]


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
    assert failures == [name]


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


@dataclass(frozen=True)
class Frozen(Exception):
    """As people write their errors."""

    code: int


class Odd(Exception):
    exceptions = None


class Odder(Exception):
    def exceptions(self) -> None: ...


def raises(error: BaseException) -> Any:
    raise error


async def raises_later(error: BaseException) -> Any:
    await asyncio.sleep(0.001)
    raise error


@workflow
async def meets(ctx: Context, name: str, how: str) -> str:
    error: Any = {"frozen": Frozen(5), "odd": Odd("x"), "odder": Odder("x")}[name]
    step = ctx.step.options(retry=Retry(max_attempts=1))
    if how == "body":
        raise error
    if how == "activity":
        await step.options(queue="far").run("a", raises_far, name)
    await step.run("a", raises if how == "thread" else raises_later, error)
    return ""


@activity
def raises_far(name: str) -> None:
    raise {"frozen": Frozen(5), "odd": Odd("x"), "odder": Odder("x")}[name]


@pytest.mark.parametrize("how", ["body", "thread", "loop", "activity"])
@pytest.mark.parametrize("name", ["frozen", "odd", "odder"])
async def test_errors_of_every_kind_are_recorded_and_let_go(name: str, how: str, tmp_path: Path) -> None:
    async with engine(tmp_path, meets, activities=[raises_far], lease=1) as e:
        handle = await e.start(meets, name, how)
        with pytest.raises(RunFailed, match=name.capitalize()):
            await handle.result(timeout=30)


@workflow
async def gives_up(ctx: Context) -> str:
    async def deaf() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise Frozen(5) from None

    try:
        await ctx.step.options(timeout=0.05, retry=Retry(max_attempts=1)).run("a", deaf)
    except StepTimedOut:
        return "given up"
    return ""


async def test_what_a_step_that_was_given_up_raises_at_last_costs_nobody_anything(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with engine(tmp_path, gives_up, adds, lease=1) as e:
        handles = [await e.start(flow, *args) for flow, args in ((gives_up, ()), (adds, (1,))) for _ in range(5)]
        assert [await handle.result(timeout=30) for handle in handles] == ["given up"] * 5 + [3] * 5
    assert "Traceback" not in caplog.text


# --- what is no `Exception`


class Strange(BaseException):
    pass


async def strange_at_once() -> None:
    raise Strange("at once")


async def strange_later() -> None:
    await asyncio.sleep(0)
    raise Strange("later")


@workflow
async def meets_strange_errors(ctx: Context) -> list[str]:
    once = ctx.step.options(retry=Retry(max_attempts=1))
    found = await asyncio.gather(
        once.run("first", strange_at_once),
        once.run("second", strange_later),
        ctx.step.run("third", asyncio.sleep, 0, "fine"),
        return_exceptions=True,
    )
    return [str(getattr(one, "type", one)).rpartition(".")[2] for one in found]


async def test_an_async_step_that_raises_what_is_no_exception_has_failed_and_harms_no_other(tmp_path: Path) -> None:
    async with engine(tmp_path, meets_strange_errors) as here:
        run = await here.start(meets_strange_errors)
        assert await run.result(timeout=60) == ["Strange", "Strange", "fine"]


async def test_who_waits_for_a_run_elsewhere_is_told_though_a_look_for_it_failed(tmp_path: Path) -> None:
    class Fails(SQLiteStore):
        looks = 0

        def ended(self, keys: Any) -> Any:
            self.looks += 1
            if self.looks == 1:
                raise ValueError("a bug")
            return super().ended(keys)

    async with engine(tmp_path, signalled):
        pass
    store = Fails(tmp_path / "runs.db")
    async with Client(store) as client:
        handle = await client.start(signalled)
        result = asyncio.ensure_future(handle.result())
        await until(lambda: store.looks)
        await handle.signal("go", 7)
        async with engine(tmp_path, signalled):
            assert await asyncio.wait_for(result, 60) == 7
    store.close()


# --- what is stored of a run is not what we wrote


@pytest.mark.parametrize("strikes", [0, 2])
@pytest.mark.parametrize(
    ("change", "saying"),
    [
        ("UPDATE perdure_history SET event = substr(event, 1, 10) WHERE run = ?", "no version of Perdure has written"),
        ('UPDATE perdure_history SET event = \'{"kind":"later"}\' WHERE run = ?', "A newer version wrote it"),
        ('UPDATE perdure_runs SET policy = \'{"awaited":"later"}\' WHERE key = ?', "its worker failed at it"),
        (
            "INSERT INTO perdure_mail (run, id, kind, name, data, at, unread) VALUES (?, 'm', 'later', '', '{}', 0, 1)",
            'a message of the kind "later", which this version of Perdure does not know',
        ),
        ("UPDATE perdure_runs SET waits = 'damaged', policy = '{' WHERE key = ?", "its worker failed at it"),
    ],
)
async def test_a_run_that_cannot_be_read_costs_no_other(
    tmp_path: Path, change: str, saying: str, strikes: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with engine(tmp_path, adds):
        pass
    async with Client(url_of(tmp_path)) as client:
        bad, good = await client.options(id="bad").start(adds, 1), await client.options(id="good").start(adds, 1)
        with closing(sqlite3.connect(tmp_path / "runs.db")) as db:
            db.execute(change, (1,))
            db.execute("UPDATE perdure_runs SET strikes = ? WHERE key = 1", (strikes,))
            db.commit()
        async with engine(tmp_path, adds) as it:
            assert await good.result(timeout=60) == 3
            await status_of(bad, "blocked")
            assert saying in await bad.why()
            # Also for one that begins here, and alone: nothing is thought to be under suspicion any more.
            assert await (await it.start(adds, 1)).result(timeout=60) == 3
            await bad.terminate("cannot be read")
            assert await bad.status() == "terminated"
