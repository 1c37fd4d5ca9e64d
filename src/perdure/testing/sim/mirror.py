"""The same tape on another store: every call that changes something is made there too, and has to be answered alike.

A `Mirrored` is the universe's memory store with another one beside it, on the same clock. Only keys and places in a
mailbox may differ, and the words of a reason. So at the end both hold the same histories, byte for byte (INV-22).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from msgspec.structs import replace

from perdure.core.turn import (
    Address,
    Announcement,
    Batch,
    Begun,
    Claim,
    Head,
    Lease,
    Mail,
    ParentLink,
    Pruned,
    Reaped,
    Retention,
    Row,
    Send,
    Start,
    Verdict,
)
from perdure.stores.contract import Store
from perdure.stores.memory import MemoryStore
from perdure.testing.sim.checks import Violation

T = TypeVar("T")


class Mirrored(MemoryStore):
    """See the module. make: the other store, given the universe's clock."""

    def __init__(self, clock: Callable[[], int], make: Callable[[Callable[[], int]], Store]) -> None:
        super().__init__(clock=clock)
        self.other = make(clock)
        self.compared = 0
        self._there: dict[int, int] = {}
        self._here: dict[int, int] = {}

    # --- calls that change something ---

    def write(self, batch: Batch) -> list[Verdict]:
        verdicts = super().write(batch)
        others = self.other.write(self._batch_there(batch))
        for verdict, other in zip(verdicts, others, strict=True):
            if isinstance(verdict, Begun) and isinstance(other, Begun):
                self._meet(verdict.run, other.run)
        for run in self._runs.values():
            if run.row.key not in self._there:
                # A child is started without an answer: it is known by its id.
                child = self.other.run(run.row.namespace, run.row.id)
                if child is None:
                    raise Violation("INV-22", f"{run.row.id} was not started in {self.other.url}")
                self._meet(run.row.key, child.key)
        self._same("write", [_plain(each) for each in verdicts], [self._verdict_here(each) for each in others])
        return verdicts

    def claim(self, claim: Claim) -> list[Head]:
        heads = super().claim(claim)
        others = self.other.claim(claim)
        self._same(
            "claim",
            [(head.row, _letters(head.mail)) for head in heads],
            [(self._row_here(head.row), _letters(head.mail)) for head in others],
        )
        return heads

    def announce(self, announcement: Announcement) -> Lease:
        return self._both("announce", super().announce, self.other.announce, announcement)

    def heartbeat(self, incarnation: str) -> Lease | None:
        return self._both("heartbeat", super().heartbeat, self.other.heartbeat, incarnation)

    def reap(self, *, limit: int = 1000) -> Reaped:
        return self._both("reap", lambda: super(Mirrored, self).reap(limit=limit), lambda: self.other.reap(limit=limit))

    def retire(self, incarnation: str) -> int:
        return self._both("retire", super().retire, self.other.retire, incarnation)

    def prune(self, retention: Retention) -> Pruned:
        before = set(self._runs)
        pruned = super().prune(retention)
        other = self.other.prune(retention)
        self._same("prune", pruned.runs, other.runs)
        left = self.other.rows([self._there[key] for key in before - self._runs.keys()])
        self._same("what was pruned and is there", [], [row.id for row in left])
        return pruned

    # --- at the end ---

    def check(self) -> None:
        """Everything that can be read is the same."""
        for key, run in self._runs.items():
            there = self._there[key]
            [row] = self.other.rows([there])
            self._same(f"the row of {run.row.id}", run.row, self._row_here(row))
            self._same(f"the history of {run.row.id}", run.history, self.other.history(there))
            if run.row.ended_at is None:
                letters = _letters(self.other.mailbox(there))
                self._same(f"the mailbox of {run.row.id}", _letters(self.mailbox(key)), letters)
        for namespace in {run.row.namespace for run in self._runs.values()}:
            self._same("the counts", dict(self.counts(namespace)), dict(self.other.counts(namespace)))

    def close(self) -> None:
        super().close()
        self.other.close()

    # --- what is the same ---

    def _both(self, what: str, here: Callable[..., T], there: Callable[..., T], *arguments: Any) -> T:
        answer = here(*arguments)
        self._same(what, answer, there(*arguments))
        return answer

    def _same(self, what: str, here: Any, there: Any) -> None:
        self.compared += 1
        if here != there:
            raise Violation("INV-22", f"{what}: {here!r} in memory, {there!r} in {self.other.url}")

    def _meet(self, here: int, there: int) -> None:
        self._there[here], self._here[there] = there, here

    # --- keys ---

    def _batch_there(self, batch: Batch) -> Batch:
        return replace(
            batch,
            starts=[self._start_there(start) for start in batch.starts],
            sends=[self._send_there(send) for send in batch.sends],
            turns=[
                replace(
                    turn,
                    run=self._there.get(turn.run, -1),
                    starts=[self._start_there(start) for start in turn.starts],
                    sends=[self._send_there(send) for send in turn.sends],
                )
                for turn in batch.turns
            ],
        )

    def _start_there(self, start: Start) -> Start:
        return start if start.parent is None else replace(start, parent=self._link_there(start.parent))

    def _send_there(self, send: Send) -> Send:
        if isinstance(send.to, Address):
            return send
        if isinstance(send.to, ParentLink):
            return replace(send, to=self._link_there(send.to))
        return replace(send, to=self._there.get(send.to, -1))

    def _link_there(self, link: ParentLink) -> ParentLink:
        return replace(link, run=self._there.get(link.run, -1))

    def _verdict_here(self, verdict: Any) -> Any:
        if hasattr(verdict, "run"):
            verdict = replace(verdict, run=self._here.get(verdict.run, -1))
        return _plain(verdict)

    def _row_here(self, row: Row) -> Row:
        parent = None if row.parent is None else self._here.get(row.parent, -1)
        return replace(row, key=self._here.get(row.key, -1), parent=parent)


def _plain(verdict: Any) -> Any:
    """A verdict without the words of a reason."""
    return replace(verdict, reason="") if hasattr(verdict, "reason") else verdict


def _letters(mail: Sequence[Mail]) -> list[tuple[Any, ...]]:
    """Messages without their keys and places."""
    return [(each.id, each.kind, each.name, each.data, each.at) for each in mail]
