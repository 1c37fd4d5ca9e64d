"""Bugs planted on purpose: each changes the real code in one place, and the simulation has to find it.

They are the teeth of the tests: a check that finds none of them checks nothing. `PLANTED` names each by the words of
the list in the design; `planted(name)` plants it for as long as the context lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from msgspec import UNSET
from msgspec.structs import replace

from perdure.core import events as ev
from perdure.core import retry
from perdure.core.match import Line
from perdure.core.turn import Batch, Fenced, Turn
from perdure.stores import memory
from perdure.stores.memory import MemoryStore
from perdure.worker import claiming, residents
from perdure.worker.executing import Execution
from perdure.worker.residents import Again, Resident
from perdure.worker.shift import Shift

Patch = tuple[Any, str, Callable[[Any], Any]]
"""Where, which attribute, and what makes its replacement out of the original."""


def _fence(*, owner: bool = True, epoch: bool = True, version: bool = True) -> Patch:
    def make(original: Any) -> Any:
        def holds(self: MemoryStore, turn: Turn, row: Any) -> bool:
            return (
                row.ended_at is None
                and (not epoch or turn.epoch == row.epoch)
                and (not version or (turn.version, turn.last) == (row.version, row.turn))
                and (turn.owner is None or not owner or (turn.owner == row.owner and self._lives(turn.owner)))
            )

        return holds

    return MemoryStore, "_fence_holds", make


def _no_wake_up(original: Any) -> Any:
    return lambda self, *args, **facts: original(self, *args, **{**facts, "wake_at": None})


def _consumed_when_read(original: Any) -> Any:
    def claim(self: MemoryStore, claim: Any) -> Any:
        heads = original(self, claim)
        for head in heads:
            self._runs[head.row.key].unread.clear()
        return heads

    return claim


def _by_position(original: Any) -> Any:
    def turn(self: MemoryStore, turn: Turn, now: int, letters: Any) -> Any:
        run = self._runs.get(turn.run)
        taken = [run.unread[id].position for id in turn.consumed if id in run.unread] if run is not None else []
        verdict = original(self, turn, now, letters)
        if run is not None and taken and type(verdict).__name__ == "Committed":
            for id in [id for id, mail in run.unread.items() if mail.position <= max(taken)]:
                del run.unread[id]
        return verdict

    return turn


def _worker_clock(original: Any) -> Any:
    def init(self: Shift, store: Any, *args: Any, **named: Any) -> None:
        original(self, store, *args, **named)
        self.now = store.process.local_clock

    return init


def _same_epoch(original: Any) -> Any:
    def reap(self: MemoryStore, **named: Any) -> Any:
        before = {key: run.row for key, run in self._runs.items()}
        reaped = original(self, **named)
        for key, row in before.items():
            run = self._runs[key]
            if run.row is not row:
                run.row = replace(run.row, epoch=row.epoch)
        return reaped

    return reap


def _all_or_nothing(original: Any) -> Any:
    def write(self: MemoryStore, batch: Batch) -> Any:
        rows = [(turn, self._runs[turn.run].row) for turn in batch.turns]
        if all(self._fence_holds(turn, row) or row.turn == turn.id for turn, row in rows):
            return original(self, batch)
        rest = original(self, replace(batch, turns=()))
        return [*rest, *(Fenced(run=turn.run) for turn in batch.turns)]

    return write


def _effect_first(original: Any) -> Any:
    def commit(self: Resident, gathered: Any, **facts: Any) -> None:
        original(self, gathered, **facts)
        for step, attempt in gathered.begun:
            self._begin_step(step, attempt)

    return commit


def _counter_in_memory(original: Any) -> Any:
    def deliver(self: Resident, event: Any, value: Any = UNSET) -> None:
        if isinstance(event, ev.AttemptFailed):
            self.play.deliver(event, value)
        else:
            original(self, event, value)

    return deliver


def _outcome_lost(original: Any) -> Any:
    def rebuild(self: Resident, gathered: Any) -> None:
        for one in (gathered, self.open):
            one.events = [event for event in one.events if not isinstance(event, ev.LOCAL_OUTCOMES)]
        original(self, gathered)

    return rebuild


def _wake_at_kept(original: Any) -> Any:
    def commit(self: Resident, gathered: Any, *, status: str, **facts: Any) -> None:
        if status == self.status and "wake_at" in facts:
            facts["wake_at"] = self.wake_at
        original(self, gathered, status=status, **facts)

    return commit


def _cancelled_first(original: Any) -> Any:
    def gather(self: Resident, *args: Any, **named: Any) -> None:
        original(self, *args, **named)
        for step in self.open.given_up:
            execution = self.executions.pop(step, None)
            if execution is not None:
                self.shift.abandon(execution)

    return gather


def _dropped_at_once(original: Any) -> Any:
    return lambda self, item: None


def _time_not_kept(original: Any) -> Any:
    def take_in(self: Resident, item: Any, now: int) -> None:
        original(self, item, max(self._now(), now) if isinstance(item, Again) else now)

    return take_in


def _life_too_early(original: Any) -> Any:
    """The last recorded input counts as life already when `patched` asks."""

    def patched(self: Line, change: str, site: str) -> bool:
        if self.replaying and self.last_input and change not in self.answers:
            self.answers = {**self.answers, change: True}
            self.expected.clear()
            self.replaying = False
            self.commands.append(ev.Patched(change=change, site=site))
            return True
        return bool(original(self, change, site))

    return patched


def _no_patience(original: Any) -> Any:
    def take_outcome(self: Resident, item: Any, now: int) -> None:
        original(self, item, now)
        self.retrying = dict.fromkeys(self.retrying, now)

    return take_outcome


def _one_more_attempt(original: Any) -> Any:
    return lambda policy, error, attempt, spread: original(policy, error, max(attempt - 1, 1), spread)


def _started_at_once(original: Any) -> Any:
    return lambda run, now: original(run, now) or run.row.status == "scheduled"


def _told_as_terminated(original: Any) -> Any:
    def telling_parent(*, status: str, **facts: Any) -> Any:
        return original(status="terminated" if status == "cancelled" else status, **facts)

    return telling_parent


def _no_key_known(original: Any) -> Any:
    return lambda self, start, now: None


def _pruned_alone(original: Any) -> Any:
    """Without regard for parents and children."""

    def may_go(self: MemoryStore, row: Any, retention: Any) -> bool:
        return row.ended_at is not None and row.ended_at < retention.ended_before

    return may_go


def _too_late(original: Any) -> Any:
    return lambda self: False


PLANTED: Final[dict[str, Patch]] = {
    "commit without owner": _fence(owner=False),
    "commit without epoch": _fence(epoch=False),
    "commit without version": _fence(version=False),
    "wake-up dropped": (Resident, "_commit", _no_wake_up),
    "mail consumed before commit": (MemoryStore, "claim", _consumed_when_read),
    "mail taken by position": (MemoryStore, "_turn", _by_position),
    "timer by worker clock": (Shift, "__init__", _worker_clock),
    "reap without new epoch": (MemoryStore, "reap", _same_epoch),
    "batch fails whole": (MemoryStore, "write", _all_or_nothing),
    "effect before acknowledgement": (Resident, "_commit", _effect_first),
    "retry counter kept in memory": (Resident, "_deliver", _counter_in_memory),
    "local outcome lost on MoreMail": (Resident, "_rebuild", _outcome_lost),
    "changed wake_at not written": (Resident, "_commit", _wake_at_kept),
    "a step cancelled before acknowledgement": (Resident, "_gather", _cancelled_first),
    "an outcome dropped before acknowledgement": (Resident, "_keep_unwanted", _dropped_at_once),
    "an input's time not kept over a rebuild": (Resident, "_take_in", _time_not_kept),
    "commands of the last input not compared after patched": (Line, "patched", _life_too_early),
    "attempts begin before their retry_at": (Resident, "_take_outcome", _no_patience),
    "one attempt more than the policy": (retry, "decide", _one_more_attempt),
    "a delayed start at once": (memory, "_is_claimable", _started_at_once),
    "what is overdue judged by the worker's clock": (claiming, "STRIKES", lambda original: 0),
    "a cancelled child told as terminated": (residents, "telling_parent", _told_as_terminated),
    "every idempotency key forgotten": (MemoryStore, "_run_of_key", _no_key_known),
    "a child pruned while its parent lives": (MemoryStore, "_may_go", _pruned_alone),
}

RARE: Final[dict[str, Patch]] = {
    "an activity called after its end": (Execution, "withdraw", _too_late),
}
"""Found by one universe in a thousand or more: looked for only on the tape that is kept of each."""


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Plant one bug for as long as the context lasts."""
    where, attribute, make = {**PLANTED, **RARE}[name]
    original = getattr(where, attribute)
    setattr(where, attribute, make(original))
    try:
        yield
    finally:
        setattr(where, attribute, original)
