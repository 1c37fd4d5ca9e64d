"""Starts: written once, or answered by what is there."""

from __future__ import annotations

import json
from typing import Any

import pytest

from perdure.core.turn import (
    Address,
    Begun,
    Committed,
    Conflict,
    Existing,
    Fenced,
    Kept,
    ParentLink,
    Taken,
)
from perdure.stores.contract import Store
from perdure.testing.conformance.story import (
    EVENT,
    NAMESPACE,
    SECOND,
    Clock,
    Holder,
    answers,
    claimed,
    claiming,
    ended,
    everything,
    held,
    row,
    serve,
    signal,
    start,
    started,
    starting,
    unread,
    without_code,
)


class StartPromises:
    # --- what a start writes

    def test_a_start_is_kept_as_it_was_given(self, store: Store, clock: Clock) -> None:
        run = started(
            store,
            "order-1",
            workflow="orders",
            input='[["o-1"],{}]',
            seed="the seed",
            queue="slow",
            priority=3,
            deadline_at=clock() + 60 * SECOND,
            parent_close="abandon",
            language="python/3.11",
            dialect="ordered/1",
            policy='{"retry":1}',
            tags='{"a":1}',
        )
        kept = row(store, run)
        assert (kept.key, kept.namespace, kept.id, kept.generation) == (run, NAMESPACE, "order-1", 1)
        assert (kept.kind, kept.workflow, kept.input, kept.seed) == ("workflow", "orders", '[["o-1"],{}]', "the seed")
        assert (kept.queue, kept.priority, kept.deadline_at) == ("slow", 3, clock() + 60 * SECOND)
        assert (kept.parent, kept.parent_id, kept.parent_step, kept.parent_close) == (None, None, None, "abandon")
        assert (kept.language, kept.dialect, kept.policy) == ("python/3.11", "ordered/1", '{"retry":1}')
        assert kept.tags == '{"a":1}'
        assert (kept.result, kept.error, kept.waits, kept.strikes, kept.attempt) == (None, None, "", 0, 1)
        assert (kept.created_at, kept.started_at, kept.ended_at, kept.wake_at) == (clock(), None, None, None)

    def test_a_new_run_is_ready_and_nobodys(self, store: Store, clock: Clock) -> None:
        assert starting(store, "order-1") == Begun(
            run=row_of(store, "order-1").key, id="order-1", epoch=0, version=0, at=clock()
        )
        kept = row_of(store, "order-1")
        assert (kept.status, kept.owner, kept.epoch, kept.version, kept.turn) == ("ready", None, 0, 0, "")

    def test_a_history_begins_with_the_started_event(self, store: Store) -> None:
        run = started(store, event='{"kind":"started","at":7,"seed":"ü"}')
        assert store.history(run) == ['{"kind":"started","at":7,"seed":"ü"}']
        kept = row(store, run)
        assert (kept.history_events, kept.history_bytes) == (1, len('{"kind":"started","at":7,"seed":"ü"}'.encode()))

    def test_histories_are_read_together(self, store: Store) -> None:
        runs = [started(store, id=f"order-{n}", event=f'{{"kind":"started","at":{n}}}') for n in range(3)]
        activity = started(store, id="act", kind="activity", workflow="charge", event="")
        found = store.histories([*runs[1:], activity, 10**12])
        assert {run: list(events) for run, events in found.items() if events} == {
            run: store.history(run) for run in runs[1:]
        }
        assert store.histories([]) == {}

    def test_an_activity_is_a_run_without_a_history(self, store: Store) -> None:
        run = started(store, kind="activity", workflow="charge", event="")
        assert row(store, run).kind == "activity"
        assert store.history(run) == []
        assert (row(store, run).history_events, row(store, run).history_bytes) == (0, 0)

    def test_a_start_in_the_future_is_scheduled(self, store: Store, clock: Clock) -> None:
        kept = row(store, started(store, start_at=clock() + 60 * SECOND))
        assert (kept.status, kept.wake_at, kept.owner) == ("scheduled", clock() + 60 * SECOND, None)

    def test_a_start_whose_time_has_come_is_ready(self, store: Store, clock: Clock) -> None:
        kept = row(store, started(store, start_at=clock() - 1))
        assert (kept.status, kept.wake_at) == ("ready", None)

    def test_hostile_text_comes_back_as_it_was(self, store: Store) -> None:
        text = json.dumps(["'; DROP TABLE runs; --", "%s {} \\ \x00 \u2028", "日本語 🎉"], ensure_ascii=False)
        run = started(store, "id ' \" % 🎉", input=text, tags=text)
        assert (row(store, run).input, row(store, run).tags) == (text, text)
        assert store.run(NAMESPACE, "id ' \" % 🎉") == row(store, run)

    def test_a_large_input_comes_back_as_it_was(self, store: Store) -> None:
        text = json.dumps("x" * 2_000_000)
        assert row(store, started(store, input=text)).input == text

    # --- embedded starts

    def test_a_starter_may_own_its_run_at_once(self, store: Store, clock: Clock) -> None:
        serve(store, "worker")
        verdict = starting(store, owner="worker")
        assert isinstance(verdict, Begun)
        assert (verdict.epoch, verdict.version) == (1, 0)
        kept = row(store, verdict.run)
        assert (kept.status, kept.owner, kept.epoch, kept.started_at) == ("running", "worker", 1, clock())
        assert claiming(store) == []

    def test_a_starter_goes_on_without_a_claim(self, store: Store) -> None:
        holder = held(store)
        assert holder.writes(holder.turn(events=[EVENT])) == Committed(run=holder.run)

    def test_what_a_dead_worker_starts_is_there_for_others(self, store: Store) -> None:
        serve(store, "dead")
        store.retire("dead")
        run = started(store, owner="dead")
        assert (row(store, run).status, row(store, run).owner) == ("ready", None)
        assert claimed(store, "other").run == run

    def test_what_a_dead_worker_starts_it_does_not_go_on_with(self, store: Store) -> None:
        serve(store, "dead")
        store.retire("dead")
        verdict = starting(store, owner="dead")
        assert isinstance(verdict, Begun)
        late = Holder(store, row(store, verdict.run)).turn(owner="dead", epoch=verdict.epoch)
        assert answers(store, turns=[late]) == [Fenced(run=verdict.run)]

    # --- the id is taken

    def test_the_same_start_uses_the_run_that_is_there(self, store: Store) -> None:
        run = started(store, "order-1", seed="first")
        before = everything(store, run)
        assert starting(store, "order-1", seed="second") == Existing(run=run, id="order-1")
        assert everything(store, run) == before
        assert store.counts(NAMESPACE) == {"ready": 1}

    def test_a_run_that_has_ended_is_used_too(self, store: Store) -> None:
        run = ended(store, "order-1")
        assert starting(store, "order-1", seed="second") == Existing(run=run, id="order-1")

    @pytest.mark.parametrize("other", [{"digest": "another"}, {"workflow": "another"}])
    def test_an_id_with_another_input_or_workflow_is_a_conflict(self, store: Store, other: dict[str, str]) -> None:
        run = started(store, "order-1", seed="first")
        before = everything(store, run)
        assert starting(store, "order-1", seed="second", **other) == Conflict(id="order-1")
        assert everything(store, run) == before

    @pytest.mark.parametrize("other", [{}, {"digest": "another"}, {"workflow": "another"}])
    def test_a_start_that_wants_to_be_the_first_is_told_that_it_is_not(
        self, store: Store, other: dict[str, str]
    ) -> None:
        started(store, "order-1", seed="first")
        assert starting(store, "order-1", seed="second", if_exists="fail", **other) == Taken(id="order-1")

    def test_a_start_that_wants_to_be_the_first_may_be(self, store: Store) -> None:
        assert isinstance(starting(store, if_exists="fail"), Begun)

    def test_an_id_belongs_to_its_namespace(self, store: Store) -> None:
        here = started(store, "order-1")
        there = started(store, "order-1", namespace="elsewhere", seed="another", digest="another")
        assert here != there

    # --- asked again

    @pytest.mark.parametrize("owner", [None, "worker"])
    @pytest.mark.parametrize("if_exists", ["use", "fail"])
    def test_a_start_asked_again_gets_its_first_answer(
        self, store: Store, clock: Clock, owner: str | None, if_exists: str
    ) -> None:
        serve(store, "worker")
        first = starting(store, owner=owner, if_exists=if_exists)
        assert isinstance(first, Begun)
        before = everything(store, first.run)
        clock.advance(seconds=1)
        assert starting(store, owner=owner, if_exists=if_exists) == first
        assert everything(store, first.run) == before

    def test_a_start_asked_again_does_not_get_a_newer_holders_epoch(self, store: Store, clock: Clock) -> None:
        serve(store, "slow")
        first = starting(store, owner="slow")
        assert isinstance(first, Begun)
        clock.advance(minutes=1)
        store.reap()
        quick = claimed(store, "quick")
        assert starting(store, owner="slow") == first
        assert quick.writes(quick.turn()) == Committed(run=first.run)

    def test_a_start_with_a_key_asked_again_gets_its_first_answer(self, store: Store) -> None:
        first = starting(store, idempotency_key="k")
        assert isinstance(first, Begun)
        assert starting(store, idempotency_key="k") == first

    # --- idempotency keys

    def test_a_key_stands_for_the_run_it_started(self, store: Store) -> None:
        run = started(store, "first", idempotency_scope="orders", idempotency_key="k")
        again = starting(store, "second", idempotency_scope="orders", idempotency_key="k")
        assert again == Existing(run=run, id="first")
        assert store.run(NAMESPACE, "second") is None

    @pytest.mark.parametrize("other", [{"digest": "another"}, {"workflow": "another"}])
    def test_a_key_with_another_input_or_workflow_is_a_conflict(self, store: Store, other: dict[str, str]) -> None:
        started(store, "first", idempotency_key="k")
        assert starting(store, "second", idempotency_key="k", **other) == Conflict(id="first", key="k")
        assert store.run(NAMESPACE, "second") is None

    def test_a_key_may_be_wanted_as_the_first_too(self, store: Store) -> None:
        started(store, "first", idempotency_key="k")
        assert starting(store, "second", idempotency_key="k", if_exists="fail") == Taken(id="first")

    def test_a_key_belongs_to_its_namespace_and_scope(self, store: Store) -> None:
        started(store, "1", idempotency_scope="orders", idempotency_key="k")
        started(store, "2", idempotency_scope="returns", idempotency_key="k")
        started(store, "3", idempotency_scope="orders", idempotency_key="k", namespace="elsewhere")
        started(store, "4", idempotency_scope="orders", idempotency_key="another")

    def test_a_key_lasts_until_its_time(self, store: Store, clock: Clock) -> None:
        until = clock() + 60 * SECOND
        run = started(store, "first", idempotency_key="k", idempotency_until=until)
        clock.advance(seconds=59)
        assert starting(store, "second", idempotency_key="k") == Existing(run=run, id="first")

    def test_a_key_is_free_again_after_its_time(self, store: Store, clock: Clock) -> None:
        started(store, "first", idempotency_key="k", idempotency_until=clock() + 60 * SECOND)
        clock.advance(seconds=60)
        second = started(store, "second", idempotency_key="k", digest="another")
        assert starting(store, "third", idempotency_key="k", digest="another") == Existing(run=second, id="second")

    def test_a_key_without_a_time_lasts(self, store: Store, clock: Clock) -> None:
        run = started(store, "first", idempotency_key="k")
        clock.advance(days=10_000)
        assert starting(store, "second", idempotency_key="k") == Existing(run=run, id="first")

    def test_a_key_is_asked_before_the_id(self, store: Store) -> None:
        run = started(store, "first", idempotency_key="k")
        started(store, "second")
        assert starting(store, "second", seed="a third", idempotency_key="k") == Existing(run=run, id="first")

    # --- many at once

    def test_starts_of_one_batch_are_answered_each_for_itself(self, store: Store) -> None:
        taken = started(store, "taken", seed="first")
        verdicts = answers(
            store,
            starts=[
                start("new"),
                start("taken", seed="second"),
                start("another", idempotency_key="k"),
                start("newer"),
            ],
        )
        assert verdicts[1] == Existing(run=taken, id="taken")
        assert [verdict.id for verdict in verdicts if isinstance(verdict, Begun)] == ["new", "another", "newer"]
        assert [row_of(store, id).status for id in ("new", "another", "newer")] == ["ready"] * 3

    # --- children

    def test_a_child_knows_its_parent(self, store: Store) -> None:
        parent = held(store, "parent")
        parent.commits(starts=[child(parent, "notify")])
        kept = row_of(store, "parent/notify")
        assert (kept.parent, kept.parent_id, kept.parent_step) == (parent.run, "parent", "notify")
        assert (kept.status, kept.owner) == ("ready", None)

    def test_a_child_is_started_with_the_turn_or_not_at_all(self, store: Store) -> None:
        parent = held(store, "parent")
        late = parent.turn(starts=[child(parent, "notify")], version=parent.version + 1)
        assert parent.writes(late) == Fenced(run=parent.run)
        assert store.run(NAMESPACE, "parent/notify") is None

    def test_a_child_may_be_held_by_its_parents_worker(self, store: Store) -> None:
        parent = held(store, "parent")
        parent.commits(starts=[child(parent, "notify", owner="worker")])
        kept = row_of(store, "parent/notify")
        assert (kept.status, kept.owner, kept.epoch) == ("running", "worker", 1)

    def test_a_child_asked_for_again_is_there_already(self, store: Store) -> None:
        parent = held(store, "parent")
        parent.commits(starts=[child(parent, "notify")])
        before = row_of(store, "parent/notify")
        parent.commits(starts=[child(parent, "notify")])
        assert row_of(store, "parent/notify") == before
        assert unread(store, parent.run) == []

    def test_a_child_is_its_parents_own_by_step_too(self, store: Store) -> None:
        parent = held(store, "parent")
        parent.commits(starts=[child(parent, "notify", seed="of a run that was moved")])
        parent.commits(starts=[child(parent, "notify")])
        assert row_of(store, "parent/notify").seed == "of a run that was moved"
        assert unread(store, parent.run) == []

    def test_a_parent_is_told_that_its_childs_id_is_taken(self, store: Store, clock: Clock) -> None:
        stranger = started(store, "wanted")
        before = everything(store, stranger)
        parent = held(store, "parent")
        parent.commits(starts=[child(parent, "notify", id="wanted")])
        [message] = store.mailbox(parent.run)
        assert (message.id, message.kind, message.name) == ("perdure:child:notify", "child_ended", "notify")
        assert message.at == clock()
        told = json.loads(message.data)
        assert (told["step"], told["run"], told["status"]) == ("notify", "wanted", "failed")
        assert told["error"]["type"] == "RunExists"
        assert told["error"]["message"] == (
            'Run "wanted" exists already, and is not this child of this run. An id belongs to one run, also after its '
            "end. Choose another with ctx.step.options(id=…)."
        )
        assert everything(store, stranger) == before

    def test_a_parent_is_told_that_its_activitys_id_is_taken(self, store: Store) -> None:
        started(store, "wanted")
        parent = held(store, "parent")
        parent.commits(starts=[child(parent, "charge", id="wanted", kind="activity", event="")])
        [message] = store.mailbox(parent.run)
        assert (message.id, message.kind, message.name) == ("perdure:activity:charge", "activity_ended", "charge")
        assert json.loads(message.data)["error"]["type"] == "RunExists"

    def test_a_parent_is_told_once(self, store: Store) -> None:
        started(store, "wanted")
        parent = held(store, "parent")
        parent.commits(starts=[child(parent, "notify", id="wanted")])
        parent.commits(starts=[child(parent, "notify", id="wanted")])
        assert unread(store, parent.run) == ["perdure:child:notify"]

    def test_a_parent_that_does_not_wait_is_not_told(self, store: Store) -> None:
        started(store, "wanted")
        parent = held(store, "parent")
        parent.commits(starts=[child(parent, "notify", id="wanted", awaited=False)])
        assert unread(store, parent.run) == []

    def test_a_parent_that_ends_with_the_same_turn_is_not_told(self, store: Store) -> None:
        started(store, "wanted")
        parent = held(store, "parent")
        parent.ends(starts=[child(parent, "notify", id="wanted")])
        assert unread(store, parent.run) == []

    def test_another_parents_child_is_a_stranger(self, store: Store) -> None:
        one, two = held(store, "one"), held(store, "two")
        one.commits(starts=[child(one, "notify", id="wanted", seed="of one")])
        two.commits(starts=[child(two, "notify", id="wanted", seed="of two")])
        assert unread(store, one.run) == []
        assert unread(store, two.run) == ["perdure:child:notify"]

    def test_a_child_started_beside_the_turns_is_refused_with_an_answer(self, store: Store) -> None:
        started(store, "wanted")
        parent = held(store, "parent")
        assert answers(store, starts=[child(parent, "notify", id="wanted")]) == [Taken(id="wanted")]
        assert unread(store, parent.run) == ["perdure:child:notify"]

    def test_a_parked_parent_is_woken_by_the_refusal_of_its_child(self, store: Store) -> None:
        started(store, "wanted", queue="elsewhere")
        parent = held(store, "parent")
        parent.parks(starts=[child(parent, "notify", id="wanted")])
        assert claimed(store).run == parent.run

    def test_a_new_child_can_be_sent_to_in_the_same_turn(self, store: Store) -> None:
        parent = held(store, "parent")
        link = ParentLink(run=parent.run, step="notify")
        parent.commits(starts=[child(parent, "notify")], sends=[signal(link)])
        assert unread(store, row_of(store, "parent/notify").key) == ["message"]

    def test_a_new_run_can_be_sent_to_in_the_same_batch(self, store: Store) -> None:
        begun, kept = answers(store, starts=[start("a")], sends=[signal(Address(namespace=NAMESPACE, id="a"))])
        assert isinstance(begun, Begun)
        assert kept == Kept(run=begun.run)

    def test_the_id_of_a_terminated_run_stays_taken(self, store: Store) -> None:
        run = started(store, "order-1")
        assert answers(store, turns=[without_code(store, run)]) == [Committed(run=run)]
        assert starting(store, "order-1", seed="second") == Existing(run=run, id="order-1")


def child(parent: Holder, step: str, id: str = "", **changes: Any) -> Any:
    link = ParentLink(run=parent.run, step=step)
    return start(id or f"parent/{step}", **{"seed": f"{parent.run} {step}", "parent": link} | changes)


def row_of(store: Store, id: str) -> Any:
    found = store.run(NAMESPACE, id)
    assert found is not None
    return found
