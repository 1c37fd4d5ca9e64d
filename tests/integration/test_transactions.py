"""Transaction steps: their effect and their record are one commit, whatever happens to either."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from perdure import (
    Client,
    Context,
    Engine,
    MemoryStore,
    NonRetryable,
    Retry,
    RunFailed,
    SQLiteStore,
    StepFailed,
    StepTimedOut,
    StoreError,
    activity,
    current_step,
    sync,
    workflow,
)
from perdure.core.errors import StoreUnavailable
from perdure.core.turn import Turn
from perdure.stores.sqlite import transaction
from tests.integration.helpers import AT_ONCE, ONCE, ask, engine, kinds, status_of, until, url_of
from tests.integration.sqlite_story import announced, first_turn, started

calls: list[Any] = []


slow_ones: list[float] = []
"""Functions that are still at it: a step that was given up does not end its function."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> Iterator[Path]:
    """A store with a table of the user's own."""
    calls.clear()
    SQLiteStore(tmp_path / "runs.db").close()
    with closing(sqlite3.connect(tmp_path / "runs.db")) as db:
        db.execute("CREATE TABLE effects (what TEXT NOT NULL)")
        db.commit()
    yield tmp_path
    # What it left behind must not be counted in the next test.
    deadline = time.monotonic() + 30
    while slow_ones and time.monotonic() < deadline:
        time.sleep(0.01)


def effects(folder: Path) -> list[str]:
    return [what for (what,) in ask(folder, "SELECT what FROM effects ORDER BY rowid")]


def affect(db: sqlite3.Connection, what: str, again: int = 1) -> str:
    calls.append(what)
    db.executemany("INSERT INTO effects VALUES (?)", [(what,)] * again)
    return what.upper()


# --- the three styles


@workflow
async def awaits(ctx: Context, what: str) -> str:
    first = await ctx.step.transaction("first", affect, what)
    return await ctx.step.transaction("second", affect, f"{first}!", again=2)


@workflow
def waits(ctx: sync.Context, what: str) -> str:
    first = ctx.step.transaction("first", affect, what)
    return ctx.step.transaction("second", affect, f"{first}!", again=2)


@workflow
def yields(ctx: Context, what: str) -> Any:
    first = yield ctx.step.transaction("first", affect, what)
    (second,) = yield [ctx.step.transaction("second", affect, f"{first}!", again=2)]
    return second


@pytest.mark.parametrize("style", [awaits, waits, yields])
@pytest.mark.parametrize("resident", [0, 100])
async def test_effect_and_record_in_all_three_styles(folder: Path, style: Any, resident: int) -> None:
    async with engine(folder, style, resident=resident) as here:
        run = await here.start(style, "a")
        assert await run.result(timeout=10) == "A!"
        history = await run.history()
    assert effects(folder) == ["a", "A!", "A!"]
    assert kinds(history) == ["started", "step_completed", "step_completed", "ended"]
    assert [event.data["op"] for event in history[1:3]] == ["transaction"] * 2


@workflow
async def beside(ctx: Context) -> list[str]:
    plain = [ctx.step.run(f"plain-{n}", lambda: "x") for n in range(3)]
    return list(await asyncio.gather(*(ctx.step.transaction(f"t-{n}", affect, f"{n}") for n in range(5)), *plain))


async def test_many_at_once_take_turns(folder: Path) -> None:
    async with engine(folder, beside) as here:
        runs = [await here.start(beside) for _ in range(8)]
        for run in runs:
            assert await run.result(timeout=20) == ["0", "1", "2", "3", "4", "x", "x", "x"]
    assert sorted(effects(folder)) == sorted("01234" * 8)


def whoami(db: sqlite3.Connection) -> tuple[str, str, bool]:
    info = current_step()
    return info.id, info.key, threading.current_thread() is threading.main_thread()


@workflow
async def asks(ctx: Context) -> Any:
    return [list(await ctx.step.transaction("who", whoami)), ctx.step.key("who")]


