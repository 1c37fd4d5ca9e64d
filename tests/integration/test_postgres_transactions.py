"""Transaction steps and callers' transactions on a real PostgreSQL server, through the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from perdure import Context, Engine, RunNotFound, RunTerminated, StepFailed, StoreLocked, sync, workflow
from perdure.core.turn import Batch
from perdure.stores.opening import open_store
from perdure.stores.postgres import PostgresStore
from perdure.stores.postgres.transaction import ending
from perdure.worker import residents
from perdure.worker.residents import Resident
from tests import servers
from tests.integration.helpers import AT_ONCE, ONCE, kinds, status_of, until

calls: list[Any] = []


@pytest.fixture(scope="module")
def database() -> servers.Database:
    return servers.needed()


@pytest.fixture
def url(database: servers.Database) -> Iterator[str]:
    """A store's own schema, with a table of the user's own in it."""
    calls.clear()
    with servers.schema(database) as schema:
        joined = "&" if "?" in database.url else "?"
        yield f"{database.url}{joined}options=-csearch_path%3D{schema}&schema={schema}"


@pytest.fixture
def db(url: str) -> Iterator[psycopg.Connection[Any]]:
    open_store(url).close()
    with psycopg.connect(url.rpartition("&")[0]) as db:
        db.execute("CREATE TABLE effects (what text NOT NULL, number int UNIQUE)")
        db.commit()
        yield db


def effects(db: psycopg.Connection[Any]) -> list[str]:
    found = [what for (what,) in db.execute("SELECT what FROM effects ORDER BY what").fetchall()]
    db.commit()
    return found


def affect(db: psycopg.Connection[Any], what: str) -> str:
    calls.append(what)
    db.execute("INSERT INTO effects VALUES (%s)", (what,))
    return what.upper()


@workflow
async def awaits(ctx: Context, what: str) -> str:
    first = await ctx.step.transaction("first", affect, what)
    return await ctx.step.transaction("second", affect, f"{first}!")


@workflow
def waits(ctx: sync.Context, what: str) -> str:
    first = ctx.step.transaction("first", affect, what)
    return ctx.step.transaction("second", affect, f"{first}!")


@workflow
def yields(ctx: Context, what: str) -> Any:
    first = yield ctx.step.transaction("first", affect, what)
    (second,) = yield [ctx.step.transaction("second", affect, f"{first}!")]
    return second


@pytest.mark.parametrize("style", [awaits, waits, yields])
async def test_effect_and_record_in_all_three_styles(url: str, db: psycopg.Connection[Any], style: Any) -> None:
    async with Engine(url, workflows=[style]) as here:
        runs = [await here.start(style, "a") for _ in range(5)]
        for run in runs:
            assert await run.result(timeout=20) == "A!"
        history = await runs[0].history()
    assert effects(db) == ["A!"] * 5 + ["a"] * 5
    assert kinds(history) == ["started", "step_completed", "step_completed", "ended"]


def serialises_late(db: psycopg.Connection[Any]) -> str:
    affect(db, "paid")
    if len(calls) == 1:
        raise psycopg.errors.SerializationFailure("could not serialise")
    if len(calls) == 2:
        raise ValueError("an ordinary failure")
    return "done"


def breaks_a_rule(db: psycopg.Connection[Any]) -> None:
    affect(db, "paid")
    db.execute("INSERT INTO effects VALUES ('x', 1), ('y', 1)")


@workflow
async def fails(ctx: Context, fn: str) -> Any:
    try:
        chosen: Any = {"late": serialises_late, "rule": breaks_a_rule}[fn]
        return await ctx.step.options(retry=AT_ONCE).transaction("pay", chosen)
    except StepFailed as error:
        return error.type


async def test_a_conflict_repeats_the_function_and_a_failure_the_attempt(url: str, db: psycopg.Connection[Any]) -> None:
    async with Engine(url, workflows=[fails]) as here:
        run = await here.start(fails, "late")
        assert await run.result(timeout=20) == "done"
        assert kinds(await run.history()) == ["started", "attempt_failed", "step_completed", "ended"]
    assert (effects(db), len(calls)) == (["paid"], 3)


async def test_a_step_that_fails_for_good_leaves_nothing(url: str, db: psycopg.Connection[Any]) -> None:
    async with Engine(url, workflows=[fails]) as here:
        assert "UniqueViolation" in await (await here.start(fails, "rule")).result(timeout=20)
    assert effects(db) == []


WAYS = [
    "COMMIT",
    "ROLLBACK",
    "ROLLBACK AND CHAIN",
    "end",
    "INSERT INTO effects VALUES ('x', 9); ROLLBACK; INSERT INTO effects VALUES ('y', 9); COMMIT",
    "/* a */ -- b\n abort",
]
CLIENT = "by a cursor that looks at nothing: "


def parts(db: psycopg.Connection[Any], how: str) -> str:
    affect(db, "paid")
    try:
        if how.startswith(CLIENT):
            psycopg.ClientCursor(db).execute(how.removeprefix(CLIENT))
        elif how == "commit()":
            db.commit()
        else:
            db.execute(how)
    except (RuntimeError, psycopg.Error):
        if how == "commit()":
            raise
    affect(db, "paid again")
    return "done"


@workflow
async def parted(ctx: Context, how: str) -> str:
    await ctx.step.transaction("before", affect, "before")
    try:
        return str(await ctx.step.options(retry=ONCE).transaction("pay", parts, how))
    except StepFailed as error:
        return error.message


@pytest.mark.parametrize("how", [*WAYS, *(CLIENT + way for way in WAYS), "commit()"])
async def test_however_a_function_ends_its_transaction_there_is_no_effect_without_a_record(
    url: str, db: psycopg.Connection[Any], how: str
) -> None:
    async with Engine(url, workflows=[parted]) as here:
        said = await (await here.start(parted, how)).result(timeout=20)
    found = effects(db)
    if said == "done":
        assert found == ["before", "paid", "paid again"], "it was refused and went on"
    else:
        assert "x" not in found
        assert found in (["before"], ["before", "y"])  # a string of several statements is its function's own doing


def test_words_that_end_a_transaction_are_found_and_others_not() -> None:
    for text in (
        "commit",
        " ;END;",
        "select 1; Rollback work",
        "begin",
        "start  transaction",
        "prepare transaction 'x'",
    ):
        assert ending(text), text
    for text in (
        "ROLLBACK TO a", "rollback work to savepoint a", "SAVEPOINT begin", "SELECT 'a; commit'", "select 1 -- ; end",
        "DO $$ BEGIN NULL; END $$", "RELEASE a", "SELECT CASE WHEN true THEN 1 END", 'SELECT 1 AS "; end"', "beginning",
    ):  # fmt: skip
        assert ending(text) is None, text


@workflow
async def order(ctx: Context, number: int) -> str:
    return f"{number} by {await ctx.step.wait_signal('by')}"


async def test_starts_and_signals_are_part_of_the_callers_transaction(url: str, db: psycopg.Connection[Any]) -> None:
    async with Engine(url, workflows=[order]) as here:

        def handle_requests() -> None:
            shop = here.sync
            for number in (1, 2):
                affect(db, str(number))
                run = shop.options(connection=db, id=f"order-{number}").start(order, number)
                run.signal("by", "Ann")
                with pytest.raises(RunNotFound):
                    shop.handle(f"order-{number}").status()
                db.commit() if number == 1 else db.rollback()

        await asyncio.to_thread(handle_requests)
        assert await here.handle("order-1").result(timeout=20) == "1 by Ann"
        with pytest.raises(RunNotFound):
            await here.handle("order-2").status()
        assert effects(db) == ["1"]


async def test_a_store_object_does_the_same(url: str, db: psycopg.Connection[Any], database: servers.Database) -> None:
    store = PostgresStore(url.rpartition("&")[0], schema=url.rpartition("=")[2])
    async with Engine(store, workflows=[awaits]) as here:
        run = await here.start(awaits, "a")
        assert await until(lambda: run.result(timeout=20)) == "A!"
    await asyncio.to_thread(store.close)


def takes_long(db: psycopg.Connection[Any], seconds: float) -> None:
    affect(db, "paid")
    time.sleep(seconds)


@workflow
async def pays_slowly(ctx: Context, seconds: float) -> None:
    await ctx.step.transaction("pay", takes_long, seconds)
    await ctx.step.wait_signal("go")


async def test_terminate_waits_for_a_transaction_step(
    url: str, db: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Engine(url, workflows=[pays_slowly]) as here:
        run = await here.start(pays_slowly, 1.5)
        await until(lambda: calls)
        await run.terminate("enough")
        with pytest.raises(RunTerminated):
            await run.result(timeout=20)
        calls.clear()
        monkeypatch.setattr("perdure.client.TERMINATES_WITHIN", 0.3)
        run = await here.start(pays_slowly, 1.5)
        await until(lambda: calls)
        with pytest.raises(StoreLocked, match="a transaction step of its own that still runs"):
            await run.terminate()
    assert effects(db) == ["paid", "paid"]


async def test_what_is_no_connection_of_the_stores_own_database_is_refused(
    url: str, db: psycopg.Connection[Any], database: servers.Database
) -> None:
    schema = url.rpartition("=")[2]
    twin = f"twin_{schema}"
    own = open_store(url)
    with psycopg.connect(database.url, autocommit=True) as server:
        server.execute(f"CREATE DATABASE {twin}".encode())
    try:
        there = psycopg.connect(database.url, dbname=twin)
        PostgresStore(make_conninfo(database.url, dbname=twin), schema=schema).close()
        # As a restored backup, or a database made from a template.
        [(id,)] = db.execute(f"SELECT id FROM {schema}.store".encode()).fetchall()
        there.execute(f"UPDATE {schema}.store SET id = %s".encode(), [id])
        there.commit()
        with pytest.raises(ValueError, match="which is not the store"):
            own.write_on(there, Batch())
        there.close()
        with pytest.raises(ValueError, match="is closed, or its server has ended it"):
            own.write_on(there, Batch())
        own.write_on(db, Batch())
    finally:
        own.close()
        with psycopg.connect(database.url, autocommit=True) as server:
            server.execute(f"DROP DATABASE {twin} WITH (FORCE)".encode())


async def test_a_run_that_its_worker_fails_at_in_a_transaction_step_holds_up_no_other(
    url: str, db: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residents, "FIRST_BACK_OFF", 10_000)
    post = Resident.post
    failed: list[str] = []

    def fails_once(self: Resident, mail: Any) -> None:
        if not failed:
            failed.append(self.id)
            raise MemoryError
        post(self, mail)

    monkeypatch.setattr(Resident, "post", fails_once)
    async with Engine(url, workflows=[pays_slowly, awaits], lease=1) as here:
        run = await here.start(pays_slowly, 3)
        await until(lambda: calls)
        await run.signal("go")
        await until(lambda: failed)
        began = time.monotonic()
        for _ in range(5):
            assert await (await here.start(awaits, "a")).result(timeout=20) == "A!"
        took = time.monotonic() - began
        await run.result(timeout=30)
    print(f"five other runs took {took:.2f} s beside the step of 3 s")
    assert took < 2.5
    assert effects(db).count("paid") == 1


@pytest.mark.parametrize("style", ["German", "SQL, DMY"])
def test_a_connection_may_write_dates_as_it_likes(url: str, db: psycopg.Connection[Any], style: str) -> None:
    own = open_store(url)
    db.execute("SELECT set_config('DateStyle', %s, false)", [style])
    own.write_on(db, Batch())
    own.close()


def in_latin(db: psycopg.Connection[Any]) -> str:
    db.execute("SET LOCAL client_encoding TO 'LATIN1'")
    return "Gr\u00fc\u00dfe"


@workflow
async def greets(ctx: Context) -> str:
    said: str = await ctx.step.transaction("said", in_latin)
    await ctx.step.wait_signal("go")
    return said


async def test_a_step_that_leaves_another_encoding_records_what_its_code_got(url: str) -> None:
    async with Engine(url, workflows=[greets]) as engine:
        run = await engine.options(id="run").start(greets)
        await status_of(run, "waiting")
    async with Engine(url, workflows=[greets]) as engine:
        run = engine.handle("run", returns=str)
        await run.signal("go", 1)
        assert await run.result(timeout=30) == "Gr\u00fc\u00dfe"
