"""Workers: leases, death, retirement, and being told that there is something to do."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from perdure.core.errors import StoreError
from perdure.core.turn import Announced, Batch, Claim, Committed, Fenced, Lease, Reaped
from perdure.stores.contract import Store
from perdure.testing.conformance.story import (
    EVENT,
    NAMESPACE,
    SECOND,
    TTL,
    Clock,
    Holder,
    announce,
    answers,
    claimed,
    claiming,
    held,
    row,
    sending,
    serve,
    signal,
    started,
    unread,
    without_code,
)


class WorkerPromises:
    # --- leases

    def test_a_heartbeat_keeps_the_lease(self, store: Store, clock: Clock) -> None:
        serve(store)
        clock.advance(seconds=5)
        assert store.heartbeat("worker") == Lease(now=clock(), until=clock() + TTL)

    def test_who_was_never_announced_has_no_lease(self, store: Store) -> None:
        assert store.heartbeat("nobody") is None

    def test_who_beats_lives(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        for _ in range(10):
            clock.advance(seconds=10)
            assert store.heartbeat("worker") is not None
            assert store.reap() == Reaped()
        assert holder.writes(holder.turn()) == Committed(run=holder.run)

    def test_who_stops_beating_is_reaped(self, store: Store, clock: Clock) -> None:
        held(store)
        clock.advance(seconds=16)
        assert store.reap() == Reaped(workers=1, runs=1)

    def test_who_is_late_and_beats_before_the_reaper_comes_lives(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        clock.advance(minutes=1)
        assert store.heartbeat("worker") is not None
        assert store.reap() == Reaped()
        assert holder.writes(holder.turn()) == Committed(run=holder.run)

    # --- death

    def test_the_reaped_are_dead_for_ever(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        clock.advance(minutes=1)
        store.reap()
        assert store.heartbeat("worker") is None
        assert holder.writes(holder.turn()) == Fenced(run=holder.run)
        assert claiming(store) == []
        with pytest.raises(StoreError):
            serve(store)
        assert store.heartbeat("worker") is None

    def test_a_running_run_of_the_dead_is_ready_with_a_strike(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        before = holder.commits(wake_at=clock() + 600 * SECOND, waits='{"x":1}')
        clock.advance(minutes=1)
        store.reap()
        after = holder.row
        assert (after.status, after.owner, after.strikes) == ("ready", None, before.strikes + 1)
        assert (after.epoch, after.version, after.turn) == (before.epoch + 1, before.version, before.turn)
        assert (after.wake_at, after.waits) == (before.wake_at, before.waits)

    def test_a_waiting_run_of_the_dead_only_loses_its_owner(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        before = holder.commits(status="waiting", wake_at=clock() + 600 * SECOND)
        clock.advance(minutes=1)
        assert store.reap() == Reaped(workers=1, runs=1)
        after = holder.row
        assert (after.status, after.owner, after.strikes) == ("waiting", None, 0)
        assert (after.epoch, after.wake_at) == (before.epoch + 1, before.wake_at)
        serve(store, "other")
        assert claiming(store, "other") == []

    def test_a_waiting_run_of_the_dead_wakes_for_its_mail(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        holder.commits(status="waiting")
        sending(store, holder.run)
        clock.advance(minutes=1)
        store.reap()
        assert claimed(store, "other").run == holder.run

    def test_a_waiting_run_of_the_dead_wakes_at_its_time(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        holder.commits(status="waiting", wake_at=clock() + 30 * SECOND)
        clock.advance(minutes=1)
        store.reap()
        assert claimed(store, "other").run == holder.run

    def test_a_released_run_is_not_touched_by_its_last_owners_death(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        before = holder.parks()
        clock.advance(minutes=1)
        assert store.reap() == Reaped(workers=1, runs=0)
        assert holder.row == before

    def test_the_living_keep_their_runs(self, store: Store, clock: Clock) -> None:
        dead, living = held(store, "1", "dead"), held(store, "2", "living")
        clock.advance(seconds=10)
        store.heartbeat("living")
        clock.advance(seconds=10)
        assert store.reap() == Reaped(workers=1, runs=1)
        assert dead.row.owner is None
        assert living.writes(living.turn()) == Committed(run=living.run)

    def test_reaping_twice_is_reaping_once(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        clock.advance(minutes=1)
        store.reap()
        before = holder.row
        assert store.reap() == Reaped()
        assert holder.row == before

    def test_a_reap_hands_back_no_more_than_its_limit(self, store: Store, clock: Clock) -> None:
        holders = [held(store, str(n)) for n in range(5)]
        clock.advance(minutes=1)
        assert [store.reap(limit=2).runs for _ in range(4)] == [2, 2, 1, 0]
        assert {holder.row.status for holder in holders} == {"ready"}
        assert {holder.row.strikes for holder in holders} == {1}

    def test_the_dead_commit_nothing_while_their_runs_are_handed_back(self, store: Store, clock: Clock) -> None:
        holders = [held(store, str(n)) for n in range(3)]
        clock.advance(minutes=1)
        store.reap(limit=1)
        assert store.heartbeat("worker") is None
        for holder in holders:
            assert holder.writes(holder.turn(events=[EVENT])) == Fenced(run=holder.run)

    def test_the_dead_leave_the_runs_of_other_namespaces_too(self, store: Store, clock: Clock) -> None:
        serve(store, "abroad", namespace="elsewhere")
        run = started(store, namespace="elsewhere", owner="abroad")
        clock.advance(minutes=1)
        store.reap()
        assert row(store, run).status == "ready"

    def test_three_deaths_are_proof(self, store: Store, clock: Clock) -> None:
        run = started(store)
        for strikes in range(3):
            assert claimed(store, f"worker-{strikes}", alone=True).row.strikes == strikes
            clock.advance(minutes=1)
            store.reap()
        serve(store, "last")
        assert claiming(store, "last", alone=True) == []
        assert [row.key for row in store.overdue()] == [run]
        assert answers(store, turns=[without_code(store, run, "quarantined")]) == [Committed(run=run)]
        assert store.overdue() == []

    # --- retirement

    def test_who_retires_hands_its_runs_back_at_once(self, store: Store) -> None:
        holder = held(store)
        before = holder.row
        assert store.retire("worker") == 1
        after = holder.row
        assert (after.status, after.owner, after.strikes, after.version) == ("ready", None, 0, before.version)
        assert claimed(store, "other").run == holder.run

    def test_the_waiting_runs_of_the_retired_go_on_waiting(self, store: Store) -> None:
        running, waiting = held(store, "1"), held(store, "2")
        waiting.commits(status="waiting")
        assert store.retire("worker") == 2
        assert (running.row.status, waiting.row.status) == ("ready", "waiting")
        assert (running.row.owner, waiting.row.owner) == (None, None)

    def test_the_retired_are_dead_for_ever(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        store.retire("worker")
        assert store.heartbeat("worker") is None
        assert holder.writes(holder.turn()) == Fenced(run=holder.run)
        assert claiming(store) == []
        with pytest.raises(StoreError):
            serve(store)

    def test_retiring_twice_is_retiring_once(self, store: Store, clock: Clock) -> None:
        held(store)
        assert [store.retire("worker"), store.retire("worker"), store.retire("nobody")] == [1, 0, 0]
        clock.advance(minutes=1)
        assert store.reap() == Reaped()

    def test_who_retires_leaves_others_their_runs(self, store: Store) -> None:
        holder = held(store, worker="other")
        serve(store)
        assert store.retire("worker") == 0
        assert holder.writes(holder.turn()) == Committed(run=holder.run)

    # --- what readers hear of workers

    def test_a_living_worker_has_a_name(self, store: Store) -> None:
        serve(store, name="fast-7")
        assert store.worker("worker") == "fast-7"
        assert store.worker("nobody") is None

    def test_the_dead_have_no_name(self, store: Store, clock: Clock) -> None:
        serve(store, "retired")
        store.retire("retired")
        serve(store, "expired")
        clock.advance(minutes=1)
        assert (store.worker("retired"), store.worker("expired")) == (None, None)

    def test_what_was_ever_announced_is_known(self, store: Store) -> None:
        orders = Announced(name="orders", queue="slow", signature={"parameters": ["order"]})
        charge = Announced(name="charge", kind="activity")
        serve(store, serves=[orders, charge])
        assert by_name(store) == {
            "orders": replace(orders, queues=("default",)),
            "charge": replace(charge, queues=("default",)),
        }
        store.retire("worker")
        assert {name: served.live for name, served in by_name(store).items()} == {"orders": False, "charge": False}

    def test_a_clock_that_went_back_after_the_announcement_makes_no_lease_longer(
        self, store: Store, clock: Clock
    ) -> None:
        serve(store, "worker")
        clock.advance(seconds=-7)
        assert store.heartbeat("worker") == Lease(now=clock(), until=clock() + TTL)
        clock.advance(seconds=16)
        assert store.reap() == Reaped(workers=1)

    def test_the_queues_from_which_the_living_take_are_known(self, store: Store) -> None:
        serve(store, "one", queues=["slow", "default"])
        serve(store, "two", queues=["default", "fast"])
        serve(store, "other", workflows=["returns"], queues=["other"])
        assert by_name(store)["orders"].queues == ("default", "fast", "slow")
        store.retire("two")
        assert by_name(store)["orders"].queues == ("default", "slow")
        store.retire("one")
        assert by_name(store)["orders"].queues == ()

    def test_what_was_announced_last_is_true(self, store: Store) -> None:
        serve(store, "old", serves=[Announced(name="orders", signature=1)])
        serve(store, "new", serves=[Announced(name="orders", signature=2)])
        assert [served.signature for served in store.announced(NAMESPACE)] == [2]

    def test_what_a_worker_serves_no_longer_is_known_but_not_live(self, store: Store) -> None:
        serve(store, workflows=["orders", "returns"])
        announce(store, workflows=["orders"])
        assert {name: served.live for name, served in by_name(store).items()} == {"orders": True, "returns": False}

    def test_what_one_of_two_serves_is_live(self, store: Store, clock: Clock) -> None:
        serve(store, "living")
        serve(store, "retired")
        serve(store, "expired", workflows=["orders", "returns"])
        store.retire("retired")
        clock.advance(seconds=10)
        store.heartbeat("living")
        clock.advance(seconds=10)
        assert {name: served.live for name, served in by_name(store).items()} == {"orders": True, "returns": False}

    def test_announcements_belong_to_their_namespace(self, store: Store) -> None:
        serve(store, "here")
        assert store.announced("elsewhere") == []
        serve(store, "there", namespace="elsewhere")
        store.retire("here")
        assert by_name(store)["orders"].live is False

    # --- being told

    def test_a_start_ends_a_wait(self, store: Store) -> None:
        serve(store)
        assert waited(store, lambda: started(store))

    def test_mail_for_a_parked_run_ends_a_wait(self, store: Store) -> None:
        holder = held(store)
        holder.parks()
        assert waited(store, lambda: sending(store, holder.run))

    def test_mail_for_a_run_of_its_own_ends_a_wait(self, store: Store) -> None:
        holder = held(store)
        assert waited(store, lambda: sending(store, holder.run))

    def test_a_turns_message_ends_a_wait(self, store: Store) -> None:
        holder, sender = held(store), held(store, "sender", "other")
        assert waited(store, lambda: sender.commits(sends=[signal(holder.run)]))

    def test_a_run_handed_back_ends_a_wait(self, store: Store) -> None:
        held(store, worker="other")
        serve(store)
        assert waited(store, lambda: store.retire("other"))

    def test_a_reaped_run_ends_a_wait(self, store: Store, clock: Clock) -> None:
        held(store, worker="other")
        clock.advance(minutes=1)
        serve(store)
        assert waited(store, lambda: store.reap())

    def test_a_timer_that_comes_due_ends_a_wait(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        holder.parks(wake_at=clock() + SECOND // 5)
        assert waited(store, lambda: clock.advance(seconds=1))

    def test_a_call_ends_a_wait(self, store: Store) -> None:
        serve(store)
        assert waited(store, store.wake)

    def test_what_came_before_the_wait_is_not_lost(self, store: Store) -> None:
        serve(store)
        quiet(store)
        started(store)
        began = time.monotonic()
        assert store.wait("worker", ["default"], 30)
        assert time.monotonic() - began < 20

    def test_a_wait_ends_after_its_time(self, store: Store) -> None:
        serve(store)
        quiet(store)
        began = time.monotonic()
        store.wait("worker", ["default"], 0.05)
        assert time.monotonic() - began < 20

    # --- threads

    def test_readers_may_read_while_one_thread_writes(self, store: Store) -> None:
        holder = held(store)
        done = threading.Event()
        seen: list[int] = []
        failed: list[BaseException] = []

        def reads() -> None:
            try:
                while not done.is_set():
                    seen.append(len(store.history(holder.run)))
                    store.mail("worker")
                    store.heartbeat("worker")
            except BaseException as error:
                failed.append(error)

        readers = [threading.Thread(target=reads) for _ in range(3)]
        for reader in readers:
            reader.start()
        for _ in range(50):
            holder.commits(events=[EVENT, EVENT])
        done.set()
        for reader in readers:
            reader.join()
        assert failed == []
        assert {count % 2 for count in seen} <= {1}, "a reader has seen half a commit"

    # --- the end of a store

    def test_closing_twice_is_closing_once(self, store: Store) -> None:
        store.close()
        store.close()

    def test_a_closed_store_answers_nothing(self, store: Store) -> None:
        run = started(store)
        serve(store)
        store.close()
        for call in (
            lambda: store.write(Batch()),
            lambda: store.history(run),
            lambda: store.rows([run]),
            lambda: store.run(NAMESPACE, "run"),
            lambda: store.reap(),
            lambda: store.heartbeat("worker"),
            lambda: store.claim(Claim(incarnation="worker", namespace=NAMESPACE, queues=[], workflows=[])),
        ):
            with pytest.raises(StoreError):
                call()

    # --- what outlives the process

    def reopen(self, store: Store) -> Store | None:
        """Close the store and open it again, as another process would; None if nothing is left of it then."""
        return None

    def test_what_was_acknowledged_is_there_in_the_next_life(self, store: Store) -> None:
        holder = held(store, idempotency_key="k")
        sending(store, holder.run, "a")
        sending(store, holder.run, "b")
        holder.commits(events=[EVENT], consumed=["a"], waits='{"x":1}')
        started(store, "free", queue="slow")
        before = row(store, holder.run), store.history(holder.run), store.mailbox(holder.run)
        again = self.reopen(store)
        if again is None:
            pytest.skip("this store does not outlive its process")
        try:
            assert (row(again, holder.run), again.history(holder.run), again.mailbox(holder.run)) == before
            assert unread(again, holder.run) == ["b"]
            assert again.counts(NAMESPACE) == {"running": 1, "ready": 1}
            assert sending(again, holder.run, "a") != sending(again, holder.run, "c")
            assert started(again, "new") not in (holder.run, 0)
        finally:
            again.close()

    def test_the_dead_stay_dead_in_the_next_life(self, store: Store) -> None:
        holder = held(store)
        store.retire("worker")
        again = self.reopen(store)
        if again is None:
            pytest.skip("this store does not outlive its process")
        try:
            assert again.heartbeat("worker") is None
            late = Holder(again, row(again, holder.run)).turn(owner="worker")
            assert answers(again, turns=[late]) == [Fenced(run=holder.run)]
        finally:
            again.close()


def by_name(store: Store) -> dict[str, Announced]:
    return {served.name: served for served in store.announced(NAMESPACE)}


def quiet(store: Store) -> None:
    """Let the worker hear of all that has happened; a hint may be wrong, so not for ever."""
    for _ in range(20):
        if not store.wait("worker", ["default"], 0):
            return


def waited(store: Store, act: Callable[[], object]) -> bool:
    """Whether a wait in another thread, with a long time to go, ends soon after this act."""
    quiet(store)
    waiting = threading.Event()
    ended = threading.Event()

    def wait() -> None:
        waiting.set()
        store.wait("worker", ["default"], 60)
        ended.set()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    waiting.wait()
    act()
    soon = ended.wait(20)
    if not soon:
        store.wake()
    thread.join(70)
    return soon