async def test_a_function_runs_in_a_thread_and_knows_its_step(folder: Path) -> None:
    async with engine(folder, asks) as here:
        who, key = await (await here.start(asks)).result(timeout=10)
    assert who == ["who", key, False]


# --- failures


@workflow
async def tries(ctx: Context, fails: int, retry: int) -> str:
    policy = Retry(max_attempts=retry, first_delay=0.001, jitter=False)
    try:
        return await ctx.step.options(retry=policy).transaction("pay", flaky, fails)
    except StepFailed as error:
        return f"{error.type} after {error.attempts}"


def flaky(db: sqlite3.Connection, fails: int) -> str:
    affect(db, "paid")
    if len(calls) <= fails:
        raise sqlite3.IntegrityError("no such customer")
    return "good"


async def test_a_failed_attempt_leaves_nothing_and_is_tried_again(folder: Path) -> None:
    async with engine(folder, tries) as here:
        run = await here.start(tries, 2, 3)
        assert await run.result(timeout=10) == "good"
        history = await run.history()
    assert (effects(folder), len(calls)) == (["paid"], 3)
    assert kinds(history) == ["started", "attempt_failed", "attempt_failed", "step_completed", "ended"]


async def test_a_step_that_fails_for_good_leaves_nothing(folder: Path) -> None:
    async with engine(folder, tries) as here:
        run = await here.start(tries, 9, 2)
        assert await run.result(timeout=10) == "sqlite3.IntegrityError after 2"
        assert [event.data.get("op") for event in (await run.history())[1:3]] == ["transaction"] * 2
    assert (effects(folder), len(calls)) == ([], 2)


def unstorable(db: sqlite3.Connection) -> Any:
    affect(db, "paid")
    return object()


def gives_a_coroutine(db: sqlite3.Connection) -> Any:
    affect(db, "paid")
    return asyncio.sleep(0)


def gives_up(db: sqlite3.Connection) -> None:
    affect(db, "paid")
    raise NonRetryable("never")


@workflow
async def fails(ctx: Context, which: int) -> Any:
    step = ctx.step.options(retry=AT_ONCE)
    return await step.transaction("pay", (unstorable, gives_a_coroutine, gives_up)[which])


@pytest.mark.parametrize("which", [0, 1, 2])
async def test_what_would_fail_again_is_rolled_back_and_not_tried_again(folder: Path, which: int) -> None:
    async with engine(folder, fails) as here:
        run = await here.start(fails, which)
        with pytest.raises(RunFailed, match=r"Payload|never"):
            await run.result(timeout=10)
    assert (effects(folder), calls) == ([], ["paid"])


@workflow
async def parts(ctx: Context, how: str) -> str:
    # What the connection has compiled for a step before must not serve this one.
    await ctx.step.transaction("before", affect, "before")
    try:
        await ctx.step.options(retry=ONCE).transaction("pay", parting, how)
    except StepFailed as error:
        return error.message
    return "parted"


def parting(db: sqlite3.Connection, how: str) -> None:
    affect(db, "paid")
    if how == "with":
        with db:
            pass
    elif how in ("commit", "rollback", "close"):
        getattr(db, how)()
    elif how == "script":
        db.executescript("SELECT 1")
    elif how == "auto":
        db.isolation_level = None
    else:
        db.execute(how)


ENDS = ["COMMIT", "END", "ROLLBACK", "BEGIN IMMEDIATE", "COMMIT /* mine */"]


@pytest.mark.parametrize("how", ["with", "commit", "rollback", "close", "script", "auto", *ENDS])
async def test_a_function_cannot_end_its_transaction(folder: Path, how: str) -> None:
    async with engine(folder, parts) as here:
        message = await (await here.start(parts, how)).result(timeout=10)
    # `isolation_level = None` commits in the driver, behind our back: SQLite itself refuses that.
    assert ("not authorized" if how == "auto" else "together with the record") in message
    assert effects(folder) == ["before"]


