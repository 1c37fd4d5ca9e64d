"""Any store beside the memory store: the same calls, drawn by hypothesis, get the same answers and leave the same rows.

Only keys and positions may differ. A store is compared after every call, in everything that can be read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec.structs import replace

from perdure.core.errors import StoreError
from perdure.core.status import Status
from perdure.core.turn import (
    Address,
    Announced,
    Announcement,
    Batch,
    Begun,
    Claim,
    ParentLink,
    Query,
    Retention,
    Send,
    Start,
    Turn,
)
from perdure.stores.contract import Store
from perdure.stores.memory import MemoryStore
from perdure.testing.conformance.story import NAMESPACE, SECOND, Clock

WORKERS = ["w0", "w1", "w2", "w3"]
NAMESPACES = [NAMESPACE, NAMESPACE, "elsewhere"]
RUN_IDS = ["a", "b", "c", "d", "e"]
KEYS = ["k0", "k1"]
MESSAGE_IDS = ["m0", "m1", "m2", "m3"]
WORKFLOWS = ["orders", "returns"]
QUEUES = ["default", "slow"]
STEPS = ["one", "two"]
# No multiple of it is a whole number of seconds: a lease never ends in the very moment the clock stops at.
TTL = 15 * SECOND + 1

chance = st.integers(0, 5).map(lambda n: n == 0)
"""True now and then."""


class AgainstMemory(RuleBasedStateMachine):
    """Subclass it with `make`."""

    def make(self, clock: Clock) -> Store:
        """A new, empty store on this clock."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.model = MemoryStore(clock=self.clock)
        self.real = self.make(self.clock)
        self.keys: dict[int, int] = {}  # a run's key in the model -> in the store
        self.known: dict[int, int] = {}  # and back
        self.limit_of: dict[tuple[str, str], int | None] = {}
        self.parents: set[tuple[int, str]] = set()  # steps that have asked for a child
        self.last = Batch()
        self.unique = itertools.count()
        self.fresh: list[str] = []  # ids and keys that no start of this batch has yet
        self.fresh_keys: list[str] = []

    def teardown(self) -> None:
        self.model.close()
        self.real.close()

    @initialize()
    def somebody_works(self) -> None:
        self.announced("w0", NAMESPACE, WORKFLOWS)

    # --- what is done

    @rule(
        worker=st.sampled_from(WORKERS),
        namespace=st.sampled_from(NAMESPACES),
        serves=st.sets(st.sampled_from(WORKFLOWS)),
    )
    def announce(self, worker: str, namespace: str, serves: set[str]) -> None:
        self.announced(worker, namespace, sorted(serves))

    def announced(self, worker: str, namespace: str, serves: Sequence[str]) -> None:
        announcement = Announcement(
            incarnation=worker,
            name=f"{worker}!",
            namespace=namespace,
            queues=QUEUES,
            serves=[Announced(name=name) for name in serves],
            ttl=TTL,
        )
        self.both(lambda store: store.announce(announcement))

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        self.fresh, self.fresh_keys = [*RUN_IDS], [*KEYS]
        few = st.integers(0, 2)
        starts = [self.a_start(data) for _ in range(data.draw(few)) if self.fresh]
        sends = [self.a_send(data) for _ in range(data.draw(few))]
        # What was pruned has no row to make a turn of; a turn from before is asked again by `ask_again`.
        there = sorted(row.key for row in self.model.rows([*self.keys]))
        runs = data.draw(st.lists(st.sampled_from(there), unique=True, max_size=3)) if there else []
        turns = [self.a_turn(data, run) for run in runs]
        self.last = Batch(starts=starts, sends=sends, turns=turns)
        self.written(self.last)

    @rule()
    def ask_again(self) -> None:
        self.written(self.last)

    @rule(
        worker=st.sampled_from(WORKERS),
        namespace=st.sampled_from(NAMESPACES),
        queues=st.sampled_from([QUEUES, QUEUES, ["slow"]]),
        workflows=st.sampled_from([WORKFLOWS, WORKFLOWS, ["orders"], []]),
        activities=st.sampled_from([[], ["charge"]]),
        limit=st.integers(1, 4),
        max_bytes=st.sampled_from([1, 1_000_000]),
        alone=st.booleans(),
        only_suspects=st.booleans(),
    )
    def claim(self, **wanted: Any) -> None:
        claim = Claim(incarnation=wanted.pop("worker"), **wanted)
        heads = self.model.claim(claim)
        others = self.real.claim(claim)
        assert [self.translated(head.row) for head in others] == [head.row for head in heads]
        assert [self.mails(head.mail) for head in others] == [self.mails(head.mail) for head in heads]

    @rule(worker=st.sampled_from(WORKERS))
    def heartbeat(self, worker: str) -> None:
        self.both(lambda store: store.heartbeat(worker))

    @rule(limit=st.integers(1, 3))
    def reap(self, limit: int) -> None:
        self.both(lambda store: store.reap(limit=limit))

    @rule(worker=st.sampled_from(WORKERS))
    def retire(self, worker: str) -> None:
        self.both(lambda store: store.retire(worker))

    @rule(
        seconds=st.sampled_from([0, 1, 5]),
        statuses=st.sampled_from([[], ["completed"], ["failed", "terminated"]]),
        workflow=st.sampled_from([None, None, "orders"]),
        limit=st.integers(1, 3),
        dry_run=chance,
    )
    def prune(self, seconds: int, **wanted: Any) -> None:
        """To the end: how far one call comes is the store's own affair."""
        asked = Retention(namespace=NAMESPACE, ended_before=self.clock() - seconds * SECOND, **wanted)
        assert pruned(self.real, asked) == pruned(self.model, asked)

    @rule(seconds=st.sampled_from([1, 1, 5, 20]))
    def advance(self, seconds: int) -> None:
        self.clock.advance(seconds=seconds)

    # --- what is drawn

    def a_start(self, data: st.DataObject, parent: ParentLink | None = None) -> Start:
        id = data.draw(st.sampled_from(self.fresh))
        self.fresh.remove(id)
        key = data.draw(st.sampled_from([None, *self.fresh_keys]))
        if key is not None:
            self.fresh_keys.remove(key)
        activity = data.draw(chance)
        return Start(
            namespace=NAMESPACE if parent is not None else data.draw(st.sampled_from(NAMESPACES)),
            id=id,
            kind="activity" if activity else "workflow",
            workflow="charge" if activity else data.draw(st.sampled_from(WORKFLOWS)),
            input="[[],{}]",
            digest="another" if data.draw(chance) else "digest",
            seed=f"{parent}" if parent is not None else f"seed {next(self.unique)}",
            event="" if activity else f'{{"started":{next(self.unique)}}}',
            queue=data.draw(st.sampled_from(QUEUES)),
            priority=data.draw(st.sampled_from([0, 0, 1])),
            start_at=data.draw(st.sampled_from([None, None, self.in_seconds(-1), self.in_seconds(3)])),
            deadline_at=data.draw(st.sampled_from([None, self.in_seconds(10)])),
            parent=parent,
            awaited=not data.draw(chance),
            if_exists=data.draw(st.sampled_from(["use", "fail"])),
            idempotency_key=key,
            idempotency_until=data.draw(st.sampled_from([None, self.in_seconds(10)])),
            owner=data.draw(st.sampled_from([None, *WORKERS])),
        )

    def a_send(self, data: st.DataObject) -> Send:
        run = st.sampled_from([*self.keys, -1])
        to = data.draw(
            st.one_of(
                run,
                st.builds(Address, namespace=st.sampled_from(NAMESPACES), id=st.sampled_from(RUN_IDS)),
                st.builds(ParentLink, run=run, step=st.sampled_from(STEPS)),
            )
        )
        id = data.draw(st.sampled_from(MESSAGE_IDS))
        # Whoever sends a message again sends the same one.
        return Send(
            to=to,
            id=id,
            kind=data.draw(st.sampled_from(["signal", "signal", "cancel"])),
            data=f"{next(self.unique)}",
            limit=self.limit_of.setdefault((str(to), id), data.draw(st.sampled_from([None, 1, 3]))),
        )

    def a_turn(self, data: st.DataObject, run: int) -> Turn:
        """A turn that holds, mostly: with a chance for each of the parts of its fence to be wrong."""
        [row] = self.model.rows([run])
        unread = [message.id for message in self.model.mailbox(run)]
        status = data.draw(st.sampled_from([*Status, Status.RUNNING, Status.WAITING, Status.READY])).value
        events = [f'{{"event":{next(self.unique)}}}' for _ in range(data.draw(st.integers(0, 2)))]
        link = ParentLink(run=run, step=data.draw(st.sampled_from(STEPS)))
        # A step id is used once in a run, so it has one child at most.
        with_child = data.draw(st.booleans()) if self.fresh and (run, link.step) not in self.parents else False
        return Turn(
            run=run,
            owner=data.draw(st.sampled_from(["w0", None])) if data.draw(chance) else row.owner,
            epoch=row.epoch - data.draw(chance),
            version=row.version - data.draw(chance),
            last="another" if data.draw(chance) else row.turn,
            id=f"turn {next(self.unique)}",
            first_seq=row.history_events + 1 - data.draw(chance),
            events=events,
            consumed=unread if data.draw(st.booleans()) else unread[1:],
            status=status,
            wake_at=data.draw(st.sampled_from([None, self.in_seconds(0), self.in_seconds(4)])),
            waits=data.draw(st.sampled_from(["", '{"x":1}'])),
            closing=Status(status).ended,
            forced=data.draw(chance),
            release=data.draw(st.booleans()),
            progress=data.draw(chance),
            strike=data.draw(chance),
            result=data.draw(st.sampled_from([None, "1"])),
            error=data.draw(st.sampled_from([None, "2"])),
            starts=[self.a_start(data, self.linked(link))] if with_child else [],
            sends=[self.a_send(data) for _ in range(data.draw(st.integers(0, 2)))],
            attempt=data.draw(st.sampled_from([None, 2])),
        )

    def linked(self, link: ParentLink) -> ParentLink:
        self.parents.add((link.run, link.step))
        return link

    def in_seconds(self, seconds: int) -> int:
        return self.clock() + seconds * SECOND

    # --- what is compared

    def both(self, call: Callable[[Store], Any]) -> None:
        assert outcome(call, self.real) == outcome(call, self.model)

    def written(self, batch: Batch) -> None:
        verdicts = self.model.write(batch)
        others = self.real.write(self.sent(batch))
        for verdict, other in zip(verdicts, others, strict=True):
            if isinstance(verdict, Begun) and isinstance(other, Begun):
                self.keys.setdefault(verdict.run, other.run)
                self.known.setdefault(other.run, verdict.run)
        self.meet_children()
        assert [self.judged(other) for other in others] == [self.judged(verdict, here=True) for verdict in verdicts]

    def meet_children(self) -> None:
        """Children are started without an answer: they are known by their ids."""
        for row in self.everyone(self.model):
            if row.key not in self.keys:
                other = self.real.run(row.namespace, row.id)
                assert other is not None
                self.keys[row.key], self.known[other.key] = other.key, row.key

    def sent(self, batch: Batch) -> Batch:
        """The same batch with the store's own keys."""
        starts = [self.start_there(start) for start in batch.starts]
        sends = [self.send_there(send) for send in batch.sends]
        turns = [
            replace(
                turn,
                run=self.there(turn.run),
                starts=[self.start_there(start) for start in turn.starts],
                sends=[self.send_there(send) for send in turn.sends],
            )
            for turn in batch.turns
        ]
        return Batch(starts=starts, sends=sends, turns=turns)

    def there(self, run: int) -> int:
        return self.keys.get(run, -1)

    def start_there(self, start: Start) -> Start:
        if start.parent is None:
            return start
        return replace(start, parent=replace(start.parent, run=self.there(start.parent.run)))

    def send_there(self, send: Send) -> Send:
        if isinstance(send.to, Address):
            return send
        if isinstance(send.to, ParentLink):
            return replace(send, to=replace(send.to, run=self.there(send.to.run)))
        return replace(send, to=self.there(send.to))

    def judged(self, verdict: Any, *, here: bool = False) -> Any:
        """A verdict with the model's keys, and without the words of a reason."""
        if not here and hasattr(verdict, "run"):
            verdict = replace(verdict, run=self.known.get(verdict.run, -1))
        return replace(verdict, reason="") if hasattr(verdict, "reason") else verdict

    def translated(self, row: Any) -> Any:
        return replace(row, key=self.known[row.key], parent=None if row.parent is None else self.known[row.parent])

    @staticmethod
    def mails(mail: Sequence[Any]) -> list[tuple[Any, ...]]:
        return [(message.id, message.kind, message.name, message.data, message.at) for message in mail]

    @staticmethod
    def everyone(store: Store) -> list[Any]:
        return [row for name in dict.fromkeys(NAMESPACES) for row in store.list(Query(namespace=name, limit=1_000))]

    @invariant()
    def everything_that_can_be_read_is_the_same(self) -> None:
        rows = self.everyone(self.model)
        assert [self.translated(row) for row in self.everyone(self.real)] == rows
        for row in rows:
            other = self.there(row.key)
            assert self.real.history(other) == self.model.history(row.key)
            if row.ended_at is None:
                assert self.mails(self.real.mailbox(other)) == self.mails(self.model.mailbox(row.key))
            assert self.keys_of(self.real.children(other)) == [child.key for child in self.model.children(row.key)]
        assert {self.known[run] for run in self.real.ended([*self.known])} == set(self.model.ended([*self.keys]))
        assert set(self.keys_of(self.real.overdue())) == {row.key for row in self.model.overdue()}
        for worker in WORKERS:
            self.both(lambda store, worker=worker: store.worker(worker))  # type: ignore[misc]  # bound at once
            assert self.mails(self.real.mail(worker)) == self.mails(self.model.mail(worker))
        for namespace in NAMESPACES[1:]:
            self.both(lambda store, name=namespace: dict(store.counts(name)))  # type: ignore[misc]  # bound at once
            self.both(lambda store, name=namespace: {served.name: served for served in store.announced(name)})  # type: ignore[misc]  # bound at once

    def keys_of(self, rows: Sequence[Any]) -> list[int]:
        return [self.known[row.key] for row in rows]


def pruned(store: Store, asked: Retention) -> int:
    answer = store.prune(asked)
    count = answer.runs
    while answer.after is not None:
        answer = store.prune(replace(asked, after=answer.after))
        count += answer.runs
    return count


def outcome(call: Callable[[Store], Any], store: Store) -> Any:
    try:
        return call(store)
    except StoreError:
        return StoreError
