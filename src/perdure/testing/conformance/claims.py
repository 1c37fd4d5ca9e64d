"""Claims: what can be had, by whom, in which order."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from perdure.core.turn import Claim, Committed, Fenced, Head, ParentLink
from perdure.stores.contract import Store
from perdure.testing.conformance.story import (
    EVENT,
    NAMESPACE,
    SECOND,
    Clock,
    Holder,
    announce,
    answers,
    claimed,
    claiming,
    ended,
    held,
    row,
    sending,
    serve,
    signal,
    start,
    started,
    unread,
    without_code,
)


class ClaimPromises:
    # --- what a claim does

    def test_a_claimed_run_is_running_in_the_hands_of_the_claimer(self, store: Store, clock: Clock) -> None:
        run = started(store)
        before = row(store, run)
        serve(store)
        clock.advance(seconds=1)
        [head] = claiming(store)
        assert (head.row.key, head.row.status, head.row.owner) == (run, "running", "worker")
        assert (head.row.epoch, head.row.version, head.row.turn) == (before.epoch + 1, before.version, before.turn)
        assert (head.row.created_at, head.row.started_at) == (before.created_at, clock())
        assert head == Head(row=row(store, run))

    def test_a_claimer_may_commit(self, store: Store) -> None:
        started(store)
        holder = claimed(store)
        assert holder.writes(holder.turn(events=[EVENT])) == Committed(run=holder.run)

    def test_a_run_is_claimed_once(self, store: Store) -> None:
        started(store)
        serve(store, "other")
        claimed(store, "worker")
        assert claiming(store, "other") == []
        assert claiming(store, "worker") == []

    def test_every_run_goes_to_one_claimer(self, store: Store) -> None:
        runs = [started(store, f"run-{n}") for n in range(50)]
        serve(store, "a")
        serve(store, "b")
        taken = [head.row.key for _ in range(10) for who in "ab" for head in claiming(store, who, limit=3)]
        assert sorted(taken) == sorted(runs)

    def test_each_claim_of_a_run_has_a_greater_epoch(self, store: Store) -> None:
        started(store)
        epochs = []
        for _ in range(4):
            holder = claimed(store)
            epochs.append(holder.epoch)
            holder.commits(status="ready", release=True)
        assert epochs == sorted(set(epochs))

    def test_a_run_began_when_it_was_claimed_first(self, store: Store, clock: Clock) -> None:
        started(store)
        clock.advance(seconds=1)
        began = clock()
        claimed(store).commits(status="ready", release=True)
        clock.advance(seconds=1)
        assert claimed(store).row.started_at == began

    def test_a_claim_keeps_the_time_of_the_next_timer(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        due = clock() + 60 * SECOND
        holder.parks(wake_at=due, waits='{"sleep":1}')
        sending(store, holder.run)
        after = claimed(store).row
        assert (after.wake_at, after.waits) == (due, '{"sleep":1}')

    def test_a_claim_brings_the_unread_mail_in_order(self, store: Store) -> None:
        run, other = started(store, "1"), started(store, "2")
        for id in "bca":
            sending(store, run, id)
        sending(store, other, "x")
        serve(store)
        one, two = claiming(store)
        assert [message.id for message in one.mail] == ["b", "c", "a"]
        assert [message.id for message in two.mail] == ["x"]
        assert list(one.mail) == store.mailbox(run)

    def test_a_claim_does_not_bring_consumed_mail(self, store: Store) -> None:
        holder = held(store)
        sending(store, holder.run, "a")
        sending(store, holder.run, "b")
        holder.parks(consumed=["a"])
        [head] = claiming(store)
        assert [message.id for message in head.mail] == ["b"]

    # --- by whom

    def test_a_claim_takes_only_what_its_worker_serves(self, store: Store) -> None:
        serve(store)
        started(store, "another workflow", workflow="returns")
        started(store, "another queue", queue="slow")
        started(store, "another namespace", namespace="elsewhere")
        started(store, "an activity of that name", kind="activity", event="")
        run = started(store, "mine")
        assert [head.row.key for head in claiming(store)] == [run]

    def test_a_claim_takes_from_all_its_queues_and_workflows(self, store: Store) -> None:
        serve(store)
        runs = [
            started(store, "1", workflow="returns", queue="slow"),
            started(store, "2"),
            started(store, "3", kind="activity", workflow="charge", event=""),
        ]
        heads = claiming(
            store, queues=["default", "slow"], workflows=["orders", "returns"], activities=["charge", "ship"]
        )
        assert [head.row.key for head in heads] == runs

    def test_an_activity_is_claimed_by_its_name(self, store: Store) -> None:
        serve(store)
        started(store, "a workflow of that name", workflow="charge")
        run = started(store, "mine", kind="activity", workflow="charge", event="")
        assert [head.row.key for head in claiming(store, workflows=[], activities=["charge"])] == [run]

    def test_who_serves_nothing_gets_nothing(self, store: Store) -> None:
        serve(store)
        started(store)
        assert claiming(store, workflows=[]) == []
        assert claiming(store, queues=[]) == []

    def test_the_dead_claim_nothing(self, store: Store) -> None:
        run = started(store)
        serve(store, "dead")
        store.retire("dead")
        assert claiming(store, "dead") == []
        assert claiming(store, "never announced") == []
        assert row(store, run).owner is None

    # --- in which order

    def test_the_most_urgent_comes_first_and_the_oldest_among_equals(self, store: Store) -> None:
        serve(store)
        for id, priority in [("c", 0), ("e", -1), ("a", 9), ("d", 0), ("b", 9)]:
            started(store, id, priority=priority)
        assert [head.row.id for _ in range(5) for head in claiming(store, limit=1)] == ["a", "b", "c", "d", "e"]

    def test_one_claim_is_in_order_too(self, store: Store) -> None:
        serve(store)
        for id, priority in [("c", 0), ("e", -1), ("a", 9), ("d", 0), ("b", 9)]:
            started(store, id, priority=priority)
        assert [head.row.id for head in claiming(store, limit=4)] == ["a", "b", "c", "d"]

    def test_the_order_holds_over_queues_and_workflows(self, store: Store) -> None:
        serve(store)
        started(store, "c", queue="slow")
        started(store, "a", workflow="returns", priority=2)
        started(store, "b", queue="slow", workflow="returns", priority=1)
        started(store, "d")
        heads = claiming(store, queues=["default", "slow"], workflows=["orders", "returns"])
        assert [head.row.id for head in heads] == ["a", "b", "c", "d"]

    # --- how many

    def test_a_claim_takes_no_more_than_its_limit(self, store: Store) -> None:
        serve(store)
        for n in range(5):
            started(store, str(n))
        assert [len(claiming(store, limit=limit)) for limit in (0, 2, 2, 2)] == [0, 2, 2, 1]

    def test_one_run_always_fits(self, store: Store) -> None:
        serve(store)
        for n in range(3):
            started(store, str(n), event=f'"{"x" * 10_000}"')
        assert [len(claiming(store, max_bytes=0)) for _ in range(4)] == [1, 1, 1, 0]

    def test_a_claim_takes_histories_near_its_budget(self, store: Store) -> None:
        serve(store)
        for n in range(10):
            started(store, str(n), event=f'"{"x" * 10_000}"')
        heads = claiming(store, max_bytes=35_000)
        assert 1 <= len(heads) <= 4
        assert len(claiming(store)) == 10 - len(heads)

    def test_mail_counts_for_the_budget_too(self, store: Store) -> None:
        serve(store)
        for n in range(10):
            sending(store, started(store, str(n)), data=f'"{"x" * 10_000}"')
        assert 1 <= len(claiming(store, max_bytes=35_000)) <= 4

    # --- what is there to be had

    def test_a_scheduled_run_is_claimed_at_its_time_and_not_before(self, store: Store, clock: Clock) -> None:
        run = started(store, start_at=clock() + 60 * SECOND)
        serve(store)
        clock.advance(seconds=59, milliseconds=999)
        store.heartbeat("worker")
        assert claiming(store) == []
        clock.advance(milliseconds=1)
        assert claimed(store).run == run

    @pytest.mark.parametrize("status", ["waiting", "blocked"])
    def test_a_run_is_claimed_when_its_timer_is_due_and_not_before(
        self, store: Store, clock: Clock, status: str
    ) -> None:
        holder = held(store)
        holder.commits(status=status, release=True, wake_at=clock() + 10 * SECOND)
        clock.advance(seconds=9)
        assert claiming(store) == []
        clock.advance(seconds=1)
        assert claimed(store).run == holder.run

    def test_a_run_that_waits_for_nothing_in_time_is_not_claimed(self, store: Store, clock: Clock) -> None:
        held(store).parks()
        clock.advance(days=1)
        serve(store, "other")
        assert claiming(store, "other") == []

    def test_a_timer_that_is_already_due_when_a_run_is_parked_is_not_lost(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        holder.parks(wake_at=clock() - SECOND)
        assert claimed(store).run == holder.run

    def test_mail_wakes_a_waiting_run(self, store: Store) -> None:
        holder = held(store)
        holder.parks()
        assert claiming(store) == []
        sending(store, holder.run)
        assert claimed(store).run == holder.run

    def test_mail_that_came_before_it_was_parked_wakes_it_too(self, store: Store) -> None:
        holder = held(store)
        sending(store, holder.run)
        holder.parks()
        assert claimed(store).run == holder.run

    def test_mail_does_not_take_a_run_from_its_owner(self, store: Store) -> None:
        holder = held(store)
        holder.commits(status="waiting")
        serve(store, "other")
        sending(store, holder.run)
        assert claiming(store, "other") == []

    def test_mail_does_not_wake_a_blocked_run(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        sending(store, holder.run, "a")
        holder.commits(status="blocked", release=True, wake_at=clock() + SECOND)
        sending(store, holder.run, "b")
        assert claiming(store) == []
        clock.advance(seconds=1)
        assert claimed(store).run == holder.run

    def test_mail_does_not_start_a_scheduled_run(self, store: Store, clock: Clock) -> None:
        run = started(store, start_at=clock() + SECOND)
        serve(store)
        sending(store, run)
        assert claiming(store) == []

    def test_a_scheduled_run_can_be_cancelled_before_its_time(self, store: Store, clock: Clock) -> None:
        run = started(store, start_at=clock() + SECOND)
        sending(store, run, kind="cancel")
        assert claimed(store).run == run

    def test_ended_runs_are_not_claimed(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        sending(store, holder.run)
        holder.ends(forced=True, wake_at=clock())
        clock.advance(seconds=1)
        assert claiming(store) == []

    def test_quarantined_runs_are_not_claimed(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        answers(store, turns=[without_code(store, holder.run, "quarantined", wake_at=clock())])
        sending(store, holder.run)
        clock.advance(seconds=1)
        assert claiming(store) == []

    def test_a_new_child_can_be_claimed(self, store: Store) -> None:
        parent = held(store, "parent")
        parent.commits(starts=[start("child", parent=ParentLink(run=parent.run, step="step"))])
        assert claimed(store).row.id == "child"

    # --- strikes

    def test_a_run_with_one_strike_is_claimed_like_any_other(self, store: Store) -> None:
        one, two = struck(store, "1", 1), started(store, "2")
        assert [head.row.key for head in claiming(store)] == [one, two]

    def test_a_run_with_two_strikes_is_passed_over(self, store: Store) -> None:
        struck(store, "poison", 2)
        run = started(store, "harmless")
        assert claimed(store).run == run

    def test_a_run_with_two_strikes_is_claimed_alone(self, store: Store) -> None:
        poison = struck(store, "poison", 2)
        started(store, "harmless")
        struck(store, "another poison", 2)
        assert claimed(store, alone=True).run == poison

    def test_who_claims_alone_may_get_harmless_runs_together(self, store: Store) -> None:
        harmless = [started(store, "1", priority=1), started(store, "2", priority=1)]
        struck(store, "poison", 2)
        assert [head.row.key for head in claiming(store, alone=True)] == harmless

    def test_a_run_with_two_strikes_that_waits_is_a_suspect(self, store: Store) -> None:
        wanted = Claim(incarnation="worker", namespace=NAMESPACE, queues=["default"], workflows=["orders"])
        struck(store, "worse", 3)
        assert not store.suspects(wanted)
        struck(store, "poison", 2)
        started(store, "harmless")
        assert store.suspects(wanted)
        assert not store.suspects(replace(wanted, queues=["other"]))
        assert not store.suspects(replace(wanted, workflows=["returns"]))
        assert not store.suspects(replace(wanted, namespace="other"))
        claimed(store, alone=True)
        assert not store.suspects(wanted)

    def test_who_wants_only_suspects_gets_one_whatever_waits_before_it(self, store: Store) -> None:
        started(store, "urgent", priority=9)
        poison = struck(store, "poison", 2)
        struck(store, "another poison", 2)
        [head] = claiming(store, alone=True, only_suspects=True)
        assert (head.row.key, head.row.strikes, head.row.status) == (poison, 2, "running")

    def test_who_wants_only_suspects_gets_nothing_where_there_is_none(self, store: Store) -> None:
        struck(store, "worse", 3)
        struck(store, "better", 1)
        started(store, "harmless")
        serve(store, "worker")
        assert claiming(store, alone=True, only_suspects=True) == []
        struck(store, "poison", 2)
        assert claiming(store, alone=True, only_suspects=True, workflows=["returns"]) == []
        assert claiming(store, alone=True, only_suspects=True, queues=["other"]) == []

    def test_a_run_with_three_strikes_is_never_claimed(self, store: Store) -> None:
        struck(store, "poison", 3)
        assert claiming(store) == []
        assert claiming(store, alone=True) == []

    # --- blocked runs and deploys

    def test_who_announces_a_blocked_runs_workflow_may_try_at_once(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        holder.commits(status="blocked", release=True, wake_at=clock() + 300 * SECOND)
        assert claiming(store) == []
        serve(store, "new code")
        assert row(store, holder.run).wake_at == clock()
        assert claimed(store, "new code").run == holder.run

    def test_who_announces_another_workflow_changes_nothing(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        before = holder.commits(status="blocked", release=True, wake_at=clock() + 300 * SECOND)
        serve(store, "other", workflows=["returns"])
        serve(store, "elsewhere", namespace="elsewhere")
        assert holder.row == before

    def test_who_announces_a_workflow_does_not_wake_what_only_waits(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        before = holder.parks(wake_at=clock() + 300 * SECOND)
        serve(store, "new code")
        assert holder.row == before

    def test_a_worker_may_say_again_what_it_serves(self, store: Store) -> None:
        holder = held(store)
        announce(store, workflows=["orders", "returns"])
        assert holder.writes(holder.turn()) == Committed(run=holder.run)

    # --- claims and late commits

    def test_a_commit_that_comes_after_the_next_claim_is_fenced(self, store: Store) -> None:
        first = held(store, worker="first")
        first.parks(wake_at=1)
        second = claimed(store, "second")
        late = first.turn(version=second.version, last=second.last, sends=[signal(first.run)])
        assert first.writes(late) == Fenced(run=first.run)
        assert unread(store, first.run) == []

    def test_an_end_between_parking_and_claiming_wins(self, store: Store) -> None:
        run = ended(store)
        assert claiming(store) == []
        assert row(store, run).status == "completed"


def struck(store: Store, id: str, strikes: int) -> int:
    """A ready run with so many strikes."""
    holder: Holder = held(store, id)
    for _ in range(strikes):
        holder.commits(strike=True)
    holder.commits(status="ready", release=True)
    return holder.run
