"""Retention: what ended long enough ago goes, whole, and nothing that anybody may still ask about."""

from __future__ import annotations

from typing import Any

from perdure.core.turn import Batch, Begun, Kept, NotFound, ParentLink, Pruned, Retention
from perdure.stores.contract import Store
from perdure.testing.conformance.story import (
    EVENT,
    NAMESPACE,
    SECOND,
    Clock,
    ended,
    everything,
    held,
    row,
    sending,
    start,
    started,
    starting,
    unread,
    without_code,
)


class PruningPromises:
    def test_a_run_that_ended_before_goes_with_all_that_is_kept_of_it(self, store: Store, clock: Clock) -> None:
        holder = held(store, "old", input="[[1],{}]" * 400, idempotency_key="key")
        sending(store, holder.run, "m")
        holder.commits(events=[EVENT], consumed=["m"])
        holder.ends()
        clock.advance(seconds=10)
        assert pruned(store, clock) == 1
        assert (store.rows([holder.run]), store.run(NAMESPACE, "old")) == ([], None)
        assert (store.history(holder.run), store.mailbox(holder.run), dict(store.counts(NAMESPACE))) == ([], [], {})
        assert sending(store, holder.run, "m") == NotFound()

    def test_id_and_idempotency_key_are_free_again_but_never_the_key(self, store: Store, clock: Clock) -> None:
        old = ended(store, "order", idempotency_key="key", idempotency_until=clock() + 1000 * SECOND)
        clock.advance(seconds=10)
        assert pruned(store, clock) == 1
        verdict = starting(store, "order", seed="2", digest="another", idempotency_key="key")
        assert isinstance(verdict, Begun)
        assert verdict.run > old
        assert sending(store, verdict.run) == Kept(run=verdict.run)

    def test_what_lives_or_ended_later_stays(self, store: Store, clock: Clock) -> None:
        live, late = started(store, "live"), held(store, "late")
        old = ended(store, "old")
        clock.advance(seconds=10)
        late.ends()
        before = [everything(store, run) for run in (live, late.run)]
        assert pruned(store, clock, ended_before=clock()) == 1
        assert [everything(store, run) for run in (live, late.run)] == before
        assert store.rows([old]) == []

    def test_only_the_outcomes_the_workflow_and_the_namespace_that_are_asked_for(
        self, store: Store, clock: Clock
    ) -> None:
        ended(store, "good")
        ended(store, "elsewhere", namespace="elsewhere")
        ended(store, "other", workflow="returns")
        bad = held(store, "bad")
        bad.ends(status="failed", result=None)
        clock.advance(seconds=10)
        assert pruned(store, clock, statuses=["failed", "terminated"]) == 1
        assert store.run(NAMESPACE, "bad") is None
        assert pruned(store, clock, workflow="returns") == 1
        assert store.run(NAMESPACE, "other") is None
        assert pruned(store, clock, statuses=["completed"]) == 1
        assert store.run("elsewhere", "elsewhere") is not None

    def test_small_batches_go_on_where_the_last_one_ended(self, store: Store, clock: Clock) -> None:
        runs = [ended(store, f"run-{n}") for n in range(7)]
        clock.advance(seconds=10)
        first = store.prune(retention(clock, limit=3))
        assert (first.runs, len(store.rows(runs))) == (3, 4)
        assert first.after is not None
        assert store.rows(runs[:3]) == []
        assert pruned(store, clock, limit=3, after=first.after) == 4
        assert store.prune(retention(clock)) == Pruned()

    def test_a_dry_run_counts_and_removes_nothing(self, store: Store, clock: Clock) -> None:
        runs = [ended(store, f"run-{n}") for n in range(5)]
        started(store, "live")
        clock.advance(seconds=10)
        assert pruned(store, clock, limit=2, dry_run=True) == 5
        assert len(store.rows(runs)) == 5

    def test_a_long_run_goes_in_pieces_and_its_history_is_always_a_beginning(self, store: Store, clock: Clock) -> None:
        holder = held(store, "long", event='{"n":0}')
        for _ in range(6):
            events = [f'{{"n":{holder.events + n}}}' for n in range(500)]
            holder.commits(events=events)
        whole = store.history(holder.run)
        holder.ends()
        clock.advance(seconds=10)
        asked = retention(clock)
        while (answer := store.prune(asked)).runs == 0:
            left = store.history(holder.run)
            assert left == whole[: len(left)]
            assert answer.after is not None
            asked = retention(clock, after=answer.after)
        assert answer.runs == 1
        assert (store.rows([holder.run]), store.history(holder.run)) == ([], [])

    # --- children and parents

    def test_a_child_stays_while_the_parent_that_closes_it_lives(self, store: Store, clock: Clock) -> None:
        parent = held(store, "parent")
        parent.commits(starts=[child("parent/a", parent.run, "a"), child("parent/b", parent.run, "b", "abandon")])
        end(store, "parent/a")
        end(store, "parent/b")
        clock.advance(seconds=10)
        assert pruned(store, clock) == 1
        assert store.run(NAMESPACE, "parent/b") is None
        kept = store.run(NAMESPACE, "parent/a")
        assert kept is not None
        assert kept.parent_id == "parent"
        parent.ends(consumed=unread(store, parent.run))
        clock.advance(seconds=10)
        assert pruned(store, clock) == 2

    def test_a_parent_stays_while_a_child_of_it_lives(self, store: Store, clock: Clock) -> None:
        parent = held(store, "parent")
        parent.commits(starts=[child("free", parent.run, "a", "abandon")])
        parent.ends()
        clock.advance(seconds=10)
        assert pruned(store, clock) == 0
        free = store.run(NAMESPACE, "free")
        assert free is not None
        assert free.parent_id == "parent"
        end(store, "free")
        # The child ended just now, its parent long ago.
        assert pruned(store, clock) == 1
        orphan = row(store, free.key)
        assert (orphan.parent, orphan.parent_id, orphan.parent_step) == (parent.run, None, "a")
        clock.advance(seconds=10)
        assert pruned(store, clock) == 1

    def test_an_emptied_store_is_empty(self, store: Store, clock: Clock) -> None:
        parent = held(store, "parent")
        parent.commits(
            starts=[child("child", parent.run, "a"), child("step", parent.run, "b", kind="activity", event="")]
        )
        parent.ends()
        end(store, "child")
        end(store, "step")
        clock.advance(seconds=10)
        assert pruned(store, clock) == 3
        assert store.children(parent.run) == []
        assert sending(store, ParentLink(run=parent.run, step="a")) == NotFound()


def retention(clock: Clock, **changes: Any) -> Retention:
    facts: dict[str, Any] = {"namespace": NAMESPACE, "ended_before": clock() - SECOND}
    return Retention(**facts | changes)


def pruned(store: Store, clock: Clock, **changes: Any) -> int:
    """How many runs go, to the end."""
    asked = retention(clock, **changes)
    count = 0
    while True:
        answer = store.prune(asked)
        count += answer.runs
        if answer.after is None:
            return count
        asked = retention(clock, **changes | {"after": answer.after})


def child(id: str, parent: int, step: str, close: str = "cancel", **changes: Any) -> Any:
    return start(id, parent=ParentLink(run=parent, step=step), parent_close=close, **changes)


def end(store: Store, id: str) -> None:
    found = store.run(NAMESPACE, id)
    assert found is not None
    store.write(Batch(turns=[without_code(store, found.key)]))
