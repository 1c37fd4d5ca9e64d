"""Bad input and faults of the store: a clear error at the call, nothing half-written, nothing retried for ever."""

# ruff: noqa: PT017  # what is asserted in an `except` block here is inside a workflow

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import re
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from perdure import (
    Client,
    Context,
    DuplicateStepId,
    Engine,
    LimitExceeded,
    Limits,
    NotAStore,
    PayloadError,
    Retry,
    RetryAfter,
    RunFailed,
    RunHandle,
    RunNotFound,
    SQLiteStore,
    StepFailed,
    StoreFull,
    StoreLocked,
    StoreReadOnly,
    StoreTooNew,
    UnknownWorkflow,
    Worker,
    activity,
    workflow,
)
from perdure.runtime.context import SyncContext
from tests.integration.helpers import ONCE, ask, contents, engine, until, url_of


@dataclass
class Order:
    id: str
    total: int


@workflow
async def takes(ctx: Context, order: Order, *, note: str = "") -> str:
    return str(await ctx.step.run("text", lambda: f"{order.id} {order.total} {note}"))


@workflow
async def echo(ctx: Context, value: Any) -> Any:
    return await ctx.step.run("echo", lambda: value)


@workflow
async def waiting(ctx: Context) -> Any:
    return await ctx.step.wait_signal("go")


@contextmanager
def changes_nothing(folder: Path) -> Iterator[None]:
    before = contents(folder)
    yield
    assert contents(folder) == before


# --- what a caller gives -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "text"),
    [
        ((), {}, TypeError, "order"),
        ((Order("a", 1), 2), {}, TypeError, "takes"),
        ((Order("a", 1),), {"remark": "x"}, TypeError, "remark"),
        ((Order("a", 1),), {"order": Order("b", 2)}, TypeError, "order"),
        ((5,), {}, PayloadError, "order"),
        ((Order("a", "many"),), {}, PayloadError, "int"),  # type: ignore[arg-type]
        ((Order("\udc80", 1),), {}, PayloadError, "surrogate"),
    ],
)
async def test_arguments_that_do_not_fit_are_refused_at_the_call(
    tmp_path: Path, args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception], text: str
) -> None:
    async with engine(tmp_path, takes) as it:
        with changes_nothing(tmp_path), pytest.raises(error, match=text):
            await it.start(takes, *args, **kwargs)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (object(), PayloadError),
        (float("nan"), PayloadError),
        (float("-inf"), PayloadError),
        ("\ud800", PayloadError),
        ({"a": ["\udfff"]}, PayloadError),
        (lambda: 1, PayloadError),
        ("x" * 10_000_000, LimitExceeded),
        (2**70 * 1.0e300, PayloadError),
    ],
)
async def test_values_that_cannot_be_stored_are_refused_at_the_call(
    tmp_path: Path, value: Any, error: type[Exception]
) -> None:
    async with engine(tmp_path, echo, waiting) as it:
        handle: RunHandle[Any] = await it.start(waiting)
        await until(lambda: ask(tmp_path, "SELECT 1 FROM perdure_runs WHERE status = 'waiting'"), "the wait")
        with changes_nothing(tmp_path):
            with pytest.raises(error):
                await it.start(echo, value)
            with pytest.raises(error):
                await it.start("echo", value)
            with pytest.raises(error):
                await handle.signal("go", value)


async def test_a_nesting_that_is_too_deep_is_refused(tmp_path: Path) -> None:
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    endless: list[Any] = []
    endless.append(endless)
    async with engine(tmp_path, echo) as it:
        with changes_nothing(tmp_path), pytest.raises(LimitExceeded):
            await it.start(echo, deep)
        with changes_nothing(tmp_path), pytest.raises(PayloadError, match="contains itself"):
            await it.start(echo, endless)


async def test_nul_and_every_other_character_come_back_in_values(tmp_path: Path) -> None:
    text = "".join(map(chr, [*range(300), 0x2028, 0xFFFF, 0x1F600])) + '"\\' + "x" * 1_500_000
    async with engine(tmp_path, echo) as it:
        assert await (await it.start(echo, {"k\x00": text})).result(timeout=60) == {"k\x00": text}


