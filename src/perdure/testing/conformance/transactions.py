"""Transactions of the store's own database: those of steps, and those of callers. Effect and record, or neither."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import pytest

from perdure.core.errors import NoTransactions, RolledBack, StoreError
from perdure.core.turn import (
    Address,
    Batch,
    Begun,
    Committed,
    Conflict,
    Duplicate,
    Existing,
    Fenced,
    Finished,
    Kept,
    MailboxFull,
    NotFound,
    Taken,
    Turn,
    Unstorable,
)
from perdure.stores.contract import OpenTransaction, Store
from perdure.testing.conformance.story import (
    EVENT,
    NAMESPACE,
    Clock,
    claimed,
    claiming,
    ended,
    everything,
    held,
    sending,
    serve,
    signal,
    start,
    started,
    starting,
    unread,
)


class TransactionPromises:
    def connect(self, store: Store) -> Any:
        """A caller's own connection to the store's database; a transaction begins with its first write."""
        raise NotImplementedError("a store with transactions is given a `connect`")

    @pytest.fixture
    def caller(self, store: Store) -> Iterator[Any]:
        """A connection of the caller's, and a table of theirs: `effects (what)`."""
        if not store.transactions:
            pytest.skip("a store without transactions")
        with closing(self.connect(store)) as connection:
            connection.execute("CREATE TABLE effects (what TEXT NOT NULL)")
            connection.commit()
            yield connection

    def effects(self, store: Store) -> list[str]:
        """What there is for somebody else."""
        with closing(self.connect(store)) as connection:
            return [what for (what,) in connection.execute("SELECT what FROM effects ORDER BY what").fetchall()]

    # --- a step's

    def test_a_store_without_transactions_refuses_both(self, store: Store) -> None:
        if store.transactions:
            return
        holder = held(store)
        with pytest.raises(NoTransactions, match="SQLite or PostgreSQL"):
            store.transaction(holder.turn())
        with pytest.raises(NoTransactions, match="SQLite or PostgreSQL"):
            store.write_on(object(), Batch(starts=[start("other")]))
        assert store.run(NAMESPACE, "other") is None
        holder.commits()

    def test_effect_and_record_are_one_commit(self, store: Store, caller: Any) -> None:
        holder = held(store)
        holder.commits(strike=True)
        before = everything(store, holder.run)
        turn = holder.turn(progress=True, waits='{"for":[]}')
        step = opened(store, turn)
        affect(step.connection, "paid")
        assert (self.effects(store), everything(store, holder.run)) == ([], before)
        step.commit([EVENT, '{"n":"ü"}'])
        assert self.effects(store) == ["paid"]
        after = holder.row
        assert (after.version, after.turn, after.status) == (before[0].version + 1, turn.id, "running")
        assert store.history(holder.run) == [*before[1], EVENT, '{"n":"ü"}']
        assert after.history_events == before[0].history_events + 2
        assert after.history_bytes == before[0].history_bytes + len(EVENT) + 10
        assert (after.owner, after.epoch, after.strikes) == (before[0].owner, before[0].epoch, 0)

    def test_what_is_rolled_back_never_happened(self, store: Store, caller: Any) -> None:
        holder = held(store)
        before = everything(store, holder.run)
        step = opened(store, holder.turn())
        affect(step.connection, "paid")
        step.roll_back()
        step.roll_back()
        assert (self.effects(store), everything(store, holder.run)) == ([], before)
        assert isinstance(step.gone, RolledBack)
        holder.commits(events=[EVENT])

    def test_a_function_that_failed_in_its_sql_leaves_nothing(self, store: Store, caller: Any) -> None:
        holder = held(store)
        step = opened(store, holder.turn())
        affect(step.connection, "paid")
        with pytest.raises(Exception, match=r"(?i)null"):
            step.connection.execute("INSERT INTO effects VALUES (NULL)")
        step.roll_back()
        assert self.effects(store) == []

    def test_steps_follow_each_other(self, store: Store, caller: Any) -> None:
        holder = held(store)
        for n in range(3):
            turn = holder.turn()
            step = opened(store, turn)
            affect(step.connection, str(n))
            step.commit([EVENT])
            holder.follows(turn)
            holder.events += 1
            holder.commits(events=[EVENT])
        assert self.effects(store) == ["0", "1", "2"]
        assert holder.row.history_events == 7

    def test_a_step_whose_fence_does_not_hold_opens_nothing(self, store: Store, caller: Any) -> None:
        holder = held(store)
        serve(store, "other")
        for wrong in ({"epoch": 7}, {"version": 7}, {"last": "another"}, {"owner": "other"}, {"owner": "unknown"}):
            assert store.transaction(holder.turn(**wrong)) == Fenced(run=holder.run)
        assert store.transaction(holder.turn(run=holder.run + 1)) == Fenced(run=holder.run + 1)
        holder.commits(events=[EVENT])

    def test_a_step_of_a_dead_worker_opens_nothing(self, store: Store, clock: Clock, caller: Any) -> None:
        slow = held(store)
        clock.advance(minutes=5)
        store.reap()
        assert store.transaction(slow.turn()) == Fenced(run=slow.run)
        quick = claimed(store, worker="quick")
        assert store.transaction(slow.turn()) == Fenced(run=slow.run)
        opened(store, quick.turn()).commit([EVENT])

    def test_a_step_that_is_written_is_not_opened_again(self, store: Store, caller: Any) -> None:
        holder = held(store)
        turn = holder.turn()
        opened(store, turn).commit([EVENT])
        after = everything(store, holder.run)
        assert store.transaction(turn) == Committed(run=holder.run)
        assert everything(store, holder.run) == after

    def test_a_step_of_a_run_that_has_ended_is_not_opened(self, store: Store, caller: Any) -> None:
        holder = held(store)
        late = holder.turn()
        holder.ends()
        assert store.transaction(late) == Fenced(run=holder.run)

    def test_a_move_that_nobody_knows_is_not_opened(self, store: Store, caller: Any) -> None:
        holder = held(store)
        assert isinstance(store.transaction(holder.turn(status="scheduled")), Unstorable)
        holder.commits()

    @pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK", "commit", "rollback"])
    def test_a_function_cannot_part_effect_and_record(self, store: Store, caller: Any, end: str) -> None:
        holder = held(store)
        step = opened(store, holder.turn())
        affect(step.connection, "paid")
        with suppress(Exception):
            step.connection.execute(end) if end.isupper() else getattr(step.connection, end)()
        with suppress(StoreError):
            step.commit([EVENT])
        step.roll_back()
        recorded = len(store.history(holder.run)) - 1
        assert len(self.effects(store)) == recorded

    def test_a_step_is_given_up_while_its_function_runs(self, store: Store, caller: Any) -> None:
        holder = held(store)
        before = everything(store, holder.run)
        step = opened(store, holder.turn())
        affect(step.connection, "paid")
        other = threading.Thread(target=step.roll_back)
        other.start()
        other.join(5)
        # The function goes on, and whatever it does now is in vain.
        with pytest.raises(Exception, match=r"\w"):
            affect(step.connection, "paid later")
        with pytest.raises(RolledBack, match="over"):
            step.commit([EVENT])
        step.roll_back()
        assert (self.effects(store), everything(store, holder.run)) == ([], before)
        holder.commits(events=[EVENT])

    def test_mail_that_came_meanwhile_is_neither_taken_nor_lost(self, store: Store, caller: Any) -> None:
        holder = held(store)
        sending(store, holder.run, "early")
        opened(store, holder.turn()).commit([EVENT])
        assert unread(store, holder.run) == ["early"]

    # --- a caller's

    def test_a_start_is_there_when_its_caller_commits(self, store: Store, caller: Any) -> None:
        serve(store)
        affect(caller, "ordered")
        [verdict] = store.write_on(caller, Batch(starts=[start("order")]))
        assert isinstance(verdict, Begun)
        assert (self.effects(store), store.run(NAMESPACE, "order"), claiming(store)) == ([], None, [])
        caller.commit()
        assert self.effects(store) == ["ordered"]
        [head] = claiming(store)
        assert (head.row.key, head.row.id, head.row.status) == (verdict.run, "order", "running")
        assert len(store.history(verdict.run)) == 1

    def test_a_start_that_its_caller_rolls_back_never_happened(self, store: Store, caller: Any) -> None:
        store.write_on(caller, Batch(starts=[start("order", idempotency_key="k", input="[[1],{}]" * 400)]))
        affect(caller, "ordered")
        caller.rollback()
        assert (self.effects(store), store.run(NAMESPACE, "order")) == ([], None)
        started(store, "order", idempotency_key="k", digest="another")

    def test_a_caller_without_a_transaction_gets_one_of_its_own(self, store: Store, caller: Any) -> None:
        store.write_on(caller, Batch(starts=[start("order")]))
        assert store.run(NAMESPACE, "order") is None
        caller.commit()
        assert store.run(NAMESPACE, "order") is not None

    def test_a_message_is_kept_when_its_caller_commits(self, store: Store, caller: Any) -> None:
        run = started(store, "order")
        to = Address(namespace=NAMESPACE, id="order")
        assert store.write_on(caller, Batch(sends=[signal(to, "gone")])) == [Kept(run=run)]
        caller.rollback()
        assert unread(store, run) == []
        assert store.write_on(caller, Batch(sends=[signal(to, "kept"), signal(run, "too")])) == [Kept(run=run)] * 2
        assert store.write_on(caller, Batch(sends=[signal(to, "kept")])) == [Duplicate(run=run)]
        assert unread(store, run) == []
        caller.commit()
        assert unread(store, run) == ["kept", "too"]

    def test_mail_of_a_caller_wakes_a_parked_run_after_the_commit(self, store: Store, caller: Any) -> None:
        holder = held(store)
        holder.parks()
        store.write_on(caller, Batch(sends=[signal(holder.run)]))
        caller.commit()
        [head] = claiming(store)
        assert [message.id for message in head.mail] == ["message"]

    def test_a_run_can_be_started_and_told_something_in_one_transaction(self, store: Store, caller: Any) -> None:
        serve(store)
        [begun] = store.write_on(caller, Batch(starts=[start("order")]))
        [kept] = store.write_on(caller, Batch(sends=[signal(Address(namespace=NAMESPACE, id="order"))]))
        assert isinstance(begun, Begun)
        assert kept == Kept(run=begun.run)
        caller.commit()
        [head] = claiming(store)
        assert len(head.mail) == 1

    def test_a_caller_gets_the_answers_of_any_write(self, store: Store, caller: Any) -> None:
        order = started(store, "order", idempotency_key="key")
        over = ended(store, "over")
        started(store, "full")
        sending(store, Address(namespace=NAMESPACE, id="full"))
        answers = [
            store.write_on(caller, Batch(starts=[one]))[0]
            for one in (
                start("order", seed="2"),
                start("order", seed="2", if_exists="fail"),
                start("order", seed="2", digest="another"),
                start("new", seed="2", idempotency_key="key"),
                start("new", seed="2", idempotency_key="key", digest="another"),
            )
        ] + store.write_on(
            caller,
            Batch(
                sends=[
                    signal(Address(namespace=NAMESPACE, id="none")),
                    signal(over),
                    signal(Address(namespace=NAMESPACE, id="full"), "m", limit=1),
                ]
            ),
        )
        full = store.run(NAMESPACE, "full")
        assert full is not None
        assert answers == [
            Existing(run=order, id="order"),
            Taken(id="order"),
            Conflict(id="order"),
            Existing(run=order, id="order"),
            Conflict(id="order", key="key"),
            NotFound(),
            Finished(run=over, status="completed"),
            MailboxFull(run=full.key, limit=1),
        ]
        affect(caller, "all the same")
        caller.commit()
        assert self.effects(store) == ["all the same"]
        assert isinstance(starting(store, "new", seed="2"), Begun)

    def test_what_cannot_be_stored_leaves_the_callers_own_work(self, store: Store, caller: Any) -> None:
        affect(caller, "mine")
        with pytest.raises(StoreError):
            store.write_on(caller, Batch(starts=[start("fine"), start("order", input='"\ud800"')]))
        caller.commit()
        assert (self.effects(store), store.run(NAMESPACE, "fine")) == (["mine"], None)

    def test_a_connection_of_another_kind_is_refused(self, store: Store, caller: Any) -> None:
        with pytest.raises(TypeError, match="connection="):
            store.write_on("sqlite:///runs.db", Batch(starts=[start("order")]))


def opened(store: Store, turn: Turn) -> OpenTransaction:
    """The open transaction of a step whose fence holds."""
    step = store.transaction(turn)
    assert not isinstance(step, (Committed, Fenced, Unstorable)), step
    return step  # type: ignore[return-value]  # no verdict, so a transaction


def affect(connection: Any, what: str) -> None:
    connection.execute(f"INSERT INTO effects VALUES ('{what}')")