def savepoints(db: sqlite3.Connection) -> None:
    db.execute("SAVEPOINT part")
    affect(db, "undone")
    db.execute("ROLLBACK TO part")
    affect(db, "kept")


def rolled_back_by_itself(db: sqlite3.Connection) -> None:
    db.execute("CREATE TEMP TRIGGER refuses BEFORE INSERT ON effects BEGIN SELECT RAISE(ROLLBACK, 'no'); END")
    with pytest.raises(sqlite3.IntegrityError):
        affect(db, "rolled back")
    # Now each statement would commit by itself.
    with pytest.raises(StoreError, match="over"):
        db.execute("DELETE FROM effects")
    calls.append("went on")


@workflow
async def undoes(ctx: Context) -> None:
    await ctx.step.transaction("a", savepoints)
    await ctx.step.options(retry=ONCE).transaction("b", rolled_back_by_itself)


async def test_a_part_can_be_undone_and_what_sqlite_undid_by_itself_is_a_failure(folder: Path) -> None:
    async with engine(folder, undoes) as here:
        with pytest.raises(RunFailed, match="RolledBack"):
            await (await here.start(undoes)).result(timeout=10)
    assert (effects(folder), calls[-1]) == (["kept"], "went on")


def makes_temporary(db: sqlite3.Connection) -> int:
    db.row_factory = sqlite3.Row
    db.execute("CREATE TEMP TABLE mine (x)")
    calls.append(db)
    return 1


@workflow
async def leaves_things(ctx: Context) -> int:
    return await ctx.step.transaction("a", makes_temporary) + await ctx.step.transaction("b", makes_temporary)


async def test_what_a_function_leaves_in_its_connection_reaches_no_other(folder: Path) -> None:
    async with engine(folder, leaves_things) as here:
        assert await (await here.start(leaves_things)).result(timeout=10) == 2
    for kept in calls:
        with pytest.raises((StoreError, RuntimeError)):
            kept.execute("INSERT INTO effects VALUES ('late')")
    assert effects(folder) == []


def sets_a_pragma(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA ignore_check_constraints = ON")


def makes_a_function(db: sqlite3.Connection) -> None:
    db.create_function("lower", 1, lambda text: "not lower")


def looks(db: sqlite3.Connection) -> list[Any]:
    [ignored] = db.execute("PRAGMA ignore_check_constraints").fetchone()
    return [ignored, *db.execute("SELECT lower('A')").fetchone()]


def takes_the_hooks_away(db: sqlite3.Connection) -> None:
    db.set_authorizer(None)


@workflow
async def sets_things(ctx: Context) -> list[Any]:
    await ctx.step.transaction("a", sets_a_pragma)
    first = await ctx.step.transaction("b", looks)
    await ctx.step.transaction("c", makes_a_function)
    second = await ctx.step.transaction("d", looks)
    await ctx.step.options(retry=ONCE).transaction("e", takes_the_hooks_away)
    return [first, second]


async def test_what_a_function_has_set_is_not_there_for_the_next(folder: Path) -> None:
    async with engine(folder, sets_things) as here:
        handle = await here.start(sets_things)
        with pytest.raises(RunFailed, match="would take away what keeps"):
            await handle.result(timeout=10)
        found = [event.data["value"] for event in await handle.history() if event.step in ("b", "d")]
    assert found == [[0, "a"], [0, "a"]]


# --- refused at the call


async def asynchronous(db: sqlite3.Connection) -> None:
    calls.append("ran")


@activity(queue="far")
def dispatched(db: Any) -> None:
    calls.append("ran")


@activity(retry=ONCE)
def declared(db: Any, what: str) -> str:
    return affect(db, what)


@workflow
async def refused(ctx: Context, which: str) -> str:
    fn: Any = {"async": asynchronous, "queue": dispatched, "workflow": refused, "nothing": None, "plain": declared}[
        which
    ]
    try:
        return str(await ctx.step.transaction("pay", fn, "x"))
    except (TypeError, StoreError) as error:
        return str(error)


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("async", "plain function"),
        ("queue", "dispatched"),
        ("workflow", "plain function"),
        ("nothing", "plain function"),
    ],
)
async def test_what_cannot_be_a_transaction_is_refused_at_the_call(folder: Path, which: str, says: str) -> None:
    async with engine(folder, refused) as here:
        assert says in await (await here.start(refused, which)).result(timeout=10)
    assert calls == []