@pytest.mark.parametrize("id", ["", "a\x00b", "a\nb", "\ud800", "x" * 256, " ", 5])
async def test_ids_that_cannot_be_ids_are_refused(tmp_path: Path, id: Any) -> None:
    async with engine(tmp_path, echo) as it:
        if id == " ":
            assert (await it.options(id=id).start(echo, 1)).id == " "
            return
        with changes_nothing(tmp_path):
            for made in (
                lambda: it.options(id=id),
                lambda: it.options(idempotency_key=id),
                lambda: it.options(queue=id),
                lambda: it.handle(id),
                lambda: Client(url_of(tmp_path), namespace=id),
                lambda: workflow(name=id)(echo.fn),
            ):
                with pytest.raises((ValueError, TypeError, LimitExceeded)):
                    made()
            with pytest.raises((ValueError, TypeError, LimitExceeded)):
                await it.handle("somebody").signal(id)
            with pytest.raises((ValueError, TypeError, LimitExceeded)):
                await it.handle("somebody").signal("go", message_id=id)


async def test_reasons_are_checked_like_any_value(tmp_path: Path) -> None:
    async with engine(tmp_path, waiting) as it:
        handle: RunHandle[Any] = await it.start(waiting)
        for verb in (handle.cancel, handle.terminate):
            with pytest.raises(PayloadError):
                await verb("\ud800")
            with pytest.raises(LimitExceeded):
                await verb("x" * 10_000_000)
            for reason in (None, 5, ["x"], b"x", {"a": 1}):
                with pytest.raises(TypeError, match="The reason must be a str"):
                    await verb(reason)  # type: ignore[arg-type]
        assert not (await handle.status()).ended


async def test_naive_datetimes_are_refused_with_the_line_that_mends_it(tmp_path: Path) -> None:
    naive = datetime(2030, 1, 1)  # noqa: DTZ001

    @workflow
    async def sleeps(ctx: Context) -> None:
        await ctx.step.sleep_until("until", naive)

    async with engine(tmp_path, echo, sleeps) as it:
        with pytest.raises(ValueError, match=r"tzinfo=timezone\.utc"):
            it.options(at=naive)
        with pytest.raises(ValueError, match=r"tzinfo=timezone\.utc"):
            await it.list_runs(created_after=naive)
        with pytest.raises(RunFailed, match=r"tzinfo=timezone\.utc"):
            await (await it.start(sleeps)).result(timeout=60)
        # Inside a payload it is the user's own.
        assert await (await it.start(echo, naive)).result(timeout=60) == naive


async def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    async with engine(tmp_path, echo) as it:
        for wrong in (
            {"timeout": 0},
            {"timeout": -1},
            {"timeout": float("nan")},
            {"delay": -1},
            {"if_exists": "maybe"},
            {"if_exists": "restart"},
            {"at": datetime.now().astimezone(), "delay": 1},
            {"idempotency_ttl": 0},
        ):
            with pytest.raises(ValueError):
                it.options(**wrong)
        for wrong in ({"timeout": "1 s"}, {"at": "tomorrow"}, {"queue": 5}):
            with pytest.raises(TypeError):
                it.options(**wrong)
        with pytest.raises(ValueError):
            await it.list_runs(limit=0)
        with pytest.raises(ValueError):
            await it.list_runs(status="almost")
        with pytest.raises(ValueError):
            await it.list_runs(cursor="next")
        with pytest.raises(TypeError):
            await it.start(len, [])  # type: ignore[call-overload]  # the mistake under test
    for settings in ({"concurrency": 0}, {"threads": 0}, {"resident": -1}, {"lease": 0}, {"queues": [""]}):
        with pytest.raises(ValueError):
            Engine(url_of(tmp_path), **settings)
    with pytest.raises(TypeError):
        Engine(url_of(tmp_path), queues="default")
    with pytest.raises(TypeError):
        Engine(url_of(tmp_path), workflows=[echo.fn])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"test_bad_input\.py"):
        Engine(url_of(tmp_path), workflows=[echo, workflow(name="echo")(takes.fn)])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"workflows": takes}, "Pass a list: workflows=[takes]."),
        ({"workflows": None}, "Pass a list: workflows=[]."),
        ({"activities": asyncio}, "Pass a list: activities=[asyncio]."),
        ({"queues": "fast"}, "Pass a list: queues=['fast']."),
        ({"queues": 5}, "Pass a list: queues=[5]."),
        ({"queues": [5]}, "queues= must be a str."),
        ({"store": 5}, "5 is no store."),
        ({"store": takes}, "is no store."),
        ({"store": ["sqlite:///a.db"]}, "A list is no store."),
        ({"store": SQLiteStore}, "is no store."),
        ({"limits": {}}, "Write limits=Limits(payload=5_000_000)"),
        ({"concurrency": "5"}, "concurrency='5' is not a whole number of at least 1."),
        ({"threads": True}, "threads=True is not a whole number of at least 1."),
        ({"resident": -1}, "resident=-1 is not a whole number of at least 0."),
        ({"name": 5}, "name= must be a str."),
    ],
)
def test_what_an_engine_cannot_be_made_of_is_refused_in_three_sentences(given: dict[str, Any], said: str) -> None:
    for made in (Engine, Worker, Client):
        if made is Client and not given.keys() <= {"store", "limits"}:
            continue
        with pytest.raises((TypeError, ValueError, NotAStore), match=re.escape(said)) as refused:
            made(**{"store": "memory://", **given})
        assert len(re.findall(r"\.(?: |$)", str(refused.value))) == 3, str(refused.value)


