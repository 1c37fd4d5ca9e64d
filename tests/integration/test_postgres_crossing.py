"""Many writers on one PostgreSQL store: nothing waits for ever, nothing is lost, nothing is done twice."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from msgspec.structs import replace

from perdure.core.errors import StoreError
from perdure.core.turn import (
    Address,
    Batch,
    Begun,
    Busy,
    Claim,
    Committed,
    Finished,
    Kept,
    MoreMail,
    Retention,
    Send,
    Unstorable,
)
from perdure.stores.postgres import PostgresStore, pipe
from perdure.testing.conformance.story import EVENT, NAMESPACE, announce, held, sending, start, started, unread
from tests import servers

Open = Callable[[], PostgresStore]


@pytest.fixture(scope="module", params=servers.versions())
def database(request: pytest.FixtureRequest) -> servers.Database:
    return servers.needed(request.param)


@pytest.fixture
def schema(database: servers.Database) -> Iterator[str]:
    with servers.schema(database) as schema:
        yield schema


@pytest.fixture
def opened(database: servers.Database, schema: str) -> Iterator[Open]:
    """Opens the same store again and again, as other processes would."""
    stores: list[PostgresStore] = []

    def opened() -> PostgresStore:
        stores.append(PostgresStore(database.url, schema=schema))
        return stores[-1]

    yield opened
    for store in stores:
        store.close()


def test_what_is_too_long_for_an_index_is_refused_alone(opened: Open) -> None:
    store = opened()
    letters = "".join(chr(0x20000 + number) for number in range(255))
    begins = {"workflow": letters, "idempotency_scope": letters, "idempotency_key": letters[::-1]}
    bad = replace(start("bad"), namespace=letters[1:], **begins)
    with pytest.raises(StoreError, match="cannot be stored") as raised:
        store.write(Batch(starts=[start("good"), bad]))
    assert raised.value.of_one_item
    holder, other = held(store, "parent"), held(store, "other")
    turns = [holder.turn(starts=[bad]), other.turn()]
    assert [type(verdict) for verdict in store.write(Batch(turns=turns))] == [Unstorable, Committed]


def test_racing_claims_share_the_runs(opened: Open) -> None:
    first, second = opened(), opened()
    runs = {started(first, f"run-{n}") for n in range(300)}
    taken: dict[str, list[int]] = {}

    def claims(name: str, store: PostgresStore) -> None:
        announce(store, name)
        mine = taken[name] = []
        while len(taken.get("a", ())) + len(taken.get("b", ())) < len(runs):
            claim = Claim(incarnation=name, namespace=NAMESPACE, queues=["default"], workflows=["orders"], limit=7)
            mine += [head.row.key for head in store.claim(claim)]

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(claims, "a", first), pool.submit(claims, "b", second)]:
            done.result(30)
    assert sorted(taken["a"] + taken["b"]) == sorted(runs)
    assert min(map(len, taken.values())) > 0, "one of them got nothing at all"


def test_crossing_sends_and_ends_leave_no_deadlock_and_no_orphan(opened: Open) -> None:
    """Each of two workers ends its own runs and sends to those of the other, which ends them meanwhile."""
    stores = {"a": opened(), "b": opened()}
    holders = {name: [held(store, f"{name}-{n}", name) for n in range(40)] for name, store in stores.items()}
    kept: list[tuple[int, str]] = []
    ids = itertools.count()
    until = time.monotonic() + 3
    failed: list[BaseException] = []

    def works(mine: str, other: str) -> None:
        try:
            store = stores[mine]
            live = list(holders[mine])
            while live and time.monotonic() < until:
                sends = [
                    Send(to=holder.run, id=f"{mine}-{next(ids)}", kind="signal") for holder in holders[other][::-1][:12]
                ]
                turns = [holder.turn(events=[EVENT]) for holder in live[:6]] + [
                    holder.ending(consumed=unread(store, holder.run)) for holder in live[-2:] if len(live) > 8
                ]
                verdicts = store.write(Batch(sends=sends, turns=turns))
                kept.extend(
                    (verdict.run, send.id)
                    for send, verdict in zip(sends, verdicts, strict=False)
                    if isinstance(verdict, Kept)
                )
                by_run = {holder.run: holder for holder in live}
                for turn, verdict in zip(turns, verdicts[len(sends) :], strict=True):
                    assert isinstance(verdict, (Committed, MoreMail, Busy)), verdict
                    if isinstance(verdict, Committed):
                        by_run[turn.run].follows(turn)
                        if turn.closing:
                            live = [holder for holder in live if holder.run != turn.run]
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=works, args=pair) for pair in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failed == []
    store = stores["a"]
    ended = {run for run in (holder.run for some in holders.values() for holder in some) if store.ended([run])}
    assert len(ended) > 10
    # A run that has ended has read all that was kept for it.
    assert {run: unread(store, run) for run in ended} == {run: [] for run in ended}


def test_starts_that_share_ids_wait_for_each_other_and_never_in_a_circle(opened: Open) -> None:
    from perdure.testing.conformance.story import start

    stores = [opened(), opened()]
    names = [f"run-{n}" for n in range(200)]
    begun: list[str] = []

    def starts(store: PostgresStore, order: list[str], seed: str) -> None:
        for at in range(0, len(order), 20):
            batch = [start(id, seed=f"{seed} {id}", idempotency_key=f"key of {id}") for id in order[at : at + 20]]
            begun.extend(v.id for v in store.write(Batch(starts=batch)) if isinstance(v, Begun))

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(starts, stores[0], names, "a"), pool.submit(starts, stores[1], names[::-1], "b")]:
            done.result(30)
    assert sorted(begun) == sorted(names)
    assert stores[0].counts(NAMESPACE) == {"ready": 200}


def test_an_open_transaction_that_has_signalled_delays_only_the_end(opened: Open, database: servers.Database) -> None:
    store = opened()
    holder = held(store)
    with psycopg.connect(database.url) as caller:
        assert store.write_on(caller, Batch(sends=[Send(to=holder.run, id="m", kind="signal")])) == [
            Kept(run=holder.run)
        ]
        began = time.monotonic()
        for _ in range(5):
            holder.commits(events=[EVENT])
        holder.commits(status="ready", release=True)
        [head] = claims_as(store, "worker")
        holder.epoch = head.row.epoch
        assert holder.writes(holder.ending()) == Busy(run=holder.run)
        assert time.monotonic() - began < 5, "something waited for the caller"
        other = held(store, "other")
        verdicts = store.write(Batch(turns=[holder.ending(), other.ending()]))
        assert verdicts == [Busy(run=holder.run), Committed(run=other.run)]
        caller.commit()
    assert holder.writes(holder.ending()) == MoreMail(run=holder.run)
    assert holder.writes(holder.ending(consumed=["m"])) == Committed(run=holder.run)


def test_a_message_for_a_run_that_ends_beside_it_is_refused(opened: Open) -> None:
    store = opened()
    holder = held(store)
    [sent, ended] = store.write(Batch(sends=[Send(to=holder.run, id="m", kind="signal")], turns=[holder.ending()]))
    assert (sent, ended) == (Finished(run=holder.run, status="completed"), Committed(run=holder.run))


def test_mail_that_arrives_while_its_run_is_parked_wakes_it(opened: Open, database: servers.Database) -> None:
    """The sender has looked when the run was still owned; it commits when nobody owns it any more."""
    store = opened()
    holder = held(store)
    with psycopg.connect(database.url) as caller:
        store.write_on(caller, Batch(sends=[Send(to=holder.run, id="m", kind="signal")]))
        holder.parks()
        assert claims_as(store, "worker") == []
        caller.commit()
    [head] = claims_as(store, "worker")
    assert [message.id for message in head.mail] == ["m"]


def test_another_process_is_told(opened: Open) -> None:
    writer, waiter = opened(), opened()
    announce(waiter, "waiter")
    until = time.monotonic() + 10
    while waiter._listener is None or waiter._listener.backend is None:
        assert time.monotonic() < until
        time.sleep(0.01)
    for _ in range(20):
        if not waiter.wait("waiter", ["default"], 0):
            break
    count = waiter._bell.count
    run = started(writer)
    sending(writer, run)
    while waiter._bell.count == count:
        assert time.monotonic() < until, "no notification came"
        time.sleep(0.005)


def claims_as(store: PostgresStore, name: str) -> list:  # type: ignore[type-arg]  # heads
    return store.claim(Claim(incarnation=name, namespace=NAMESPACE, queues=["default"], workflows=["orders"]))


def test_a_new_owner_hears_of_mail_that_was_at_rest(opened: Open) -> None:
    store = opened()
    run = started(store)
    sending(store, run, "early")
    announce(store)
    [head] = claims_as(store, "worker")
    assert [message.id for message in head.mail] == ["early"]
    assert [message.id for message in store.mail("worker")] == ["early"]


def test_a_message_holds_its_run_also_if_that_was_started_since_its_target_was_looked_for(
    opened: Open, database: servers.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened()
    execute = pipe.execute
    begun: list[Any] = []

    def between(connection: Any, call: Any) -> Any:
        if call.statement.name == "put_mail":
            begun.append(held(store, "late"))
        return execute(connection, call)

    monkeypatch.setattr("perdure.stores.postgres.borrowed.execute", between)
    with psycopg.connect(database.url) as caller:
        caller.execute("SELECT 1")
        send = Send(to=Address(namespace=NAMESPACE, id="late"), id="m", kind="signal")
        [kept] = store.write_on(caller, Batch(sends=[send]))
        [holder] = begun
        assert kept == Kept(run=holder.run)
        assert holder.writes(holder.ending()) == Busy(run=holder.run)
        caller.commit()
    assert holder.writes(holder.ending()) == MoreMail(run=holder.run)


def test_a_prune_and_a_start_of_the_same_key_and_id_never_wait_in_a_circle(
    opened: Open, database: servers.Database
) -> None:
    store = opened()
    key: dict[str, Any] = {"idempotency_scope": "orders", "idempotency_key": "k", "idempotency_until": 1}
    holder = held(store, **key)
    holder.ends()
    asked = Retention(namespace=NAMESPACE, ended_before=store.now() + 1)
    with psycopg.connect(database.url) as starter, ThreadPoolExecutor(1) as pool:
        # A start takes the key first, and then the id; so does a prune, which waits for the key here.
        schema = store._schema
        starter.execute(f"UPDATE {schema}.idempotency SET expires_at = expires_at".encode())
        pruned = pool.submit(store.prune, asked)
        blocked = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'"
        with psycopg.connect(database.url, autocommit=True) as looks:
            while looks.execute(blocked).fetchone() == (0,):
                assert not pruned.done()
        [verdict] = store.write_on(starter, Batch(starts=[start(seed="another", **key)]))
        starter.commit()
        assert pruned.result(timeout=30).runs == 1
    assert verdict is not None