async def test_an_activity_without_a_queue_keeps_its_policy(folder: Path) -> None:
    async with engine(folder, refused) as here:
        assert await (await here.start(refused, "plain")).result(timeout=10) == "X"
    assert effects(folder) == ["x"]


async def test_a_store_without_transactions_refuses_at_the_call() -> None:
    async with Engine(MemoryStore(), workflows=[refused, waits]) as here:
        assert "memory:// has none" in await (await here.start(refused, "plain")).result(timeout=10)
        with pytest.raises(RunFailed, match="needs a store with transactions"):
            await (await here.start(waits, "a")).result(timeout=10)
    assert calls == []


# --- time


def slow(db: sqlite3.Connection, seconds: float) -> str:
    slow_ones.append(seconds)
    try:
        affect(db, "slow")
        time.sleep(seconds)
        return affect(db, "late")
    finally:
        slow_ones.pop()


@workflow
async def takes_long(ctx: Context, seconds: float, timeout: float | None) -> str:
    try:
        return await ctx.step.options(retry=ONCE, timeout=timeout).transaction("slow", slow, seconds)
    except StepTimedOut as error:
        return await ctx.step.run("after", str.upper, error.message)


@pytest.mark.parametrize("style", ["async", "sync"])
async def test_an_attempt_that_takes_too_long_is_rolled_back_at_once(folder: Path, style: str) -> None:
    @workflow
    def takes_long_in_a_thread(ctx: sync.Context, seconds: float, timeout: float) -> str:
        try:
            return ctx.step.options(retry=ONCE, timeout=timeout).transaction("slow", slow, seconds)
        except StepTimedOut as error:
            return ctx.step.run("after", str.upper, error.message)

    flow: Any = takes_long if style == "async" else takes_long_in_a_thread
    async with engine(folder, flow) as here:
        run = await here.start(flow, 1.5, 0.2)
        began = time.monotonic()
        assert "TOOK LONGER THAN ITS TIMEOUT" in await run.result(timeout=10)
        # The function still sleeps; nobody waits for it.
        assert time.monotonic() - began < 1.2
        await until(lambda: len(calls) == 2 or time.monotonic() - began > 3)
    assert effects(folder) == []


@workflow
async def runs_out(ctx: Context) -> str:
    step = ctx.step.options(retry=AT_ONCE, total_timeout=0.3)
    try:
        return await step.transaction("slow", slow, 0.8)
    except StepTimedOut as error:
        return error.message


async def test_what_is_left_of_the_total_timeout_bounds_the_attempt_too(folder: Path) -> None:
    async with engine(folder, runs_out) as here:
        run = await here.start(runs_out)
        assert await run.result(timeout=10) == "Its total_timeout has passed."
        assert kinds(await run.history()) == ["started", "step_failed", "ended"]
    assert (effects(folder), calls[:1]) == ([], ["slow"])


async def test_a_function_that_holds_the_only_writer_too_long_loses_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transaction, "LIMIT", 0.3)
    async with engine(folder, takes_long, waits) as here:
        run = await here.start(takes_long, 1.5, None)
        await until(lambda: calls == ["slow"])
        began = time.monotonic()
        assert await (await here.start(waits, "other")).result(timeout=10) == "OTHER!"
        assert time.monotonic() - began < 1.2
        assert "SINGLE WRITER FOR MORE THAN 0.3 S" in await run.result(timeout=10)
    assert effects(folder) == ["other", "OTHER!", "OTHER!"]