async def test_unknown_names_are_refused(tmp_path: Path) -> None:
    @workflow
    async def other(ctx: Context) -> None: ...

    async with engine(tmp_path, echo) as it:
        with changes_nothing(tmp_path):
            for unknown in ("ecoh", other):
                with pytest.raises(UnknownWorkflow, match="echo"):
                    await it.start(unknown)
            for verb in ("status", "info", "history", "why", "result", "cancel", "terminate"):
                with pytest.raises(RunNotFound):
                    await getattr(it.handle("nobody"), verb)()
            with pytest.raises(RunNotFound):
                await it.handle("nobody").signal("go")


def test_what_is_no_function_is_no_workflow() -> None:
    class OfMethods:
        async def run(self, ctx: Context) -> None: ...

    for wrong in (OfMethods, OfMethods(), functools.partial(takes.fn), 5):
        with pytest.raises(TypeError, match="A workflow is a function"):
            workflow(wrong)  # type: ignore[arg-type]  # the mistake under test


async def test_an_argument_called_like_the_context_is_refused(tmp_path: Path) -> None:
    @workflow  # type: ignore[arg-type]  # a type checker sees it
    async def anything(ctx: Context, **named: int) -> dict[str, int]:
        return named

    async with engine(tmp_path, anything) as it:
        with changes_nothing(tmp_path), pytest.raises(TypeError, match='"ctx" is its context'):
            await it.start(anything, ctx=1)
        async with Client(url_of(tmp_path)) as knows_no_code:
            run = await knows_no_code.start("anything", ctx=1)
            with pytest.raises(RunFailed, match='"ctx" is its context'):
                await run.result(timeout=60)
        assert await (await it.start(anything, self=1)).result(timeout=60) == {"self": 1}


# --- what a workflow does ------------------------------------------------------------------------------


async def test_the_longest_timedelta_is_a_delay_a_timeout_and_a_pause(tmp_path: Path) -> None:
    @activity(retry=Retry(max_attempts=2))
    def later() -> None:
        raise RetryAfter(timedelta.max)

    @workflow
    async def tries(ctx: Context) -> None:
        await ctx.step.run("later", later)

    async with engine(tmp_path, echo, tries) as it:
        scheduled = await it.options(delay=timedelta.max).start(echo, 1)
        assert "9999-12-31" in await scheduled.why()
        for_ever = it.options(timeout=timedelta.max, idempotency_key="k", idempotency_ttl=timedelta.max)
        assert await (await for_ever.start(echo, 1)).result(timeout=60) == 1
        pausing = await it.start(tries)
        await until(lambda: ask(tmp_path, "SELECT 1 FROM perdure_runs WHERE status = 'waiting'"), "the pause")
        assert "attempt 2 of 2" in await pausing.why()
        assert len((await it.list_runs()).items) == 3


async def test_a_wait_beyond_the_year_9999_can_be_told(tmp_path: Path) -> None:
    last = datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone(timedelta(hours=-12)))

    @workflow
    async def too_far(ctx: Context) -> None:
        await ctx.step.sleep_until("nap", last)

    @workflow
    async def much_too_far(ctx: Context) -> None:
        await asyncio.sleep(1e18)

    async with engine(tmp_path, too_far, much_too_far) as it:
        for each in (too_far, much_too_far):
            handle = await it.start(each)
            await until(lambda: ask(tmp_path, "SELECT 1 FROM perdure_runs WHERE status = 'waiting'"), "the wait")
            assert "9999-12-31 23:59:59" in await handle.why()
            await handle.history()
            await it.list_runs()
            await handle.terminate()


