"""Messages: kept once per run and id, read in the order of acceptance, taken by id."""

from __future__ import annotations

from typing import Any

import pytest

from perdure.core.turn import (
    Address,
    Begun,
    Committed,
    Duplicate,
    Fenced,
    Finished,
    Kept,
    Mail,
    MailboxFull,
    NotFound,
    ParentLink,
)
from perdure.stores.contract import Store
from perdure.testing.conformance.story import (
    NAMESPACE,
    Clock,
    answers,
    claimed,
    ended,
    held,
    row,
    sending,
    signal,
    start,
    started,
    unread,
    without_code,
)


class MailPromises:
    # --- where to

    def test_a_message_is_kept_as_it_was_given(self, store: Store, clock: Clock) -> None:
        run = started(store)
        clock.advance(seconds=1)
        verdict = sending(store, run, "m", kind="cancel", name="näme", data='{"reason":"日本"}')
        assert verdict == Kept(run=run)
        [message] = store.mailbox(run)
        assert message == Mail(
            run=run,
            position=message.position,
            id="m",
            kind="cancel",
            name="näme",
            data='{"reason":"日本"}',
            at=clock(),
        )

    def test_a_run_is_found_by_its_public_address(self, store: Store) -> None:
        run = started(store, "order-1")
        assert sending(store, Address(namespace=NAMESPACE, id="order-1")) == Kept(run=run)

    def test_a_child_is_found_by_its_parent_and_step(self, store: Store) -> None:
        parent = started(store, "parent")
        child = started(store, "any-id", parent=ParentLink(run=parent, step="notify"))
        assert sending(store, ParentLink(run=parent, step="notify")) == Kept(run=child)
        assert unread(store, parent) == []

    def test_nobody_is_found_where_nobody_is(self, store: Store) -> None:
        run = started(store, "order-1")
        nobody = [
            run + 1_000_000,
            Address(namespace=NAMESPACE, id="order-2"),
            Address(namespace="elsewhere", id="order-1"),
            ParentLink(run=run, step="notify"),
        ]
        assert [sending(store, to) for to in nobody] == [NotFound()] * 4
        assert unread(store, run) == []

    # --- order and duplicates

    def test_messages_are_read_in_the_order_of_acceptance(self, store: Store) -> None:
        run, other = started(store, "a"), started(store, "b")
        sending(store, run, "z")
        answers(store, sends=[signal(run, "b"), signal(other, "x"), signal(run, "a")])
        sending(store, run, "0")
        assert unread(store, run) == ["z", "b", "a", "0"]
        positions = [message.position for message in store.mailbox(run)]
        assert positions == sorted(set(positions))

    def test_a_message_is_kept_once(self, store: Store) -> None:
        run = started(store)
        sending(store, run, "m", data="1")
        assert sending(store, run, "m", data="2") == Duplicate(run=run)
        assert [message.data for message in store.mailbox(run)] == ["1"]

    def test_a_message_is_kept_once_in_one_batch_too(self, store: Store) -> None:
        run = started(store)
        address = Address(namespace=NAMESPACE, id="run")
        assert answers(store, sends=[signal(run, "m"), signal(address, "m")]) == [Kept(run=run), Duplicate(run=run)]
        assert unread(store, run) == ["m"]

    def test_a_consumed_message_is_not_kept_again(self, store: Store) -> None:
        holder = held(store)
        sending(store, holder.run, "m")
        holder.commits(consumed=["m"])
        assert sending(store, holder.run, "m") == Duplicate(run=holder.run)
        assert unread(store, holder.run) == []

    def test_a_message_repeated_after_the_end_is_known(self, store: Store) -> None:
        holder = held(store)
        sending(store, holder.run, "m")
        holder.ends(consumed=["m"])
        assert sending(store, holder.run, "m") == Duplicate(run=holder.run)

    def test_every_run_has_its_own_message_ids(self, store: Store) -> None:
        one, two = started(store, "1"), started(store, "2")
        assert [sending(store, one, "m"), sending(store, two, "m")] == [Kept(run=one), Kept(run=two)]

    # --- ends and limits

    @pytest.mark.parametrize("status", ["completed", "failed", "cancelled", "continued"])
    def test_an_ended_run_keeps_nothing_and_says_how_it_ended(self, store: Store, status: str) -> None:
        holder = held(store)
        holder.ends(status=status)
        assert sending(store, holder.run) == Finished(run=holder.run, status=status)
        assert unread(store, holder.run) == []

    def test_a_quarantined_run_keeps_its_mail(self, store: Store) -> None:
        holder = held(store)
        assert answers(store, turns=[without_code(store, holder.run, "quarantined")]) == [Committed(run=holder.run)]
        assert sending(store, holder.run) == Kept(run=holder.run)

    def test_a_full_mailbox_refuses(self, store: Store) -> None:
        run = started(store)
        verdicts = [sending(store, run, id, limit=2) for id in "abc"]
        assert verdicts == [Kept(run=run), Kept(run=run), MailboxFull(run=run, limit=2)]
        assert unread(store, run) == ["a", "b"]

    def test_a_mailbox_is_full_in_the_middle_of_a_batch(self, store: Store) -> None:
        run = started(store)
        verdicts = answers(store, sends=[signal(run, id, limit=2) for id in "abc"])
        assert verdicts == [Kept(run=run), Kept(run=run), MailboxFull(run=run, limit=2)]

    def test_messages_of_the_engine_fit_into_a_full_mailbox(self, store: Store) -> None:
        run = started(store)
        sending(store, run, "a", limit=1)
        assert sending(store, run, "b", limit=None) == Kept(run=run)

    def test_a_refused_message_may_come_again(self, store: Store) -> None:
        holder = held(store)
        sending(store, holder.run, "a", limit=1)
        assert sending(store, holder.run, "b", limit=1) == MailboxFull(run=holder.run, limit=1)
        holder.commits(consumed=["a"])
        assert sending(store, holder.run, "b", limit=1) == Kept(run=holder.run)

    def test_a_full_mailbox_knows_what_it_holds(self, store: Store) -> None:
        run = started(store)
        sending(store, run, "a", limit=1)
        assert sending(store, run, "a", limit=1) == Duplicate(run=run)

    # --- taken by id

    def test_a_commit_takes_what_it_names_and_nothing_else(self, store: Store) -> None:
        holder = held(store)
        for id in "abcd":
            sending(store, holder.run, id)
        holder.commits(consumed=["c", "a"])
        assert unread(store, holder.run) == ["b", "d"]

    def test_a_commit_takes_mail_of_its_own_run_only(self, store: Store) -> None:
        holder, other = held(store, "a"), held(store, "b")
        sending(store, holder.run, "m")
        sending(store, other.run, "m")
        holder.commits(consumed=["m"])
        assert unread(store, other.run) == ["m"]

    def test_a_fenced_commit_takes_nothing(self, store: Store) -> None:
        holder = held(store)
        sending(store, holder.run, "m")
        assert holder.writes(holder.turn(consumed=["m"], epoch=7)) == Fenced(run=holder.run)
        assert unread(store, holder.run) == ["m"]

    # --- messages of a turn

    def test_a_turns_messages_go_out_with_it(self, store: Store) -> None:
        receiver = started(store, "receiver")
        sender = held(store, "sender")
        sender.commits(sends=[signal(receiver, "b"), signal(Address(namespace=NAMESPACE, id="receiver"), "a")])
        assert unread(store, receiver) == ["b", "a"]

    def test_a_fenced_turn_sends_nothing(self, store: Store) -> None:
        receiver = started(store, "receiver")
        sender = held(store, "sender")
        assert sender.writes(sender.turn(sends=[signal(receiver)], version=9)) == Fenced(run=sender.run)
        assert unread(store, receiver) == []

    def test_a_turn_does_not_fail_because_nobody_is_there(self, store: Store) -> None:
        sender = held(store, "sender")
        gone = ended(store, "gone")
        lost: list[Any] = [
            gone,
            gone + 1_000_000,
            Address(namespace=NAMESPACE, id="nobody"),
            ParentLink(run=sender.run, step="never-started"),
        ]
        receiver = started(store, "receiver")
        sender.commits(sends=[*(signal(to, str(n)) for n, to in enumerate(lost)), signal(receiver)])
        assert (unread(store, gone), unread(store, receiver)) == ([], ["message"])

    def test_a_turns_message_is_kept_once_too(self, store: Store) -> None:
        receiver = started(store, "receiver")
        sender = held(store, "sender")
        sender.commits(sends=[signal(receiver, "m", data="1")])
        sender.commits(sends=[signal(receiver, "m", data="2")])
        assert [message.data for message in store.mailbox(receiver)] == ["1"]

    def test_the_end_of_a_child_reaches_its_parent(self, store: Store) -> None:
        parent = held(store, "parent")
        parent.parks()
        child = held(store, "child", "another", queue="elsewhere")
        child.ends(sends=[signal(parent.run, "perdure:end", kind="child_ended")])
        serve_again = claimed(store)
        assert serve_again.run == parent.run
        assert unread(store, parent.run) == ["perdure:end"]

    # --- mail beside an end

    def test_a_run_that_ends_in_the_same_batch_gets_no_mail(self, store: Store) -> None:
        holder = held(store)
        verdicts = answers(store, sends=[signal(holder.run)], turns=[holder.ending()])
        assert verdicts == [Finished(run=holder.run, status="completed"), Committed(run=holder.run)]
        assert unread(store, holder.run) == []

    @pytest.mark.parametrize("parent_first", [True, False])
    def test_a_child_that_ends_beside_its_parent_leaves_no_orphan(self, store: Store, parent_first: bool) -> None:
        parent, child = held(store, "parent"), held(store, "child")
        turns = [parent.ending(), child.ending(sends=[signal(parent.run, "end", kind="child_ended")])]
        verdicts = answers(store, turns=turns if parent_first else turns[::-1])
        assert sorted(verdict.run for verdict in verdicts if isinstance(verdict, Committed)) == [parent.run, child.run]
        assert unread(store, parent.run) == []
        assert (row(store, parent.run).status, row(store, child.run).status) == ("completed", "completed")

    def test_two_runs_that_end_may_write_to_each_other(self, store: Store) -> None:
        one, two = held(store, "1"), held(store, "2")
        turns = [one.ending(sends=[signal(two.run)]), two.ending(sends=[signal(one.run)])]
        assert answers(store, turns=turns) == [Committed(run=one.run), Committed(run=two.run)]
        assert (unread(store, one.run), unread(store, two.run)) == ([], [])

    def test_a_run_whose_end_is_fenced_gets_the_mail_of_its_batch(self, store: Store) -> None:
        holder = held(store)
        verdicts = answers(store, sends=[signal(holder.run)], turns=[holder.ending(epoch=9)])
        assert verdicts == [Kept(run=holder.run), Fenced(run=holder.run)]
        assert unread(store, holder.run) == ["message"]

    def test_a_message_may_come_with_the_turn_that_parks_its_run(self, store: Store) -> None:
        holder = held(store)
        parking = holder.turn(status="waiting", release=True)
        answers(store, sends=[signal(holder.run)], turns=[parking])
        assert claimed(store).run == holder.run

    def test_answers_come_in_the_order_starts_sends_turns(self, store: Store) -> None:
        holder, run = held(store, "held"), started(store, "free")
        begun, kept, committed = answers(
            store, starts=[start("new")], sends=[signal(run)], turns=[holder.turn(status="running")]
        )
        assert isinstance(begun, Begun)
        assert (kept, committed) == (Kept(run=run), Committed(run=holder.run))

    def test_an_empty_batch_has_no_answers(self, store: Store) -> None:
        assert answers(store) == []
