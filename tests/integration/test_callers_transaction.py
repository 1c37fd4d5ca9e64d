"""Starts, signals and cancels inside a transaction of the caller's own: seen after its commit, or never happened."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from perdure import (
    Context,
    IdempotencyConflict,
    MemoryStore,
    RunExists,
    RunFinished,
    RunNotFound,
    SQLiteStore,
    StoreError,
    UnknownWorkflow,
    sync,
    workflow,
)
from tests.integration.helpers import ask, engine, until, url_of


@workflow
async def order(ctx: Context, number: int) -> str:
    return f"{number} by {await ctx.step.wait_signal('by')}"


@workflow
def in_its_body(ctx: sync.Context, path: str) -> str:
    # Not the engine's own face: its loop waits for this body.
    with closing(sqlite3.connect(path)) as db, sync.Client(f"sqlite:///{path}") as client:
        client.options(connection=db).start(order, 2)
        try:
            ctx.step.run("inner", lambda: None)
        except RuntimeError as error:
            return str(error)
    return "went on"


shop: Any = None


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Any]:
    """The sync face of an engine, and a table of the caller's own."""
    global shop
    SQLiteStore(tmp_path / "runs.db").close()
    with closing(sqlite3.connect(tmp_path / "runs.db")) as db:
        db.execute("CREATE TABLE orders (number INTEGER UNIQUE)")
        db.commit()
    with sync.Engine(url_of(tmp_path), workflows=[order, in_its_body]) as shop:
        yield shop


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "runs.db", timeout=0.5)) as db:
        yield db


def place(here: Any, db: sqlite3.Connection, number: int, **options: Any) -> Any:
    db.execute("INSERT INTO orders VALUES (?)", (number,))
    return here.options(connection=db, id=f"order-{number}", **options).start(order, number)


def test_what_is_committed_is_executed_and_what_is_rolled_back_never_happened(
    here: Any, db: sqlite3.Connection, tmp_path: Path
) -> None:
    with db:
        run = place(here, db, 1)
        run.signal("by", "Ann")
        assert ask(tmp_path, "SELECT id FROM perdure_runs") == []
    assert here.handle("order-1").result(timeout=10) == "1 by Ann"
    place(here, db, 2).signal("by", "Bob")
    db.rollback()
    with pytest.raises(RunNotFound):
        here.handle("order-2").status()
    assert ask(tmp_path, "SELECT number FROM orders") == [(1,)]
    assert ask(tmp_path, "SELECT count(*) FROM perdure_mail") == [(1,)]


def test_more_options_leave_it_part_of_the_transaction(here: Any, db: sqlite3.Connection, tmp_path: Path) -> None:
    with_it = here.options(connection=db, id="order-1")
    with_it.options(delay=0).start(order, 1).signal("by", "Ann")
    db.rollback()
    assert ask(tmp_path, "SELECT id FROM perdure_runs") == []
    with db:
        with_it.options(delay=0).start(order, 1).signal("by", "Ann")
    assert here.handle("order-1").result(timeout=60) == "1 by Ann"


def test_a_refused_call_leaves_no_transaction_open_that_it_has_begun(
    here: Any, db: sqlite3.Connection, tmp_path: Path
) -> None:
    run = here.options(id="taken").start(order, 1)
    run.signal("by", "Ann")
    run.result(timeout=60)
    with_it = here.options(connection=db)
    refused: list[tuple[type[Exception], Callable[[], Any]]] = [
        (RunNotFound, lambda: with_it.handle("nobody").signal("by")),
        (RunFinished, lambda: with_it.handle("taken").signal("by")),
        (RunExists, lambda: here.options(connection=db, id="taken", if_exists="fail").start(order, 1)),
        (IdempotencyConflict, lambda: here.options(connection=db, id="taken").start(order, 2)),
    ]
    for error, call in refused:
        with pytest.raises(error):
            call()
        assert not db.in_transaction
        assert here.start(order, 3).status() in ("running", "waiting")
    # One that the caller has begun is the caller's.
    db.execute("INSERT INTO orders VALUES (7)")
    with pytest.raises(RunNotFound):
        with_it.handle("nobody").signal("by")
    db.commit()
    assert ask(tmp_path, "SELECT number FROM orders") == [(7,)]
    with closing(sqlite3.connect(f"file:{tmp_path / 'runs.db'}?mode=ro", uri=True)) as reader:
        with pytest.raises(StoreError):
            here.options(connection=reader).start(order, 4)
        assert not reader.in_transaction