async def test_a_step_id_used_twice_fails_the_run_and_names_both_lines(tmp_path: Path) -> None:
    calls = []

    @workflow
    async def twice(ctx: Context) -> None:
        await ctx.step.run("same", lambda: calls.append(1))
        await ctx.step.run("same", lambda: calls.append(2))

    @workflow
    def twice_sync(ctx: SyncContext) -> None:
        ctx.step.run("same", lambda: calls.append(1))
        ctx.step.sleep("same", 1)

    async with engine(tmp_path, twice, twice_sync) as it:
        for each in (twice, twice_sync):
            with pytest.raises(RunFailed) as raised:
                await (await it.start(each)).result(timeout=60)
            assert raised.value.cause.type.endswith(DuplicateStepId.__name__)
            assert str(raised.value).count("test_bad_input.py") >= 2 or "same" in str(raised.value)
    assert calls == [1, 1]


@activity(queue="far")
async def far_away(value: Any) -> Any:
    return object() if value is None else value


@pytest.mark.parametrize("made", [object(), float("nan"), "\ud800", "x" * 10_000_000])
async def test_a_result_that_cannot_be_stored_is_the_steps_failure_without_a_retry(tmp_path: Path, made: Any) -> None:
    calls = []

    def make() -> Any:
        calls.append(1)
        return made

    @workflow
    async def unstorable(ctx: Context) -> str:
        try:
            await ctx.step.run("make", make)
        except StepFailed as error:
            assert isinstance(error, (PayloadError, LimitExceeded))
            return error.type
        return "stored"

    async with engine(tmp_path, unstorable) as it:
        assert await (await it.start(unstorable)).result(timeout=60) in (
            "perdure.PayloadError",
            "perdure.LimitExceeded",
        )
    assert calls == [1]


async def test_what_cannot_be_stored_fails_the_run_wherever_it_comes_from(tmp_path: Path) -> None:
    @workflow
    async def result(ctx: Context) -> Any:
        return object()

    @workflow
    async def large_result(ctx: Context) -> Any:
        return "x" * 10_000_000

    @workflow
    async def to_child(ctx: Context) -> Any:
        return await ctx.step.run_workflow("child", echo, object())

    @workflow
    async def to_activity(ctx: Context) -> Any:
        return await ctx.step.run("far", far_away, object())

    @workflow
    async def from_activity(ctx: Context) -> Any:
        return await ctx.step.run("far", far_away, None)

    @workflow
    async def bad_error(ctx: Context) -> Any:
        raise ValueError("\ud800" + "x" * 1_000_000)

    all_ = (result, large_result, to_child, to_activity, from_activity, bad_error)
    async with engine(tmp_path, *all_, echo, activities=[far_away]) as it:
        for each in all_:
            with pytest.raises(RunFailed):
                await (await it.start(each)).result(timeout=60)
    assert ask(tmp_path, "SELECT count(*) FROM perdure_runs WHERE ended_at IS NULL") == [(0,)]
    assert ask(tmp_path, "SELECT max(length(error)) < 100000 FROM perdure_runs") == [(1,)]


async def test_limits_are_those_that_were_set(tmp_path: Path) -> None:
    async with engine(tmp_path, echo, waiting, limits=Limits(payload=100, mailbox=3)) as it:
        with changes_nothing(tmp_path), pytest.raises(LimitExceeded, match="100"):
            await it.start(echo, "x" * 200)
        handle = await it.options(delay=3600).start(waiting)
        for _ in range(3):
            await handle.signal("go")
        with changes_nothing(tmp_path), pytest.raises(LimitExceeded, match="mailbox"):
            await handle.signal("go")


async def test_a_history_that_grows_too_long_fails_the_run(tmp_path: Path) -> None:
    @workflow
    async def long(ctx: Context) -> None:
        for n in range(1000):
            await ctx.step.run(f"s{n}", lambda: None)

    async with engine(tmp_path, long, limits=Limits(history_warn=20, history_stop=40)) as it:
        handle: RunHandle[Any] = await it.start(long)
        with pytest.raises(RunFailed, match="40 events"):
            await handle.result(timeout=60)
        assert len(await handle.history()) < 50


