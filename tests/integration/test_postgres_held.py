"""What an open transaction of somebody else holds up on PostgreSQL, and that it holds up nothing else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from perdure import Engine, RunFailed, StoreLocked, client, sync, workflow
from perdure.core.turn import Batch, Begun, Busy, Duplicate, Existing, Kept
from perdure.stores.contract import Store
from perdure.stores.opening import open_store
from perdure.testing.conformance.story import NAMESPACE, held, signal, start, started
from tests import servers


@pytest.fixture
def url() -> Iterator[str]:
    database = servers.needed()
    with servers.schema(database) as schema:
        yield f"{database.url}{'&' if '?' in database.url else '?'}schema={schema}"


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = open_store(url)
    yield store
    store.close()


@pytest.fixture
def theirs(url: str, store: Store) -> Iterator[psycopg.Connection[Any]]:
    """A connection of somebody else's, with a transaction open."""
    with psycopg.connect(url.rpartition("schema=")[0].rstrip("?&")) as db:
        db.execute("SELECT 1")
        yield db
        db.rollback()


# --- the store


def test_a_start_waits_for_who_has_started_the_same_and_its_neighbours_do_not(
    store: Store, theirs: psycopg.Connection[Any]
) -> None:
    store.write_on(theirs, Batch(starts=[start("taken")]))
    batch = Batch(starts=[start("before"), start("taken"), start("behind")])
    before, taken, behind = store.write(batch)
    assert (type(before), type(taken), type(behind)) == (Begun, Busy, Begun)
    # Known by now: it is put off without a try, and the others are not even slowed.
    assert [type(each) for each in store.write(Batch(starts=[start("taken"), start("more")]))] == [Busy, Begun]
    theirs.commit()
    assert isinstance(eventually(store, Batch(starts=[start("taken", seed="another")])), Existing)


def test_of_one_that_is_rolled_back_nothing_stays(store: Store, theirs: psycopg.Connection[Any]) -> None:
    keyed = {"idempotency_scope": "orders", "idempotency_key": "k"}
    store.write_on(theirs, Batch(starts=[start("first", **keyed)]))
    assert isinstance(store.write(Batch(starts=[start("second", **keyed)]))[0], Busy)
    theirs.rollback()
    assert isinstance(eventually(store, Batch(starts=[start("second", **keyed)])), Begun)


def test_a_message_waits_for_who_has_sent_the_same_and_its_neighbours_do_not(
    store: Store, theirs: psycopg.Connection[Any]
) -> None:
    run = started(store)
    store.write_on(theirs, Batch(sends=[signal(run, "m")]))
    verdicts = store.write(Batch(sends=[signal(run, "a"), signal(run, "m"), signal(run, "b")]))
    assert [type(each) for each in verdicts] == [Kept, Busy, Kept]
    theirs.commit()
    assert isinstance(eventually(store, Batch(sends=[signal(run, "m")])), Duplicate)
    assert {mail.id for mail in store.mailbox(run)} == {"a", "b", "m"}


def test_a_turn_waits_for_the_id_of_its_child_and_its_neighbours_do_not(
    store: Store, theirs: psycopg.Connection[Any]
) -> None:
    parent, other = held(store, "parent"), held(store, "other")
    store.write_on(theirs, Batch(starts=[start("taken")]))
    first, second = parent.turn(starts=[start("taken", seed="a child's")]), other.turn(events=['{"n":1}'])
    verdicts = store.write(Batch(turns=[first, second]))
    assert [type(each).__name__ for each in verdicts] == ["Busy", "Committed"]
    theirs.rollback()
    assert type(eventually(store, Batch(turns=[first]))).__name__ == "Committed"
    assert store.run(NAMESPACE, "taken") is not None


def eventually(store: Store, batch: Batch) -> Any:
    """The verdict on the only item, as soon as it is not put off any more."""
    while True:
        [verdict] = store.write(batch)
        if not isinstance(verdict, Busy):
            return verdict


# --- through the engine


def inc(n: int) -> int:
    return n + 1


@workflow
def other(ctx: sync.Context, n: int) -> int:
    return ctx.step.run("inc", inc, n)


@workflow
def order(ctx: sync.Context, n: int) -> Any:
    return ctx.step.wait_signal("go")


@workflow
def parent(ctx: sync.Context) -> Any:
    return ctx.step.options(id="order-1").run_workflow("child", order, 1)


def test_a_webhook_that_comes_twice_stops_nobody_else(url: str, theirs: psycopg.Connection[Any]) -> None:
    with sync.Engine(url, workflows=[other, order, parent]) as engine:
        engine.options(connection=theirs, id="order-1").start(order, 1)
        again: list[str] = []
        second = threading.Thread(target=lambda: again.append(engine.options(id="order-1").start(order, 1).id))
        second.start()
        run = engine.start(parent)
        for n in range(20):
            assert engine.start(other, n).result(timeout=30) == n + 1
        assert second.is_alive()
        assert again == []
        theirs.commit()
        second.join(30)
        assert again == ["order-1"]
        with pytest.raises(RunFailed, match="order-1"):
            run.result(timeout=30)  # the id of its child belongs to another run


async def test_who_waits_too_long_is_told_what_for(
    url: str, theirs: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PATIENCE", 0.1)
    async with Engine(url, workflows=[order]) as engine:
        run = await engine.options(id="order-1").start(order, 1)
        mine = engine.sync.options(connection=theirs)
        await asyncio.to_thread(lambda: mine.options(id="order-2").start(order, 2))
        await asyncio.to_thread(lambda: mine.handle("order-1").signal("go", 1, message_id="m"))
        with pytest.raises(StoreLocked, match=r"order-2 was not written .* An open transaction has started"):
            await engine.options(id="order-2").start(order, 2)
        with pytest.raises(StoreLocked, match=r"message m was not written .* An open transaction has sent"):
            await run.signal("go", 1, message_id="m")
        theirs.rollback()
        await run.signal("go", 1)
        assert await run.result(timeout=30) == 1


async def test_why_names_the_transaction_that_keeps_a_run_from_ending(
    url: str, theirs: psycopg.Connection[Any]
) -> None:
    async with Engine(url, workflows=[order]) as engine:
        run = await engine.options(id="order-1").start(order, 1)
        assert "holds it" not in await run.why()
        mine = engine.sync.options(connection=theirs)
        await asyncio.to_thread(lambda: mine.handle("order-1").signal("go", "theirs"))
        await run.signal("go", "mine")
        assert "An open transaction holds it" in await run.why()
        theirs.rollback()
        assert await run.result(timeout=30) == "mine"
        assert "holds it" not in await run.why()