async def test_without_a_thread_that_minds_its_limit_there_is_no_transaction(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    tries: list[int] = []

    def no_more_threads(self: threading.Thread) -> None:
        if self.name == "perdure-step-limit":
            tries.append(1)
            if len(tries) <= 3:
                raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", no_more_threads)
    async with engine(folder, tries_once) as here:
        # It is no attempt of the step: that was not begun.
        assert await (await here.start(tries_once)).result(timeout=20) == "PAID"
    assert effects(folder) == ["paid"]
    assert len(tries) == 4


@workflow
async def tries_once(ctx: Context) -> str:
    return await ctx.step.options(retry=ONCE).transaction("pay", affect, "paid")


def endless(db: sqlite3.Connection) -> int:
    affect(db, "x")
    rows = db.execute("WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n")
    return int(rows.fetchone()[0])


@workflow
async def loops(ctx: Context) -> int:
    return await ctx.step.options(retry=ONCE).transaction("endless", endless)


def test_whoever_stops_a_function_says_why_whoever_ends_it(folder: Path) -> None:
    """The function that the limit has stopped may roll back before the limit itself gets to it."""
    store = SQLiteStore(folder / "runs.db")
    announced(store)
    opened: Any = store.transaction(first_turn(started(store, "a", owner="w")))
    with opened._guard.lock:  # as while a statement runs
        limit = threading.Thread(target=opened.out_of_time)
        limit.start()
        while opened.open:
            time.sleep(0.001)
        opened.roll_back()
    limit.join()
    assert opened.gone.seconds == transaction.LIMIT
    store.close()


async def test_a_statement_that_does_not_end_is_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transaction, "LIMIT", 0.3)
    async with engine(folder, loops) as here:
        with pytest.raises(RunFailed, match="single writer for more than"):
            await (await here.start(loops)).result(timeout=10)
    assert effects(folder) == []


# --- what comes meanwhile


@workflow
async def hears(ctx: Context) -> list[Any]:
    said = []

    async def hear(what: Any) -> None:
        said.append(str(await what))

    await asyncio.gather(
        hear(ctx.step.wait_signal("go")),
        hear(ctx.step.sleep("nap", 1.0)),  # the function begins before it ends, also on a busy machine
        hear(ctx.step.transaction("slow", slow, 1.5)),
    )
    return said


async def test_what_comes_while_it_is_open_comes_behind_it(folder: Path) -> None:
    async with engine(folder, hears) as here:
        run = await here.start(hears)
        await until(lambda: calls == ["slow"])
        await run.signal("go", 7)
        # A signal is a write too: it waited for the writer that the function held.
        assert await run.result(timeout=10) == ["LATE", "None", "7"]
        history = await run.history()
    assert "step_completed" in kinds(history)[:5]
    at = [event.at for event in history]
    assert at == sorted(at)


@workflow
async def sleeps_behind(ctx: Context) -> list[float]:
    times = [ctx.now()]
    await ctx.step.transaction("slow", slow, 0.4)
    times.append(ctx.now())
    await ctx.step.sleep("nap", 0.2)
    times.append(ctx.now())
    return [(later - times[0]).total_seconds() for later in times[1:]]


async def test_what_follows_counts_from_its_end(folder: Path) -> None:
    async with engine(folder, sleeps_behind) as here:
        run = await here.start(sleeps_behind)
        began = time.monotonic()
        behind, woken = await run.result(timeout=10)
        assert time.monotonic() - began >= 0.6 - 0.05, "the nap was not cut short"
    assert behind >= 0.4
    assert woken - behind >= 0.2


@workflow
async def ends_at_once(ctx: Context) -> str:
    return await ctx.step.transaction("slow", slow, 0.2)