async def test_a_signal_that_does_not_fit_is_skipped_and_a_start_by_name_that_does_not_fails(tmp_path: Path) -> None:
    @workflow
    async def typed(ctx: Context, n: int) -> int:
        return n + int(await ctx.step.wait_signal("go", returns=int))

    async with engine(tmp_path, typed) as it, Client(url_of(tmp_path)) as elsewhere:
        handle: RunHandle[Any] = await it.start(typed, 1)
        await handle.signal("go", "no number")
        await handle.signal("go", 41)
        assert await handle.result(timeout=60) == 42
        wrong = await elsewhere.start("typed", "no number")
        with pytest.raises(RunFailed):
            await wrong.result(timeout=60)
        with changes_nothing(tmp_path), pytest.raises(TypeError):
            await elsewhere.start("typed")
        with changes_nothing(tmp_path), pytest.raises(TypeError):
            await elsewhere.start("typed", 1, colour="red")


# --- what happens to the store -------------------------------------------------------------------------


async def test_a_store_that_is_locked_is_waited_for_then_refused_and_works_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = url_of(tmp_path) + "?busy_timeout=0.3"
    async with Engine(url, workflows=[echo, waiting]) as it:
        parked = await it.start(waiting)
        await until(lambda: ask(tmp_path, "SELECT 1 FROM perdure_runs WHERE status = 'waiting'"), "the wait")
        with closing(sqlite3.connect(tmp_path / "runs.db", isolation_level=None)) as foreign:
            foreign.execute("BEGIN IMMEDIATE")
            calls: list[Callable[[], Awaitable[Any]]] = [
                lambda: it.start(echo, 1),
                lambda: parked.signal("go"),
                lambda: parked.cancel(),
                lambda: parked.terminate(),
            ]
            for call in calls:
                with pytest.raises(StoreLocked) as raised:
                    await call()
                assert raised.value.retryable
                assert isinstance(raised.value.__cause__, (sqlite3.OperationalError, type(None)))
            # Reading needs no lock.
            assert await parked.status() == "waiting"
            with caplog.at_level(logging.WARNING):
                await asyncio.sleep(1.0)
            tries = len([record for record in caplog.records if record.name.startswith("perdure")])
            assert tries < 10, "it says so once, not at every try"
            foreign.execute("ROLLBACK")
        assert ask(tmp_path, "SELECT count(*) FROM perdure_runs") == [(1,)]
        assert ask(tmp_path, "SELECT count(*) FROM perdure_mail") == [(0,)]
        await parked.signal("go", 5)
        assert await parked.result(timeout=60) == 5
        assert await (await it.start(echo, 2)).result(timeout=60) == 2


def worker_of_large_values() -> tuple[Any, list[int]]:
    """A workflow whose step is worth many pages, once it gets its signal; and a mark for each execution of the step."""
    calls: list[int] = []

    def work() -> str:
        calls.append(1)
        return "y" * 50_000

    @workflow
    async def works(ctx: Context) -> int:
        await ctx.step.wait_signal("go")
        return len(await ctx.step.run("work", work))

    return works, calls


def fill(store: SQLiteStore) -> None:
    """From now on the file gets no page more."""
    db = store._opened_writer()
    db.execute(f"PRAGMA max_page_count = {db.execute('PRAGMA page_count').fetchone()[0]}")


def make_room(store: SQLiteStore) -> None:
    store._opened_writer().execute("PRAGMA max_page_count = 1000000")


async def test_a_store_that_is_full_refuses_starts_keeps_outcomes_and_goes_on(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "runs.db")
    works, calls = worker_of_large_values()
    async with Engine(store, workflows=[works, echo]) as it:
        handle = await it.start(works)
        await until(lambda: ask(tmp_path, "SELECT 1 FROM perdure_runs WHERE status = 'waiting'"), "the wait")
        fill(store)
        with pytest.raises(StoreFull) as raised:
            await it.start(echo, "z" * 100_000)
        assert not raised.value.retryable
        await handle.signal("go")
        await until(lambda: calls, "the step")
        await asyncio.sleep(0.3)
        assert ask(tmp_path, "SELECT count(*) FROM perdure_history WHERE event LIKE '%step_completed%'") == [(0,)]
        assert len(ask(tmp_path, "SELECT * FROM perdure_runs")) == 1
        why = await handle.why()
        assert "is held up here, for 0 s, because its store cannot be written" in why
        assert str(raised.value)[:60] in why
        with pytest.raises(TimeoutError, match="is held up here"):
            await handle.result(timeout=0.05)
        make_room(store)
        assert await handle.result(timeout=60) == 50_000
        assert await (await it.start(echo, 2)).result(timeout=60) == 2
    store.close()
    assert calls == [1]


