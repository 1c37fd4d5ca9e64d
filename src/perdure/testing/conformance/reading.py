"""Reads: runs by id and key, pages, counts, children, mail; and nothing of another namespace."""

from __future__ import annotations

from perdure.core.turn import Committed, ParentLink, Query
from perdure.stores.contract import Store
from perdure.testing.conformance.story import (
    NAMESPACE,
    SECOND,
    Clock,
    answers,
    claiming,
    ended,
    held,
    row,
    sending,
    serve,
    start,
    started,
    without_code,
)


class ReadingPromises:
    def test_a_store_says_where_it_is_and_what_it_survives(self, store: Store, clock: Clock) -> None:
        assert "://" in store.url
        assert store.durability in ("D1", "D2", "D3")
        assert store.now() <= clock()

    # --- by id and key

    def test_a_run_is_read_by_its_id(self, store: Store) -> None:
        run = started(store, "order-1")
        found = store.run(NAMESPACE, "order-1")
        assert found is not None
        assert found.key == run
        assert store.run(NAMESPACE, "order-2") is None
        assert store.run("elsewhere", "order-1") is None

    def test_rows_are_read_by_key_those_that_exist(self, store: Store) -> None:
        one, two = started(store, "1"), started(store, "2")
        started(store, "3")
        assert {row.id for row in store.rows([two, one, one + 1_000_000])} == {"1", "2"}
        assert store.rows([]) == []

    def test_many_rows_are_read_at_once(self, store: Store) -> None:
        verdicts = answers(store, starts=[start(str(n)) for n in range(3_000)])
        keys = [verdict.run for verdict in verdicts]  # type: ignore[union-attr]  # all of them begin
        assert len(set(keys)) == len(store.rows(keys)) == 3_000

    def test_waiters_hear_which_runs_have_ended(self, store: Store) -> None:
        live, done = started(store, "live"), ended(store, "done")
        sick = held(store, "sick")
        assert answers(store, turns=[without_code(store, sick.run, "quarantined")]) == [Committed(run=sick.run)]
        assert set(store.ended([live, done, sick.run, live + 1_000_000])) == {done, sick.run}

    def test_what_is_not_there_has_no_history_and_no_mail(self, store: Store) -> None:
        assert (store.history(12_345), store.mailbox(12_345), store.children(12_345)) == ([], [], [])
        assert store.mail("nobody") == []

    # --- mail

    def test_an_owner_reads_the_unread_mail_of_all_its_runs(self, store: Store) -> None:
        one, two, other = held(store, "1"), held(store, "2"), held(store, "3", "other")
        free = started(store, "4")
        for run, id in [(two.run, "c"), (one.run, "b"), (one.run, "a"), (other.run, "x"), (free, "y")]:
            sending(store, run, id)
        one.commits(consumed=["b"])
        sending(store, one.run, "d")
        assert [(message.run, message.id) for message in store.mail("worker")] == [
            (one.run, "a"),
            (one.run, "d"),
            (two.run, "c"),
        ]

    def test_an_owner_finds_what_it_owns(self, store: Store) -> None:
        holder = held(store, "mine")
        given_up = held(store, "given-up")
        given_up.commits(status="waiting", release=True)
        assert store.owned("worker") == [holder.run]
        assert store.owned("nobody") == []

    def test_a_run_given_up_is_nobodys_mail(self, store: Store) -> None:
        holder = held(store)
        sending(store, holder.run)
        holder.parks()
        assert store.mail("worker") == []

    # --- pages

    def test_a_list_begins_with_the_newest(self, store: Store) -> None:
        for n in range(5):
            started(store, str(n))
        assert ids(store) == ["4", "3", "2", "1", "0"]

    def test_pages_follow_each_other_without_a_gap(self, store: Store) -> None:
        for n in range(7):
            started(store, str(n))
        pages, cursor = [], None
        while rows := store.list(Query(namespace=NAMESPACE, limit=3, cursor=cursor)):
            pages.append([row.id for row in rows])
            cursor = rows[-1].key
            started(store, f"newer-{cursor}")  # what comes meanwhile turns no page
        assert pages == [["6", "5", "4"], ["3", "2", "1"], ["0"]]

    def test_a_list_can_be_narrowed(self, store: Store, clock: Clock) -> None:
        began = clock()
        started(store, "a")
        clock.advance(seconds=10)
        started(store, "b", workflow="returns")
        ended(store, "c", workflow="returns")
        clock.advance(seconds=10)
        parent = started(store, "d")
        started(store, "e", parent=ParentLink(run=parent, step="step"))
        assert ids(store, workflow="returns") == ["c", "b"]
        assert ids(store, status="completed") == ["c"]
        assert ids(store, workflow="returns", status="ready") == ["b"]
        assert ids(store, parent=parent) == ["e"]
        assert ids(store, created_after=began + 15 * SECOND) == ["e", "d"]
        assert ids(store, created_before=began + 15 * SECOND) == ["c", "b", "a"]
        assert ids(store, created_after=began + 5 * SECOND, created_before=began + 15 * SECOND) == ["c", "b"]
        assert ids(store, workflow="unheard-of") == []

    def test_counts_are_those_of_the_rows(self, store: Store) -> None:
        started(store, "a")
        started(store, "b", queue="slow")
        started(store, "c", workflow="returns")
        ended(store, "d")
        held(store, "e")
        assert store.counts(NAMESPACE) == {"ready": 3, "completed": 1, "running": 1}
        assert store.counts(NAMESPACE, workflow="orders") == {"ready": 2, "completed": 1, "running": 1}
        assert store.counts(NAMESPACE, queue="slow") == {"ready": 1}
        assert store.counts(NAMESPACE, workflow="returns", queue="slow") == {}

    # --- children and what is late

    def test_the_live_children_of_a_run_are_read_oldest_first(self, store: Store) -> None:
        parent = started(store, "parent")
        started(store, "b", parent=ParentLink(run=parent, step="1"))
        ended(store, "gone", parent=ParentLink(run=parent, step="2"))
        started(store, "a", kind="activity", event="", parent=ParentLink(run=parent, step="3"))
        started(store, "grandchild", parent=ParentLink(run=parent + 1, step="1"))
        assert [row.id for row in store.children(parent)] == ["b", "a"]

    def test_a_run_past_its_deadline_is_overdue(self, store: Store, clock: Clock) -> None:
        serve(store)
        late = clock() + 10 * SECOND
        started(store, "free", deadline_at=late)
        held(store, "held", deadline_at=late)
        ended(store, "ended", deadline_at=late)
        started(store, "later", deadline_at=late + 10 * SECOND)
        started(store, "never")
        assert store.overdue() == []
        clock.advance(seconds=11)
        assert {row.id for row in store.overdue()} == {"free", "held"}
        assert len(store.overdue(limit=1)) == 1

    def test_a_struck_run_is_not_overdue_while_somebody_holds_it(self, store: Store) -> None:
        holder = held(store)
        for _ in range(3):
            holder.commits(strike=True)
        assert store.overdue() == []
        holder.commits(status="ready", release=True)
        assert [row.key for row in store.overdue()] == [holder.run]

    # --- namespaces

    def test_nothing_is_seen_across_namespaces(self, store: Store) -> None:
        serve(store)
        run = started(store, "order-1", namespace="elsewhere")
        sending(store, run)
        assert store.run(NAMESPACE, "order-1") is None
        assert ids(store) == []
        assert store.counts(NAMESPACE) == {}
        assert claiming(store) == []
        assert row(store, run).owner is None


def ids(store: Store, **narrowed: object) -> list[str]:
    return [row.id for row in store.list(Query(namespace=NAMESPACE, **narrowed))]  # type: ignore[arg-type]  # by name