async def test_a_message_that_comes_between_the_outcome_and_the_end_is_listed_unread(folder: Path) -> None:
    async with engine(folder, ends_at_once) as here:
        run = await here.start(ends_at_once)
        await until(lambda: calls == ["slow"])
        signals = [asyncio.create_task(run.signal("go", n, message_id=f"m-{n}")) for n in range(20)]
        done = await asyncio.gather(*signals, return_exceptions=True)
        assert await run.result(timeout=10) == "LATE"
        history = await run.history()
    kept = {f"m-{n}" for n, answer in enumerate(done) if answer is None}
    read = {event.data["message"] for event in history if event.kind == "signal"}
    assert kept == read | set(history[-1].data.get("unread", ()))
    assert effects(folder) == ["slow", "late"]


@workflow
async def is_cancelled(ctx: Context) -> str:
    try:
        await ctx.step.transaction("slow", slow, 0.3)
        await ctx.step.sleep("for ever", days=1)
    except asyncio.CancelledError:
        await ctx.step.transaction("undo", affect, "undone")
        raise
    return "done"


async def test_a_cancel_request_arrives_behind_it(folder: Path) -> None:
    async with engine(folder, is_cancelled) as here:
        run = await here.start(is_cancelled)
        await until(lambda: calls == ["slow"])
        await run.cancel("enough")
        assert await status_of(run, "cancelled") == "cancelled"
    assert effects(folder) == ["slow", "late", "undone"]


# --- replay


@workflow(name="changes")
async def was_a_step(ctx: Context) -> str:
    done = await ctx.step.run("pay", lambda: "paid")
    await ctx.step.wait_signal("go")
    return done


@workflow(name="changes")
async def is_a_transaction(ctx: Context) -> str:
    done = await ctx.step.transaction("pay", lambda db: "paid")
    await ctx.step.wait_signal("go")
    return done


@pytest.mark.parametrize(("before", "after"), [(was_a_step, is_a_transaction), (is_a_transaction, was_a_step)])
async def test_a_step_that_became_another_kind_is_a_difference(folder: Path, before: Any, after: Any) -> None:
    async with engine(folder, before) as here:
        run = await here.options(id="r").start(before)
        await status_of(run, "waiting")
    async with engine(folder, after) as here:
        run = here.handle("r")
        await run.signal("go")
        assert await status_of(run, "blocked") == "blocked"
        report = await run.why()
    words = ["run step", "transaction step"]
    assert all(f'{word} "pay"' in report for word in words)


# --- trouble with the store, exactly at the commit


class Troubled:
    """A store whose next commits of steps meet trouble, before or after they are written."""

    def __init__(self, store: SQLiteStore, trouble: list[str]) -> None:
        self._store = store
        self._trouble = trouble

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def transaction(self, turn: Turn) -> Any:
        if self._trouble and self._trouble[0] == "begin":
            self._trouble.pop(0)
            raise StoreUnavailable("no answer to BEGIN")
        opened = self._store.transaction(turn)
        return opened if not hasattr(opened, "commit") else _TroubledTransaction(opened, self._trouble)


class _TroubledTransaction:
    def __init__(self, opened: Any, trouble: list[str]) -> None:
        self._opened = opened
        self._trouble = trouble

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def repeats(self, error: BaseException) -> bool:
        return str(error) == "could not serialise"

    def commit(self, events: Any) -> None:
        trouble = self._trouble.pop(0) if self._trouble else ""
        if trouble == "lost before":
            self._opened.roll_back()
        elif trouble == "serialise":
            self._opened.roll_back()
            raise ValueError("could not serialise")
        else:
            self._opened.commit(events)
        if trouble.startswith("lost"):
            raise StoreUnavailable("the answer was lost")