async def test_a_store_that_cannot_be_written_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    async with engine(tmp_path, echo) as it:
        await it.start(echo, 1)
    other = SQLiteStore(tmp_path / "runs.db")
    other._opened_writer().execute("PRAGMA query_only = ON")
    client = Client(other)
    with changes_nothing(tmp_path), pytest.raises(StoreReadOnly):
        await client.start("echo", 1)
    await client.close()
    other.close()


async def test_stores_that_are_none_are_refused_by_name_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "text.db"
    text.write_bytes(b"This is no database at all. " * 100)
    before = text.read_bytes()
    folder = tmp_path / "folder.db"
    folder.mkdir()
    async with engine(tmp_path, echo) as it:
        await it.start(echo, 1)
    with closing(sqlite3.connect(tmp_path / "runs.db")) as db:
        db.execute("INSERT INTO perdure_migrations VALUES (99, '0099_future.sql', 'x', 0)")
        db.commit()
    for url, error in (
        (f"sqlite:///{text}", NotAStore),
        (f"sqlite:///{folder}", NotAStore),
        (f"sqlite:///{tmp_path}/no/where.db", NotAStore),
        ("sqlite://", NotAStore),
        ("", NotAStore),
        ("mysql://localhost/x", NotAStore),
        (url_of(tmp_path), StoreTooNew),
    ):
        for made in (Client(url), Engine(url, workflows=[echo])):
            with pytest.raises(error):
                await made.start(echo, 1)
            await made.close()
    assert text.read_bytes() == before
    assert not list(folder.iterdir())


async def test_what_fails_for_ever_is_not_tried_for_ever(tmp_path: Path) -> None:
    calls: list[float] = []

    def fails() -> None:
        calls.append(time.monotonic())
        raise ValueError("always")

    @workflow
    async def failing(ctx: Context) -> None:
        await ctx.step.options(retry=ONCE).run("fails", fails)

    async with engine(tmp_path, failing) as it:
        with pytest.raises(RunFailed):
            await (await it.options(timeout=timedelta(seconds=10)).start(failing)).result(timeout=60)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"retry": 5}, "retry= takes a Retry"),
        ({"raises": ("x",)}, "raises= takes exception types"),
        ({"raises": 5}, "5 is none"),
    ],
)
async def test_a_policy_of_a_wrong_type_is_refused_at_the_call(tmp_path: Path, given: Any, says: str) -> None:
    async def fails() -> None:
        raise ValueError("no")

    with pytest.raises(TypeError, match=says):
        activity(**given)(fails)

    @workflow
    async def calls(ctx: Context) -> str:
        try:
            await ctx.step.options(**given).run("fails", fails)
        except TypeError as error:
            return str(error)
        return "accepted"

    async with engine(tmp_path, calls) as here:
        assert says in await (await here.start(calls)).result(timeout=20)


def test_a_retry_of_a_workflow_is_one() -> None:
    async def flow(ctx: Context) -> None: ...

    given: Any = 5
    with pytest.raises(TypeError, match="retry= takes a Retry"):
        workflow(retry=given)(flow)


async def test_an_unknown_workflow_is_told_what_there_is_once(tmp_path: Path) -> None:
    @workflow
    async def known(ctx: Context) -> None: ...

    async with engine(tmp_path, known) as here:
        with pytest.raises(UnknownWorkflow) as told:
            await here.start("nope")
    assert told.value.known == ("known",)


async def test_closing_on_a_full_store_says_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("perdure.engine.GRACE", 0.2)
    store = SQLiteStore(tmp_path / "runs.db")
    works, calls = worker_of_large_values()
    async with Engine(store, workflows=[works]) as it:
        handle = await it.start(works)
        await until(lambda: ask(tmp_path, "SELECT 1 FROM perdure_runs WHERE status = 'waiting'"), "the wait")
        await handle.signal("go")
        fill(store)
        await until(lambda: calls, "the step")
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("closing: ")]
    assert len(said) == 1
    assert "could not be written within 0.2 s" in said[0]
    assert "done again by whoever takes them" in said[0]
    make_room(store)
    async with Engine(store, workflows=[works]) as it:
        assert await it.handle(handle.id).result(timeout=60) == 50_000
    store.close()
    assert calls == [1, 1]