def test_workers_of_another_process_hear_of_the_commit_soon(here: Any, db: sqlite3.Connection) -> None:
    with db:
        run = place(here, db, 1)
        run.signal("by", "Ann")
    began = time.monotonic()
    assert run.result(timeout=10) == "1 by Ann"
    assert time.monotonic() - began < 2


def test_a_cancel_is_part_of_it_too(here: Any, db: sqlite3.Connection) -> None:
    run = here.options(id="r").start(order, 1)
    with db:
        here.options(connection=db).handle("r").cancel("not wanted")
        db.rollback()
    assert run.status() in ("running", "waiting")
    with db:
        here.options(connection=db).handle("r").cancel("not wanted")
    with pytest.raises(Exception, match="not wanted"):
        run.result(timeout=10)


def test_terminate_is_no_part_of_it_and_says_so(here: Any, db: sqlite3.Connection) -> None:
    run = here.start(order, 1)
    with db:
        db.execute("INSERT INTO orders VALUES (1)")
        with pytest.raises(RuntimeError, match="would not be undone by a rollback"):
            here.options(connection=db).handle(run.id).terminate()
        assert run.status() != "terminated"
    run.terminate()
    assert run.status() == "terminated"


def test_refusals_are_the_same_and_leave_the_transaction_to_the_caller(here: Any, db: sqlite3.Connection) -> None:
    here.options(id="order-1").start(order, 1)
    here.options(id="order-9").start(order, 1).terminate()
    with db:
        db.execute("INSERT INTO orders VALUES (7)")
        inside = here.options(connection=db)
        with pytest.raises(RunExists):
            place(here, db, 1, if_exists="fail")
        with pytest.raises(IdempotencyConflict):
            here.options(connection=db, id="order-1").start(order, 2)
        with pytest.raises(UnknownWorkflow):
            inside.start("nobody")
        with pytest.raises(RunNotFound):
            inside.handle("nobody").signal("by")
        with pytest.raises(RunFinished):
            inside.handle("order-9").signal("by", 1)
        inside.handle("order-9").cancel()
        with pytest.raises(TypeError, match="number"):
            inside.start(order)
    assert db.execute("SELECT number FROM orders ORDER BY 1").fetchall() == [(1,), (7,)]


@pytest.mark.parametrize("make", ["default", "begun", "autocommit", "rows", "bytes", "dicts"])
def test_connections_as_people_have_them(here: Any, tmp_path: Path, make: str) -> None:
    db = sqlite3.connect(tmp_path / "runs.db")
    if make in ("begun", "autocommit"):
        db.isolation_level = None
    if make == "rows":
        db.row_factory = sqlite3.Row
    elif make == "bytes":
        db.text_factory = bytes
    elif make == "dicts":
        db.row_factory = lambda cursor, row: {
            column[0]: value for column, value in zip(cursor.description, row, strict=True)
        }
    with closing(db):
        if make == "begun":
            db.execute("BEGIN")
        if make == "autocommit":
            with pytest.raises(ValueError, match="BEGIN IMMEDIATE"):
                here.options(connection=db).start(order, 1)
            return
        run = here.options(connection=db).start(order, 1)
        run.signal("by", "Ann")
        assert db.in_transaction
        if make == "bytes":
            assert db.text_factory is bytes
        db.commit()
        assert run.result(timeout=10) == "1 by Ann"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="autocommit= is there since 3.12")
@pytest.mark.parametrize("autocommit", [True, False])
def test_connections_of_the_newer_kind(here: Any, tmp_path: Path, autocommit: bool) -> None:
    with closing(sqlite3.connect(tmp_path / "runs.db", autocommit=autocommit)) as db:  # type: ignore[call-overload,unused-ignore]
        if autocommit:
            with pytest.raises(ValueError, match="BEGIN IMMEDIATE"):
                here.options(connection=db).start(order, 1)
            return
        run = here.options(connection=db).start(order, 1)
        db.commit()
        assert run.status() in ("ready", "running", "waiting")


def test_a_transaction_that_has_read_before_others_wrote_is_told_why_it_cannot_write(
    here: Any, db: sqlite3.Connection
) -> None:
    db.isolation_level = None
    db.execute("BEGIN")
    db.execute("SELECT * FROM orders").fetchall()
    here.start(order, 1)
    with pytest.raises(StoreError, match="BEGIN IMMEDIATE"):
        here.options(connection=db).start(order, 2)
    db.execute("ROLLBACK")