@pytest.mark.parametrize(
    ("trouble", "executions"),
    [(["begin"], 3), (["lost before"], 4), (["lost after"], 3), (["serialise"], 4), (["", "lost after"], 3)],
)
async def test_an_unknown_outcome_is_asked_for_and_the_effect_is_there_once(
    folder: Path, trouble: list[str], executions: int
) -> None:
    store = SQLiteStore(folder / "runs.db")
    steps = executions
    async with Engine(Troubled(store, list(trouble)), workflows=[awaits]) as here:
        run = await here.start(awaits, "a")
        assert await run.result(timeout=10) == "A!"
        history = await run.history()
    store.close()
    assert effects(folder) == ["a", "A!", "A!"]
    assert kinds(history) == ["started", "step_completed", "step_completed", "ended"]
    assert len(calls) == steps - 1


async def test_a_worker_that_dies_behind_the_commit_repeats_nothing(folder: Path) -> None:
    """The outcome is recorded, and nothing of what the code did with it: that is life, and not replay."""

    class Dies(SQLiteStore):
        dead = False

        def _written(self, batch: Any, *, at_once: bool) -> Any:
            if self.dead or any(turn.version >= 1 for turn in batch.turns):
                self.dead = True
                raise StoreUnavailable("dead")
            return super()._written(batch, at_once=at_once)

    @workflow
    async def child(ctx: Context) -> str:
        return "a child"

    @workflow(name="goes_on")
    async def goes_on(ctx: Context) -> str:
        other = ctx.step.start("other", lambda: time.sleep(60))
        await ctx.step.transaction("pay", affect, "paid")
        assert ctx.patched("since")
        await ctx.step.emit_workflow("child", child)
        await other.cancel()
        return "done"

    store = Dies(folder / "runs.db", hints=False)
    first = Engine(store, workflows=[goes_on, child], lease=0.5)
    await first._core.open()
    await first.options(id="r").start(goes_on)
    await until(lambda: store.dead)
    first._core.shift.heartbeat.stop()  # type: ignore[union-attr]
    assert ask(folder, "SELECT event FROM perdure_history ORDER BY seq DESC LIMIT 1")[0][0].startswith(
        '{"kind":"step_completed"'
    )
    async with engine(folder, goes_on, child, lease=0.5) as second:
        assert await second.handle("r").result(timeout=20) == "done"
        history = await second.handle("r").history()
    assert effects(folder) == ["paid"]
    assert kinds(history)[1:] == ["step_completed", "patched", "child", "step_cancelled", "ended"]
    await abandoned(first)
    store.close()


async def abandoned(dead: Engine) -> None:
    """End the threads of an engine that stands for a killed process."""
    core: Any = dead._core
    core.thread._stopping = True
    core.committer._turns.clear()
    core.store.dead = False
    core.drain = lambda grace: asyncio.sleep(0, result=True)
    await core.close()


# --- ours inside theirs


@workflow
async def reaches_out(ctx: Context, which: str) -> str:
    def fn(db: sqlite3.Connection) -> str:
        affect(db, "paid")
        try:
            if which == "ctx":
                ctx.step.run("inner", lambda: None)
            elif which == "start":
                here.sync.start(awaits, "a")
            else:
                getattr(here.sync.handle("other"), which)(*["go"][: int(which == "signal")])
        except RuntimeError as error:
            return str(error)
        return "went on"

    return await ctx.step.transaction("pay", fn)


here: Any = None


@pytest.mark.parametrize("which", ["ctx", "start", "signal", "cancel", "terminate", "result"])
async def test_nothing_of_ours_is_called_inside(folder: Path, which: str) -> None:
    global here
    async with engine(folder, reaches_out, awaits) as here:
        began = time.monotonic()
        said = await (await here.start(reaches_out, which)).result(timeout=10)
        assert time.monotonic() - began < 2
    assert "outside the workflow's own body" in said if which == "ctx" else "inside the transaction" in said


async def test_the_client_face_reads_while_a_step_holds_the_writer(folder: Path) -> None:
    async with engine(folder, takes_long) as one, Client(url_of(folder)) as client:
        run = await one.start(takes_long, 0.4, None)
        await until(lambda: calls == ["slow"])
        assert await client.handle(run.id).status() == "running"
        assert await run.result(timeout=10) == "LATE"