def adds(a: int, b: int = 0, /, *, c: int = 0) -> int:
    return a + b + c


def scales(size: int, *, by: int, off: int = 0) -> int:
    return size * by + off


class Shop:
    def sells(self, what: str) -> str:
        return what


def session_given(fn: Any) -> Any:
    """A decorator that gives the function more than its callers do."""

    @functools.wraps(fn)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return fn("session", *args, **kwargs)

    return inner


@session_given
def buys(session: str, what: str) -> str:
    return f"{session} {what}"


buys.__signature__ = inspect.signature(scales)  # as a decorator may leave it


class Static:
    __call__ = staticmethod(adds)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda step: step.run("a", adds), r"got arguments that adds cannot take: 'a' is missing \(it takes a, b, c\)"),
        (lambda step: step.run("a", adds, 1, 2, 3), "3 by position are 1 too many"),
        (lambda step: step.run("a", adds, 1, d=2), "there is no 'd' to be given by name"),
        (lambda step: step.run("a", adds, a=1), "there is no 'a' to be given by name"),
        (lambda step: step.run("a", scales, 2, by=3, size=1), "'size' is given twice"),
        (lambda step: step.run("a", scales, 2), "'by' is missing"),
        (lambda step: step.run("a", Shop().sells), "'what' is missing"),
        (lambda step: step.run("a", lambda: 1, 5), "1 by position are 1 too many"),
        (lambda step: step.transaction("a", lambda: 1), "1 by position are 1 too many"),
        (lambda step: step.start("a", adds), "'a' is missing"),
        (lambda step: step.options(id="x").run("a", adds, 1), "id=, which is a setting of children"),
        (lambda step: step.options(parent_close="abandon").run("a", adds, 1), "a setting of children"),
        (lambda step: step.options(queue="far").run("a", adds, 1), "adds is no activity"),
        (lambda step: step.options(retry=Retry()).run_workflow("a", "echo", 1), "retry=, which is a setting of steps"),
        (lambda step: step.options(timeout=5).sleep("a", 1), "no settings but its own arguments"),
        (lambda step: step.options(timeout=5).wait_signal("a"), "no settings but its own arguments"),
        (lambda step: step.wait(5), "It waits for several"),
        (lambda step: step.start("a", adds, 1), "was awaited itself. It has begun already"),
        (lambda step: step.run("a", lambda: [step]), "is no plain value"),
        (lambda step: step.run_workflow("a", None), "must be decorated with @workflow"),
        (lambda step: step.emit_workflow("a", adds), "must be decorated with @workflow"),
        (lambda step: step.run_workflow("a", ""), "The name of a workflow is empty"),
        (lambda step: step.run_workflow("a", "b\0"), "not printable"),
        (lambda step: step.run_workflow("a", "\ud800"), "not printable"),
        (lambda step: step.run_workflow("a", "b" * 10_000_000), "has 10000000 characters"),
        (lambda step: step.options(idempotency_key="k" * 9000).run_workflow("a", "echo", 1), "has 9000 characters"),
        (lambda step: step.options(idempotency_key="\ud800").run_workflow("a", "echo", 1), "not printable"),
        (lambda step: step.options(idempotency_key=5).run_workflow("a", "echo", 1), "must be a str"),
        (lambda step: step.options(returns=[]).run("a", adds, 1), "is no type of values"),
        (lambda step: step.wait_signal("a", returns=[]), "is no type of values"),
        (lambda step: step.sleep("a", hours="1"), 'hours= of sleep "a" must be a timedelta or a number'),
        (lambda step: step.sleep("a", days=float("nan")), 'days= of sleep "a" is nan'),
        (lambda step: step.sleep("a", days=10**10), "999999999 days"),
        (lambda step: step.sleep("a", timedelta.max, days=1), "999999999 days"),
    ],
)
async def test_a_call_of_a_step_that_makes_no_sense_fails_the_run_at_its_line(
    call: Callable[[Any], Any], says: str, tmp_path: Path
) -> None:
    @workflow
    async def calls(ctx: Context) -> Any:
        return await call(ctx.step)

    async with engine(tmp_path, calls, echo) as it:
        handle: RunHandle[Any] = await it.start(calls)
        with pytest.raises(RunFailed, match=says):
            await handle.result(timeout=60)
        # It was not tried again: the first time says it all.
        assert not [event for event in await handle.history() if event.kind == "attempt_failed"]


