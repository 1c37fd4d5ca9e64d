"""A process's way to the store, with everything that can happen on it: the real store is a `MemoryStore` behind it.

Each call is one choice. Where a call is lost, delayed or doubled, the real store is asked all the same, before,
later or twice: whatever it wrote is true, and is checked by `Checks` right after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from msgspec.structs import replace

from perdure.core.errors import StoreUnavailable
from perdure.core.turn import (
    Announcement,
    Batch,
    Busy,
    Claim,
    Head,
    Key,
    Lease,
    Mail,
    Pruned,
    Query,
    Reaped,
    Retention,
    Row,
    Turn,
    Verdict,
)

if TYPE_CHECKING:
    from perdure.testing.sim.world import Process, World


T = TypeVar("T")


class Crashed(BaseException):
    """The process died here; only the universe catches it."""


FAULTS: Final = (
    "crash_before",
    "crash_after",
    "error_before",
    "ack_lost",
    "delayed",
    "duplicated",
    "busy",
    "late_mail",
)


def _held(turn: Turn, hidden: set[Key]) -> bool:
    return turn.closing and turn.run in hidden


class SimStore:
    """See the module. One for each life of a process."""

    url = "memory://"
    durability = "D1"
    transactions = False

    def __init__(self, world: World, process: Process) -> None:
        self.world = world
        self.process = process
        self.real = world.store

    def now(self) -> int:
        """The worker's estimate of the store's clock: a lower bound."""
        return self.real.now() - self.process.lag

    # --- calls that change something ---

    def write(self, batch: Batch) -> list[Verdict]:
        return self._call("write", lambda: self._write(batch), batch)

    def _write(self, batch: Batch) -> list[Verdict]:
        # A message whose transaction is open holds the end of its run up.
        hidden = self.world.hidden_runs()
        if hidden and any(turn.closing and turn.run in hidden for turn in batch.turns):
            rest = replace(batch, turns=[turn for turn in batch.turns if not _held(turn, hidden)])
            answers = iter(self.world.checks.write(rest))
            before = [next(answers) for _ in (*batch.starts, *batch.sends)]
            return [*before, *(Busy(run=t.run) if _held(t, hidden) else next(answers) for t in batch.turns)]
        return self.world.checks.write(batch)

    def claim(self, claim: Claim) -> list[Head]:
        heads: list[Head] = self._call("claim", lambda: self.world.checks.claim(claim))
        return [replace(head, mail=self.world.visible(head.mail)) for head in heads]

    def announce(self, announcement: Announcement) -> Lease:
        def announce() -> Lease:
            lease: Lease = self.world.checks.watched("announce", self.real.announce, announcement)
            return lease

        return self._call("announce", announce)

    def heartbeat(self, incarnation: str) -> Lease | None:
        lease: Lease | None = self._call("heartbeat", lambda: self.real.heartbeat(incarnation))
        return lease

    def reap(self, *, limit: int = 1000) -> Reaped:
        reaped: Reaped = self._call("reap", lambda: self.world.checks.reap())
        return reaped

    def retire(self, incarnation: str) -> int:
        count: int = self._call("retire", lambda: self.world.checks.watched("retire", self.real.retire, incarnation))
        return count

    def prune(self, retention: Retention) -> Pruned:
        return self._call("prune", lambda: self.world.checks.prune(retention))

    # --- calls that only read ---

    def history(self, run: Key, after: int = 0) -> list[str]:
        return self._read("history", lambda: self.real.history(run, after))

    def histories(self, runs: Sequence[Key]) -> Mapping[Key, list[str]]:
        found: Mapping[Key, list[str]] = self._read("histories", lambda: self.real.histories(runs))
        return found

    def mail(self, incarnation: str) -> list[Mail]:
        return self._read("mail", lambda: list(self.world.visible(self.real.mail(incarnation))))

    def mail_is_likely(self, incarnation: str) -> bool:
        return self.real.mail_is_likely(incarnation)

    def mailbox(self, run: Key) -> list[Mail]:
        return self._read("mailbox", lambda: list(self.world.visible(self.real.mailbox(run))))

    def run(self, namespace: str, id: str) -> Row | None:
        return self._read("run", lambda: self.real.run(namespace, id))

    def rows(self, keys: Sequence[Key]) -> list[Row]:
        return self._read("rows", lambda: self.real.rows(keys))

    def ended(self, keys: Sequence[Key]) -> list[Key]:
        return self._read("ended", lambda: self.real.ended(keys))

    def children(self, run: Key) -> list[Row]:
        return self._read("children", lambda: self.real.children(run))

    def overdue(self, *, limit: int = 100) -> list[Row]:
        return self._read("overdue", lambda: self.real.overdue(limit=limit))

    def suspects(self, claim: Claim) -> bool:
        return bool(self._read("suspects", lambda: self.real.suspects(claim)))

    def announced(self, namespace: str) -> list[Any]:
        return self._read("announced", lambda: self.real.announced(namespace))

    def owned(self, incarnation: str) -> list[Key]:
        return self._read("owned", lambda: self.real.owned(incarnation))

    def held_open(self, run: Key) -> bool:
        return self.real.held_open(run)

    def worker(self, incarnation: str) -> str | None:
        return self.real.worker(incarnation)

    def counts(self, namespace: str, **asked: Any) -> Any:
        return self.real.counts(namespace, **asked)

    def query(self, query: Query) -> list[Row]:
        return self.real.list(query)

    # --- waiting: the universe knows when something may have changed ---

    def wait(self, incarnation: str, queues: Sequence[str], timeout: float) -> bool:
        return True

    def wake(self) -> None:
        """A hint, given by the universe."""

    def close(self) -> None:
        """The store outlives the process."""

    # --- faults ---

    def _call(self, name: str, apply: Callable[[], T], batch: Batch | None = None) -> T:
        world = self.world
        fault = world.fault(self.process, name)
        if fault is None:
            return apply()
        world.note(self.process.name, fault, name)
        world.sometimes[f"{fault} at {name}"] += 1
        if fault == "crash_before":
            raise Crashed
        if fault == "error_before":
            raise self._trouble(name)
        if fault == "delayed":
            world.network.append((name, apply))
            raise self._trouble(name)
        if fault == "busy":
            assert batch is not None
            return cast("T", self._busy(batch))
        if fault == "late_mail":
            assert batch is not None
            world.hide(batch)
            apply()
            raise self._trouble(name)
        answer = apply()
        if fault == "duplicated":
            again = apply()
            return again if name in ("write", "heartbeat") else answer
        if fault == "crash_after":
            raise Crashed
        raise self._trouble(name)  # ack_lost

    def _busy(self, batch: Batch) -> list[Verdict]:
        """A turn meets a sender's open transaction: it alone is not written."""
        if not batch.turns:
            return self._write(batch)
        which = self.world.tape.choose(len(batch.turns), "busy which")
        rest = [turn for i, turn in enumerate(batch.turns) if i != which]
        verdicts: list[Verdict] = self._write(replace(batch, turns=rest))
        verdicts.insert(len(batch.starts) + len(batch.sends) + which, Busy(run=batch.turns[which].run))
        return verdicts

    def _read(self, name: str, ask: Callable[[], T]) -> T:
        fault = self.world.fault(self.process, name)
        if fault is None:
            return ask()
        self.world.note(self.process.name, fault, name)
        if fault.startswith("crash"):
            self.world.sometimes[f"crash at {name}"] += 1
            raise Crashed
        self.world.sometimes[f"error at {name}"] += 1
        raise self._trouble(name)

    def _trouble(self, name: str) -> StoreUnavailable:
        return StoreUnavailable(f"simulated: the outcome of {name} is not known", store=self.url)