def test_what_is_no_connection_of_the_stores_own_database_is_refused(
    here: Any, tmp_path: Path, db: sqlite3.Connection
) -> None:
    with closing(sqlite3.connect(tmp_path / "other.db")) as other, pytest.raises(ValueError, match=r"other\.db"):
        here.options(connection=other).start(order, 1)
    closed = sqlite3.connect(tmp_path / "runs.db")
    closed.close()
    with pytest.raises(ValueError, match="cannot be used here: Cannot operate on a closed database"):
        here.options(connection=closed).start(order, 1)
    with pytest.raises(ValueError, match="in the thread that it belongs to"), ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: here.options(connection=db).start(order, 1)).result()
    with closing(sqlite3.connect(":memory:")) as other, pytest.raises(ValueError, match="in memory"):
        here.options(connection=other).start(order, 1)
    with pytest.raises(TypeError, match=r"sqlite3\.Connection"):
        here.options(connection="runs.db").start(order, 1)
    with sync.Engine(MemoryStore(), workflows=[order]) as other, pytest.raises(StoreError, match="has none"):
        other.options(connection=db).start(order, 1)


async def test_the_async_face_has_no_such_option(tmp_path: Path) -> None:
    async with engine(tmp_path, order) as here:
        with pytest.raises(TypeError, match=r"engine\.sync\.options"):
            here.options(connection=object())


async def test_the_sync_face_of_an_async_engine_writes_in_the_callers_thread(tmp_path: Path) -> None:
    async with engine(tmp_path, order) as here:

        def handle_request() -> str:
            with closing(sqlite3.connect(tmp_path / "runs.db")) as db, db:
                run = here.sync.options(connection=db).start(order, 1)
                run.signal("by", threading.current_thread().name)
                return str(run.id)

        id = await asyncio.to_thread(handle_request)
        assert (await here.handle(id).result(timeout=10)).startswith("1 by ")


@pytest.mark.parametrize(
    "call",
    [
        lambda here, run: here.start(order, 2),
        lambda here, run: run.result(),
        lambda here, run: run.terminate(),
        lambda here, run: here.handle("order-0").signal("by", 1),
        lambda here, run: here.handle("order-0").cancel(),
    ],
    ids=["start", "result", "terminate", "signal", "cancel"],
)
def test_what_would_wait_for_itself_is_refused_at_once(
    here: Any, db: sqlite3.Connection, call: Callable[[Any, Any], Any]
) -> None:
    with db:
        run = place(here, db, 1)
        began = time.monotonic()
        with pytest.raises(RuntimeError, match="inside an open transaction"):
            call(here, run)
        assert time.monotonic() - began < 1
    # After the commit nothing waits.
    here.start(order, 3)


def test_a_workflow_body_inside_one_is_told_at_its_line(here: Any, tmp_path: Path) -> None:
    said = here.start(in_its_body, str(tmp_path / "runs.db")).result(timeout=10)
    assert "inside an open transaction" in said


@workflow
async def starts_inside(ctx: Context, fails: bool) -> str:
    def fn(connection: Any) -> str:
        run = shop.options(connection=connection, id="inner").start(order, 5)
        run.signal("by", "step")
        if fails:
            raise ValueError("no")
        return str(run.id)

    return await ctx.step.transaction("start", fn)


@pytest.mark.parametrize("fails", [False, True])
def test_a_transaction_step_may_start_runs_on_its_own_connection(tmp_path: Path, fails: bool) -> None:
    global shop
    with sync.Engine(url_of(tmp_path), workflows=[order, starts_inside]) as shop:
        run = shop.start(starts_inside, fails)
        if fails:
            with pytest.raises(Exception, match="no"):
                run.result(timeout=20)
            with pytest.raises(RunNotFound):
                shop.handle("inner").status()
        else:
            assert shop.handle(run.result(timeout=10)).result(timeout=10) == "5 by step"


async def test_a_client_that_serves_nothing_can_do_it_too(tmp_path: Path) -> None:
    async with engine(tmp_path, order) as here:

        def elsewhere() -> None:
            with sync.Client(url_of(tmp_path)) as client, closing(sqlite3.connect(tmp_path / "runs.db")) as db, db:
                client.options(connection=db, id="r").start("order", 1).signal("by", "a client")

        await asyncio.to_thread(elsewhere)
        assert await until(lambda: here.handle("r").result(timeout=10)) == "1 by a client"