async def test_calls_that_make_sense_in_all_their_forms(tmp_path: Path) -> None:
    @workflow
    async def calls(ctx: Context) -> list[Any]:
        step = ctx.step
        return [
            await step.run("a", adds, 1),
            await step.run("b", adds, 1, 2, c=3),
            await step.run("c", Shop().sells, what="tea"),
            await step.run("d", buys, "tea"),
            await step.run("e", functools.partial(adds, 1), 2),
            await step.run("f", lambda *args, **kwargs: [list(args), kwargs], 1, x=2),
            await step.run("g", int, "7"),
            await step.run("h", len, [1, 2]),
            await step.run("i", dict, x=1),
            await step.run("j", buys, what="milk"),
            await step.run("k", scales, size=2, by=3),
            await step.run("l", scales, 2, by=3, off=1),
            await step.run("m", Static(), 4),
            await step.run("n", lambda a, b=2, *c, d=4, **e: [a, b, list(c), d, e], 1, d=5, f=6),
        ]

    async with engine(tmp_path, calls) as it:
        result = await (await it.start(calls)).result(timeout=60)
        assert result[:9] == [1, 6, "tea", "session tea", 3, [[1], {"x": 2}], 7, 2, {"x": 1}]
        assert result[9:] == ["session milk", 6, 7, 4, [1, 2, [], 5, {"f": 6}]]


async def test_a_forgotten_await_is_named(tmp_path: Path) -> None:
    @workflow
    async def forgets(ctx: Context) -> int:
        return ctx.step.run("a", adds, 1)  # type: ignore[return-value]

    @workflow
    async def forgets_inside(ctx: Context) -> Any:
        return {"sums": [ctx.step.start("a", adds, 1)]}

    async with engine(tmp_path, forgets, forgets_inside) as it:
        for flow in (forgets, forgets_inside):
            with pytest.raises(RunFailed, match=r"is still to be awaited\. Put `await` in front"):
                await (await it.start(flow)).result(timeout=60)


_LIMITS: list[Any] = ["a", None, 1.5, True, 0, 1001]
_CURSORS: list[Any] = [5, b"1", "", "x", "\ud800", "9" * 19]
_NAMES: list[Any] = [5, "", "\ud800", "a\0b", []]


@pytest.mark.parametrize(
    "asked",
    [
        *({"limit": given} for given in _LIMITS),
        *({"cursor": given} for given in _CURSORS),
        *({"parent": given} for given in _NAMES),
        *({"workflow": given} for given in (*_NAMES, echo)),
    ],
)
async def test_a_question_for_runs_that_makes_no_sense_is_refused(tmp_path: Path, asked: dict[str, Any]) -> None:
    SQLiteStore(tmp_path / "runs.db").close()
    async with Client(url_of(tmp_path)) as client:
        with pytest.raises((TypeError, ValueError)):
            await client.list_runs(**asked)
        if "workflow" in asked:
            for what in ("workflow", "queue"):
                with pytest.raises((TypeError, ValueError)):
                    await client.counts(**{what: asked["workflow"]})


async def test_one_start_that_cannot_be_stored_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a store with narrower limits than ours would.
    monkeypatch.setattr("perdure.client.check_id", lambda text, what: text)
    async with engine(tmp_path, echo, waiting) as it:
        starts = [it.options(id=id).start(echo, 1) for id in ("a", "\ud800", "b", "\ud801", "c")]
        done = await asyncio.gather(*starts, it.handle("nobody").signal("go"), return_exceptions=True)
        assert [type(each).__name__ for each in done] == [
            *("RunHandle", "StoreError", "RunHandle", "StoreError", "RunHandle"),
            "RunNotFound",
        ]
        for handle in (done[0], done[2], done[4]):
            assert isinstance(handle, RunHandle)
            assert await handle.result(timeout=60) == 1


async def test_a_status_that_is_none_is_refused_with_those_that_are(tmp_path: Path) -> None:
    async with engine(tmp_path, echo) as it:
        with pytest.raises(ValueError, match=r"status='x' is none\. A run has one of: scheduled, ready"):
            await it.list_runs(status="x")
