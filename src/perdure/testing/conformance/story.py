"""What the stories of the promises are told with. Nothing here asserts what a promise is about."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from perdure.core.turn import (
    Announced,
    Announcement,
    Batch,
    Begun,
    Claim,
    Committed,
    Head,
    Key,
    Row,
    Send,
    SendVerdict,
    Start,
    StartVerdict,
    Turn,
    TurnVerdict,
    Verdict,
)
from perdure.stores.contract import Store

NAMESPACE = "tests"
SECOND = 1_000_000
TTL = 15 * SECOND
EVENT = '{"kind":"resumed","at":1}'
"""An event of a history; stores never look inside."""


class Clock:
    """A clock that stands still unless told: microseconds since the epoch."""

    def __init__(self, now: int = 1_750_000_000_000_000) -> None:
        self._now = now

    def __call__(self) -> int:
        return self._now

    def advance(self, **duration: float) -> None:
        """Go on by `seconds=`, `minutes=`, … as `timedelta` has them."""
        self._now += timedelta(**duration) // timedelta(microseconds=1)


# --- starts and sends


def start(id: str = "run", **changes: Any) -> Start:
    """A start with nothing special but what is named."""
    facts: dict[str, Any] = {
        "namespace": NAMESPACE,
        "id": id,
        "workflow": "orders",
        "input": "[[],{}]",
        "digest": "digest of the input",
        "seed": f"seed of {id}",
        "event": '{"kind":"started","at":1,"seed":"s"}',
    }
    return Start(**facts | changes)


def starting(store: Store, id: str = "run", **changes: Any) -> StartVerdict:
    """The answer to one start."""
    [verdict] = store.write(Batch(starts=[start(id, **changes)]))
    return verdict  # type: ignore[return-value]  # the only item is a start


def started(store: Store, id: str = "run", **changes: Any) -> Key:
    """The key of a new run."""
    verdict = starting(store, id, **changes)
    assert isinstance(verdict, Begun), verdict
    return verdict.run


def sending(store: Store, to: Any, id: str = "message", **changes: Any) -> SendVerdict:
    """The answer to one message."""
    [verdict] = store.write(Batch(sends=[signal(to, id, **changes)]))
    return verdict  # type: ignore[return-value]  # the only item is a send


def signal(to: Any, id: str = "message", **changes: Any) -> Send:
    return Send(**{"to": to, "id": id, "kind": "signal", "name": "approval", "data": '["yes"]'} | changes)


# --- workers, and what they hold


def serve(store: Store, worker: str = "worker", **changes: Any) -> None:
    """The worker is there; nothing if it was announced before."""
    if store.heartbeat(worker) is None:
        announce(store, worker, **changes)


def announce(store: Store, worker: str = "worker", *, workflows: Sequence[str] = ("orders",), **changes: Any) -> None:
    """The worker says what it serves."""
    facts: dict[str, Any] = {
        "incarnation": worker,
        "name": f"{worker} by name",
        "namespace": NAMESPACE,
        "queues": ["default"],
        "serves": [Announced(name=name) for name in workflows],
        "ttl": TTL,
    }
    store.announce(Announcement(**facts | changes))


def claiming(store: Store, worker: str = "worker", **changes: Any) -> list[Head]:
    """What a claim of this worker answers."""
    facts: dict[str, Any] = {
        "incarnation": worker,
        "namespace": NAMESPACE,
        "queues": ["default"],
        "workflows": ["orders"],
    }
    return store.claim(Claim(**facts | changes))


def claimed(store: Store, worker: str = "worker", **changes: Any) -> Holder:
    """The one run that there is to claim, in the hands of this worker."""
    serve(store, worker)
    [head] = claiming(store, worker, **changes)
    return Holder(store, head.row)


def held(store: Store, id: str = "run", worker: str = "worker", **changes: Any) -> Holder:
    """A new run in the hands of the worker that started it."""
    serve(store, worker)
    return Holder(store, row(store, started(store, id, owner=worker, **changes)))


class Holder:
    """Somebody who holds a run: knows its fence, and follows it with each commit of its own."""

    def __init__(self, store: Store, row: Row) -> None:
        self.store = store
        self.run = row.key
        self.owner, self.epoch, self.version, self.last = row.owner, row.epoch, row.version, row.turn
        self.events = row.history_events
        self._turns = 0

    def turn(self, **changes: Any) -> Turn:
        """The next turn of the run: it goes on running, nothing else, but for what is named."""
        self._turns += 1
        facts: dict[str, Any] = {
            "run": self.run,
            "owner": self.owner,
            "epoch": self.epoch,
            "version": self.version,
            "last": self.last,
            "id": f"{self.owner}/{self.run}/{self.epoch}/{self.version}/{self._turns}",
            "first_seq": self.events + 1,
            "status": "running",
        }
        return Turn(**facts | changes)

    def ending(self, result: str = '"done"', **changes: Any) -> Turn:
        """The turn that completes the run."""
        return self.turn(**{"status": "completed", "closing": True, "result": result} | changes)

    def writes(self, turn: Turn) -> TurnVerdict:
        """The answer to this turn; the holder follows if it is committed."""
        [verdict] = self.store.write(Batch(turns=[turn]))
        if isinstance(verdict, Committed):
            self.follows(turn)
        return verdict  # type: ignore[return-value]  # the only item is a turn

    def follows(self, turn: Turn) -> None:
        self.version, self.last = turn.version + 1, turn.id
        self.events += len(turn.events)

    def commits(self, **changes: Any) -> Row:
        """Write the next turn, which must succeed; the row after it."""
        verdict = self.writes(self.turn(**changes))
        assert verdict == Committed(run=self.run)
        return self.row

    def ends(self, **changes: Any) -> Row:
        """Complete the run; the row after it."""
        verdict = self.writes(self.ending(**changes))
        assert verdict == Committed(run=self.run)
        return self.row

    def parks(self, **changes: Any) -> Row:
        """Wait, and give the run up."""
        return self.commits(**{"status": "waiting", "release": True} | changes)

    @property
    def row(self) -> Row:
        return row(self.store, self.run)


def without_code(store: Store, run: Key, status: str = "terminated", **changes: Any) -> Turn:
    """An end made by somebody who only read the row."""
    outsider = Holder(store, row(store, run))
    facts = {"owner": None, "id": f"outsider/{run}/{outsider.version}", "status": status}
    return outsider.turn(**facts | {"closing": status != "quarantined"} | changes)


def ended(store: Store, id: str = "run", **changes: Any) -> Key:
    """A run that has completed."""
    holder = held(store, id, **changes)
    holder.ends()
    return holder.run


# --- looking


def row(store: Store, run: Key) -> Row:
    [found] = store.rows([run])
    return found


def answers(store: Store, *, starts: Any = (), sends: Any = (), turns: Any = ()) -> list[Verdict]:
    """The answers to a whole batch."""
    return store.write(Batch(starts=starts, sends=sends, turns=turns))


def unread(store: Store, run: Key) -> list[str]:
    """Ids of the unread messages of a run, in order."""
    return [message.id for message in store.mailbox(run)]


def everything(store: Store, run: Key) -> tuple[Row, list[str], list[str]]:
    """Row, history and mailbox: equal before and after what changes nothing."""
    return row(store, run), store.history(run), unread(store, run)
