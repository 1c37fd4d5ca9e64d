"""Turns: fenced, all or nothing, each for itself; and the ends of runs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from perdure.core.errors import StoreLocked
from perdure.core.status import Status
from perdure.core.turn import (
    Batch,
    Committed,
    Fenced,
    Finished,
    Kept,
    MoreMail,
    ParentLink,
    Unstorable,
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
    sending,
    serve,
    signal,
    start,
    started,
    starting,
    unread,
    without_code,
)

ENDS = ["completed", "failed", "cancelled", "terminated", "timed_out", "continued"]


class TurnPromises:
    # --- what a turn writes

    def test_a_turn_raises_the_version_and_leaves_its_id(self, store: Store) -> None:
        holder = held(store)
        before = holder.row
        turn = holder.turn()
        assert holder.writes(turn) == Committed(run=holder.run)
        after = holder.row
        assert (after.version, after.turn) == (before.version + 1, turn.id)
        assert (after.owner, after.epoch, after.status) == (before.owner, before.epoch, "running")

    def test_a_batch_is_written_at_once_or_not_at_all(self, store: Store) -> None:
        holder = held(store)
        turn = holder.turn()
        try:
            verdicts = store.write_at_once(Batch(turns=[turn]))
        except StoreLocked:
            verdicts = store.write(Batch(turns=[turn]))
        assert verdicts == [Committed(run=holder.run)]
        assert holder.row.version == turn.version + 1

    def test_a_history_grows_at_its_end(self, store: Store) -> None:
        holder = held(store, event='{"n":0}')
        holder.commits(events=['{"n":1}', '{"n":2}'])
        holder.commits()
        holder.commits(events=['{"n":"ü"}'])
        assert store.history(holder.run) == ['{"n":0}', '{"n":1}', '{"n":2}', '{"n":"ü"}']
        assert (holder.row.history_events, holder.row.history_bytes) == (4, 3 * 7 + 10)

    def test_a_history_can_be_read_from_the_middle(self, store: Store) -> None:
        holder = held(store, event='{"n":0}')
        holder.commits(events=[f'{{"n":{n}}}' for n in range(1, 20)])
        assert store.history(holder.run, after=17) == ['{"n":17}', '{"n":18}', '{"n":19}']
        assert store.history(holder.run, after=20) == []

    def test_a_long_history_keeps_its_order(self, store: Store) -> None:
        holder = held(store, event='{"n":0}')
        numbers = itertools.count(1)
        for _ in range(30):
            holder.commits(events=[f'{{"n":{next(numbers)}}}' for _ in range(40)])
        assert store.history(holder.run) == [f'{{"n":{n}}}' for n in range(1201)]

    def test_what_a_run_waits_for_is_overwritten_by_each_turn(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        after = holder.commits(status="waiting", wake_at=clock() + SECOND, waits='{"signal":"approval"}')
        assert (after.status, after.wake_at, after.waits) == ("waiting", clock() + SECOND, '{"signal":"approval"}')
        after = holder.commits(status="running")
        assert (after.status, after.wake_at, after.waits) == ("running", None, "")

    def test_a_status_is_kept_as_its_plain_word(self, store: Store) -> None:
        assert type(held(store).commits(status=Status.WAITING).status) is str

    def test_result_and_error_are_overwritten_by_each_turn(self, store: Store) -> None:
        holder = held(store)
        after = holder.commits(status="blocked", result="1", error='{"report":1}', wake_at=1, release=True)
        assert (after.result, after.error) == ("1", '{"report":1}')
        after = claimed(store).commits(status="running")
        assert (after.result, after.error) == (None, None)

    def test_a_turn_may_count_attempts(self, store: Store) -> None:
        holder = held(store)
        assert holder.commits(attempt=2).attempt == 2
        assert holder.commits().attempt == 2

    def test_a_waiting_run_may_stay_with_its_owner(self, store: Store) -> None:
        holder = held(store)
        assert holder.commits(status="waiting").owner == "worker"
        assert holder.commits(status="running").owner == "worker"

    def test_a_released_run_belongs_to_nobody(self, store: Store) -> None:
        holder = held(store)
        after = holder.parks()
        assert (after.owner, after.epoch) == (None, 1)
        assert holder.writes(holder.turn()) == Fenced(run=holder.run)

    def test_turns_of_one_batch_are_written_together(self, store: Store) -> None:
        holders = [held(store, f"run-{n}") for n in range(200)]
        verdicts = answers(store, turns=[holder.turn(events=[EVENT], waits=str(holder.run)) for holder in holders])
        assert verdicts == [Committed(run=holder.run) for holder in holders]
        assert [holder.row.waits for holder in holders] == [str(holder.run) for holder in holders]
        assert [len(store.history(holder.run)) for holder in holders] == [2] * 200

    def test_all_parts_of_a_turn_appear_together(self, store: Store) -> None:
        holder, receiver = held(store), started(store, "receiver")
        sending(store, holder.run, "m")
        link = ParentLink(run=holder.run, step="step")
        after = holder.commits(
            events=[EVENT],
            consumed=["m"],
            status="waiting",
            wake_at=5,
            starts=[start("child", parent=link)],
            sends=[signal(receiver)],
        )
        assert (after.status, after.wake_at, store.history(holder.run)[1:]) == ("waiting", 5, [EVENT])
        assert (unread(store, holder.run), unread(store, receiver)) == ([], ["message"])
        assert store.run(NAMESPACE, "child") is not None

    # --- the fence

    @pytest.mark.parametrize("wrong", [{"owner": "another"}, {"epoch": 2}, {"version": 1}, {"last": "other"}])
    def test_a_turn_needs_every_part_of_its_fence(self, store: Store, wrong: dict[str, Any]) -> None:
        holder, receiver = held(store), started(store, "receiver")
        serve(store, "another")
        sending(store, holder.run, "m")
        before = everything(store, holder.run)
        late = holder.turn(
            events=[EVENT],
            consumed=["m"],
            starts=[start("child", parent=ParentLink(run=holder.run, step="step"))],
            sends=[signal(receiver)],
            **wrong,
        )
        assert holder.writes(late) == Fenced(run=holder.run)
        assert everything(store, holder.run) == before
        assert unread(store, receiver) == []
        assert store.run(NAMESPACE, "child") is None

    def test_a_turn_of_an_unowned_run_is_fenced(self, store: Store) -> None:
        run = started(store)
        serve(store)
        holder = Holder(store, row(store, run))
        assert holder.writes(holder.turn(owner="worker")) == Fenced(run=run)

    def test_a_turn_of_a_run_that_is_not_there_is_fenced(self, store: Store) -> None:
        holder = held(store)
        missing = holder.run + 1_000_000
        assert answers(store, turns=[holder.turn(run=missing)]) == [Fenced(run=missing)]

    def test_a_late_commit_changes_nothing(self, store: Store, clock: Clock) -> None:
        slow = held(store, worker="slow")
        clock.advance(minutes=5)
        store.reap()
        quick = claimed(store, "quick")
        assert slow.writes(slow.ending('"late"')) == Fenced(run=slow.run)
        assert quick.writes(quick.ending('"on time"')) == Committed(run=quick.run)
        assert slow.row.result == '"on time"'

    def test_a_worker_that_lost_a_run_and_got_it_again_has_two_fences(self, store: Store) -> None:
        first = held(store)
        first.parks(wake_at=1)
        second = claimed(store)
        late = first.turn(version=second.version, last=second.last)
        assert first.writes(late) == Fenced(run=first.run)
        assert second.writes(second.turn()) == Committed(run=first.run)

    def test_a_turn_asked_again_was_written_once(self, store: Store) -> None:
        holder, receiver = held(store), started(store, "receiver")
        sending(store, holder.run, "m")
        turn = holder.turn(events=[EVENT], consumed=["m"], sends=[signal(receiver)])
        assert holder.writes(turn) == Committed(run=holder.run)
        before = everything(store, holder.run)
        assert answers(store, turns=[turn]) == [Committed(run=holder.run)]
        assert everything(store, holder.run) == before
        assert unread(store, receiver) == ["message"]

    def test_an_end_asked_again_was_written_once(self, store: Store) -> None:
        holder = held(store)
        turn = holder.ending(events=[EVENT])
        assert [answers(store, turns=[turn]) for _ in range(2)] == [[Committed(run=holder.run)]] * 2
        assert len(store.history(holder.run)) == 2

    def test_a_turn_asked_again_after_a_reap_was_written(self, store: Store, clock: Clock) -> None:
        holder = held(store)
        turn = holder.turn(events=[EVENT])
        holder.writes(turn)
        clock.advance(minutes=1)
        store.reap()
        assert answers(store, turns=[turn]) == [Committed(run=holder.run)]
        assert len(store.history(holder.run)) == 2

    def test_a_turn_asked_again_after_the_next_one_is_fenced(self, store: Store) -> None:
        holder = held(store)
        turn = holder.turn()
        holder.writes(turn)
        holder.commits()
        assert answers(store, turns=[turn]) == [Fenced(run=holder.run)]

    def test_another_turn_of_the_same_version_is_fenced(self, store: Store) -> None:
        holder = held(store)
        one, two = holder.turn(), holder.turn(events=[EVENT])
        assert answers(store, turns=[one]) == [Committed(run=holder.run)]
        assert answers(store, turns=[two]) == [Fenced(run=holder.run)]
        assert len(store.history(holder.run)) == 1

    # --- each for itself

    def test_a_fenced_turn_harms_only_itself(self, store: Store) -> None:
        one, two, three = held(store, "1"), held(store, "2"), held(store, "3")
        verdicts = answers(store, turns=[one.turn(), two.turn(epoch=9), three.turn(events=[EVENT])])
        assert verdicts == [Committed(run=one.run), Fenced(run=two.run), Committed(run=three.run)]
        assert (one.row.version, two.row.version, three.row.version) == (1, 0, 1)

    @pytest.mark.parametrize(
        "broken",
        [
            pytest.param({"status": "scheduled"}, id="a move that no run makes"),
            pytest.param({"status": "unheard-of"}, id="a status nobody knows"),
            pytest.param({"events": [EVENT], "first_seq": 3}, id="a gap in the history"),
            pytest.param({"events": [EVENT, EVENT], "first_seq": 1}, id="an event written twice"),
            pytest.param({"events": ['"\ud800"']}, id="text without an UTF-8 form"),
        ],
    )
    def test_a_turn_that_cannot_be_stored_harms_only_itself(self, store: Store, broken: dict[str, Any]) -> None:
        one, two, three = held(store, "1"), held(store, "2"), held(store, "3")
        receiver = started(store, "receiver")
        before = everything(store, two.run)
        turns = [one.turn(events=[EVENT]), two.turn(sends=[signal(receiver)], **broken), three.turn(events=[EVENT])]
        first, second, third = answers(store, turns=turns)
        assert (first, third) == (Committed(run=one.run), Committed(run=three.run))
        assert isinstance(second, Unstorable)
        assert (second.run, bool(second.reason)) == (two.run, True)
        assert everything(store, two.run) == before
        assert unread(store, receiver) == []

    # --- strikes

    def test_progress_clears_the_strikes(self, store: Store) -> None:
        holder = held(store)
        assert holder.commits(strike=True).strikes == 1
        assert holder.commits(strike=True).strikes == 2
        assert holder.commits().strikes == 2
        assert holder.commits(progress=True).strikes == 0

    # --- closing turns

    @pytest.mark.parametrize("status", ["completed", "failed", "cancelled", "continued"])
    def test_an_ended_run_has_its_status_for_ever_and_no_owner(self, store: Store, clock: Clock, status: str) -> None:
        holder = held(store)
        holder.commits(wake_at=clock() + SECOND, waits='{"x":1}')
        clock.advance(seconds=2)
        after = holder.ends(status=status, result="1", error="2", wake_at=clock(), waits='{"x":1}')
        assert (after.status, after.result, after.error) == (status, "1", "2")
        assert (after.owner, after.ended_at, after.wake_at, after.waits) == (None, clock(), None, "")
        assert (after.epoch, after.version) == (1, 2)
        assert claiming(store) == []

    @pytest.mark.parametrize("status", [*ENDS, "running", "ready", "quarantined"])
    @pytest.mark.parametrize("owner", [None, "worker"])
    def test_an_ended_run_takes_no_turn(self, store: Store, status: str, owner: str | None) -> None:
        run = ended(store)
        before = everything(store, run)
        latest = Holder(store, row(store, run)).turn(owner=owner, status=status, id="another", closing=status in ENDS)
        assert answers(store, turns=[latest]) == [Fenced(run=run)]
        assert everything(store, run) == before

    def test_of_two_ends_the_first_wins(self, store: Store) -> None:
        holder = held(store)
        done, stopped = holder.ending(), without_code(store, holder.run)
        assert answers(store, turns=[done]) == [Committed(run=holder.run)]
        assert answers(store, turns=[stopped]) == [Fenced(run=holder.run)]
        assert holder.row.status == "completed"

    def test_a_run_does_not_end_with_mail_its_code_has_not_seen(self, store: Store) -> None:
        holder, receiver = held(store), started(store, "receiver")
        sending(store, holder.run, "seen")
        sending(store, holder.run, "new")
        before = everything(store, holder.run)
        closing = holder.ending(events=[EVENT], consumed=["seen"], sends=[signal(receiver)])
        assert holder.writes(closing) == MoreMail(run=holder.run)
        assert everything(store, holder.run) == before
        assert unread(store, receiver) == []

    def test_a_run_ends_when_its_code_has_seen_all_mail(self, store: Store) -> None:
        holder = held(store)
        sending(store, holder.run, "a")
        holder.commits(consumed=["a"])
        sending(store, holder.run, "b")
        assert holder.ends(consumed=["b"]).status == "completed"

    def test_a_run_with_more_mail_may_go_on(self, store: Store) -> None:
        holder = held(store)
        sending(store, holder.run, "a")
        assert holder.writes(holder.ending()) == MoreMail(run=holder.run)
        holder.commits(consumed=["a"])
        assert holder.ends().status == "completed"

    def test_a_forced_end_leaves_mail_unread(self, store: Store) -> None:
        holder = held(store)
        sending(store, holder.run, "a")
        assert holder.ends(forced=True).status == "completed"
        assert store.mail("worker") == []

    def test_more_mail_harms_only_its_own_run(self, store: Store) -> None:
        one, two = held(store, "1"), held(store, "2")
        sending(store, one.run)
        assert answers(store, turns=[one.ending(), two.ending()]) == [MoreMail(run=one.run), Committed(run=two.run)]

    def test_an_old_fence_is_fenced_whatever_the_mail(self, store: Store) -> None:
        holder = held(store)
        sending(store, holder.run)
        assert holder.writes(holder.ending(epoch=9)) == Fenced(run=holder.run)

    # --- ends without code

    @pytest.mark.parametrize("status", ["terminated", "timed_out"])
    def test_an_end_without_code_takes_the_run_from_its_owner(self, store: Store, clock: Clock, status: str) -> None:
        holder = held(store)
        assert answers(store, turns=[without_code(store, holder.run, status)]) == [Committed(run=holder.run)]
        after = holder.row
        assert (after.status, after.owner, after.epoch, after.version) == (status, None, 2, 1)
        assert after.ended_at == clock()
        assert holder.writes(holder.turn()) == Fenced(run=holder.run)

    @pytest.mark.parametrize("status", ["terminated", "timed_out"])
    @pytest.mark.parametrize("before", ["scheduled", "ready", "waiting", "blocked", "quarantined"])
    def test_any_live_run_can_be_ended_from_outside(self, store: Store, clock: Clock, before: str, status: str) -> None:
        run = in_status(store, clock, before)
        assert answers(store, turns=[without_code(store, run, status)]) == [Committed(run=run)]
        assert row(store, run).status == status

    @pytest.mark.parametrize("wrong", [{"epoch": 2}, {"version": 1}, {"last": "other"}])
    def test_an_end_without_code_needs_its_fence_too(self, store: Store, wrong: dict[str, Any]) -> None:
        holder = held(store)
        before = everything(store, holder.run)
        assert answers(store, turns=[without_code(store, holder.run, **wrong)]) == [Fenced(run=holder.run)]
        assert everything(store, holder.run) == before

    def test_an_end_without_code_that_comes_after_a_commit_reads_again(self, store: Store) -> None:
        holder = held(store)
        stopped = without_code(store, holder.run)
        holder.commits()
        assert answers(store, turns=[stopped]) == [Fenced(run=holder.run)]
        assert answers(store, turns=[without_code(store, holder.run)]) == [Committed(run=holder.run)]

    def test_an_end_without_code_sees_the_mail_like_any_other(self, store: Store) -> None:
        holder = held(store)
        sending(store, holder.run, "m")
        assert answers(store, turns=[without_code(store, holder.run)]) == [MoreMail(run=holder.run)]
        forced = without_code(store, holder.run, forced=True, events=[EVENT])
        assert answers(store, turns=[forced]) == [Committed(run=holder.run)]
        assert holder.row.status == "terminated"

    def test_an_end_without_code_tells_whom_it_names(self, store: Store) -> None:
        parent = held(store, "parent")
        link = ParentLink(run=parent.run, step="step")
        parent.commits(starts=[start("child", parent=link)])
        told = [signal(link, "close", kind="cancel")]
        assert answers(store, turns=[without_code(store, parent.run, sends=told)]) == [Committed(run=parent.run)]
        assert [row.id for row in store.children(parent.run)] == ["child"]
        [child] = store.children(parent.run)
        assert unread(store, child.key) == ["close"]

    def test_a_quarantined_run_is_no_ended_one(self, store: Store) -> None:
        holder = held(store)
        sending(store, holder.run, "m")
        assert answers(store, turns=[without_code(store, holder.run, "quarantined")]) == [Committed(run=holder.run)]
        after = holder.row
        assert (after.status, after.owner, after.epoch, after.ended_at) == ("quarantined", None, 2, None)
        assert unread(store, holder.run) == ["m"]
        assert sending(store, holder.run, "n") == Kept(run=holder.run)
        assert claiming(store) == []
        assert holder.writes(holder.turn()) == Fenced(run=holder.run)

    def test_a_quarantined_run_may_be_let_out(self, store: Store) -> None:
        holder = held(store)
        answers(store, turns=[without_code(store, holder.run, "quarantined")])
        let_out = without_code(store, holder.run, "ready", closing=False, progress=True)
        assert answers(store, turns=[let_out]) == [Committed(run=holder.run)]
        assert claimed(store).run == holder.run

    def test_an_ended_run_is_still_used_by_its_id(self, store: Store) -> None:
        run = ended(store, "order-1")
        assert sending(store, run) == Finished(run=run, status="completed")
        assert starting(store, "order-1", digest="another", seed="x") != starting(store, "order-1", seed="x")


def in_status(store: Store, clock: Clock, status: str) -> int:
    """A run that has this status and no owner."""
    serve(store)
    if status == "scheduled":
        return started(store, start_at=clock() + SECOND)
    if status == "ready":
        return started(store)
    holder = held(store)
    if status == "quarantined":
        answers(store, turns=[without_code(store, holder.run, status)])
    else:
        holder.commits(status=status, release=True)
    return holder.run
