"""The invariants of `reliability.md`, checked right after every change of the store; each is named by its id.

`Checks` is the oracle: it knows each run's history as it was (a shadow), what clients were acknowledged
(`acknowledged`), and what the functions of steps really did (`Effects`). A violation is raised where it happens.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec

from perdure.core import events as ev
from perdure.core import stored
from perdure.core.limits import ERROR_TEXT, Limits
from perdure.core.match import PENDING
from perdure.core.status import ENDED, Status
from perdure.core.turn import (
    Address,
    Batch,
    Begun,
    Claim,
    Committed,
    Duplicate,
    Existing,
    Fenced,
    Head,
    Kept,
    MailboxFull,
    MoreMail,
    Pruned,
    Reaped,
    Retention,
    Row,
    Send,
    Turn,
    Unstorable,
    Verdict,
)
from perdure.runtime.drive_sync import BodyThreads
from perdure.runtime.play import Play
from perdure.testing.sim import flows
from perdure.worker.claiming import MOST_LOOKED_AT
from perdure.worker.ending import STRIKES
from perdure.worker.executing import StepInfo
from perdure.worker.shift import Shift

if TYPE_CHECKING:
    from perdure.testing.sim.world import Process, World

THREADS: Final = BodyThreads(1000)
"""Threads of sync bodies, of all universes of this process: only one of them ever runs at a time."""
LATEST: Final = 30 * 1_000_000
"""Microseconds beyond a lease by which a timer may be late once everything is healed: runs in line before it."""
WITHOUT_CODE: Final = frozenset({"terminated", "timed_out"})


class Violation(BaseException):
    """A promise was broken. No `Exception`: nothing in between may swallow it."""

    def __init__(self, id: str, text: str) -> None:
        self.id = id
        self.text = text
        super().__init__(f"{id}: {text}")


@dataclass
class Shadow:
    """One run as its history says it is, kept beside the store."""

    row: Row
    texts: list[str] = field(default_factory=list)
    chain: str = ""
    events: list[ev.Event] = field(default_factory=list)
    now: int = 0
    accepted: int = 0
    positions: dict[str, int] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    signals: set[str] = field(default_factory=set)
    taken: dict[str, int] = field(default_factory=dict)  # message -> place in the history
    last_taken: int = 0
    ended: ev.Ended | None = None
    outcomes: dict[str, int] = field(default_factory=dict)  # step -> place in the history
    attempts: Counter[str] = field(default_factory=Counter)
    by_epoch: Counter[tuple[str, int]] = field(default_factory=Counter)
    claims: dict[int, int] = field(default_factory=dict)  # epoch -> events in the history at that claim
    sleeps: dict[str, int] = field(default_factory=dict)
    waits: dict[str, int | None] = field(default_factory=dict)
    retries: dict[str, int] = field(default_factory=dict)
    remotes: dict[str, str] = field(default_factory=dict)
    promised: dict[tuple[int, str, int], int] = field(default_factory=dict)  # (epoch, step, attempt) -> time it had

    @property
    def loose(self) -> bool:
        """Whether it is a random program, which may wait for ever for something of its own."""
        return self.row.workflow.startswith("program-")

    @property
    def timers(self) -> list[int]:
        """All due times that the history alone tells."""
        return [*self.sleeps.values(), *self.retries.values(), *(d for d in self.waits.values() if d is not None)]


class Effects:
    """What the functions of steps really did."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.active: dict[tuple[str, str, str], StepInfo] = {}
        self.executions: Counter[tuple[str, str, int]] = Counter()
        self.total = 0

    def begins(self, info: StepInfo) -> Any:
        world = self.world
        process = world.here
        assert process is not None
        shift = process.shift
        self.total += 1
        world.note(process.name, "executes", f"{info.run_id} {info.id} attempt {info.attempt}")
        id, epoch = _holder(shift, info)
        place = (process.life, id, info.id)
        try:
            there = self.active.get(place)
            # One that was cancelled may still be about to end: its claim is lost, and this is a newer one.
            if there is not None and not there.cancelled:
                raise Violation("INV-4", f"step {info.id} of {info.run_id} is executed twice at once in {process.name}")
            self.active[place] = info
            self.executions[id, info.id, epoch] += 1
            world.checks.execution_begins(id, info, epoch)
        except Violation as violation:
            # Raised inside a step it would only fail that step.
            world.violation = world.violation or violation
            raise
        return place, epoch, info, process

    def tells(self, info: StepInfo, name: str) -> None:
        to = Address(namespace="default", id=info.run_id)
        send = Send(to=to, id=f"told-{info.id}", kind="signal", name=name, data="0")
        try:
            self.world.checks.write(Batch(sends=[send]))
        except Violation as violation:
            self.world.violation = self.world.violation or violation
            raise

    def ends(self, token: Any) -> None:
        (place, _, info, _) = token
        if self.active.get(place) is info:
            del self.active[place]

    def cancelled(self, token: Any) -> None:
        (place, epoch, info, process) = token
        try:
            self.world.checks.execution_cancelled(place[1], info, epoch, process)
        except Violation as violation:
            self.world.violation = self.world.violation or violation
            raise


def _holder(shift: Shift, info: StepInfo) -> tuple[str, int]:
    """The run a function belongs to, an activity's own, and the epoch under which it is held."""
    for activity in shift.activities.values():
        row = activity.row
        if (row.parent_id, row.parent_step) == (info.run_id, info.id) or row.id == info.run_id:
            return row.id, row.epoch
    for resident in shift.residents.values():
        if resident.this.id == info.run_id:
            return info.run_id, resident.epoch
    return info.run_id, 0


class Checks:
    """See the module."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.store = world.store
        self.shadows: dict[int, Shadow] = {}
        self.by_id: dict[str, Shadow] = {}
        self.latest = 0  # the greatest time the store's clock ever showed
        self.healed_at: int | None = None  # by the store's clock
        self.latest_timer = 0  # how late the latest timer was, once everything was healed
        self.commits = 0
        self.started: dict[str, str] = {}
        self.sent: dict[tuple[str, str], str] = {}
        self.keys: dict[tuple[str, str], int] = {}  # (workflow, idempotency key) -> run
        self.terminated: set[str] = set()
        self.pruned: set[str] = set()

    # --- calls ---

    def write(self, batch: Batch) -> list[Verdict]:
        store = self.store
        self.latest = max(self.latest, store.now())
        before = {turn.run: store._runs[turn.run].row for turn in batch.turns if turn.run in store._runs}
        targets = ((send.id, self.store._target(send.to)) for send in batch.sends)
        accepted = {(run.row.key, id): id in run.accepted for id, run in targets if run is not None}
        mail = {turn.run: set(store._runs[turn.run].unread) for turn in batch.turns if turn.run in store._runs}
        verdicts = store.write(batch)
        answers = verdicts[len(batch.starts) + len(batch.sends) :]
        applied: dict[int, Turn] = {}
        touched: set[int] = set()
        for turn, verdict in zip(batch.turns, answers, strict=True):
            row = before.get(turn.run)
            if row is not None:
                self._verdict(turn, verdict, row, mail[turn.run], applied, again=turn.run in touched)
            touched.add(turn.run)
            self.world.note("store", type(verdict).__name__, turn)
        self._keys(batch, verdicts)
        self._sizes(batch)
        self._refused(batch, verdicts, accepted, before)
        self._look("write", applied)
        return verdicts

    def _keys(self, batch: Batch, verdicts: Sequence[Verdict]) -> None:
        """INV-13: every start with the same key is the same run."""
        for start, verdict in zip(batch.starts, verdicts, strict=False):
            if start.idempotency_key is None or not isinstance(verdict, (Begun, Existing)):
                continue
            known = self.keys.setdefault((start.idempotency_scope, start.idempotency_key), verdict.run)
            if verdict.run != known:
                raise Violation("INV-13", f"key {start.idempotency_key} is run {known} and run {verdict.run}")
            if isinstance(verdict, Existing):
                self.world.sometimes["key met again"] += 1

    def _sizes(self, batch: Batch) -> None:
        """INV-21: a batch, a mailbox and an error's text stay within their limits."""
        # Strays are handed back by the housekeeper, who is no committer.
        strays = all(turn.release and not turn.events for turn in batch.turns)
        most = MOST_LOOKED_AT if strays else self.world.config.batch
        if max(len(batch.starts), len(batch.sends), len(batch.turns)) > most:
            raise Violation("INV-21", f"a batch has more than {most} items of a kind")
        for turn in batch.turns:
            if turn.error is not None and len(turn.error.encode()) > 4 * ERROR_TEXT:
                raise Violation("INV-21", f"the error of run {turn.run} has {len(turn.error)} characters")
        for send in batch.sends:
            run = self.store._target(send.to) if send.limit is not None else None
            if run is not None and send.limit is not None and send.id in run.unread:
                # Those that had to fit are no one's fault.
                asked = sum(1 for mail in run.unread.values() if mail.kind == "signal" and mail.id[:1] == "m")
                if asked > send.limit:
                    raise Violation("INV-21", f"{run.row.id} has {asked} unread signals, {send.limit} may be")

    def _refused(
        self,
        batch: Batch,
        verdicts: Sequence[Verdict],
        accepted: dict[tuple[int, str], bool],
        before: dict[int, Row],
    ) -> None:
        """INV-21: what was refused has changed nothing."""
        turns = Counter(turn.run for turn in batch.turns)
        for turn, answer in zip(batch.turns, verdicts[len(verdicts) - len(batch.turns) :], strict=True):
            row = before.get(turn.run)
            if row is None or isinstance(answer, Committed) or turns[turn.run] > 1:
                continue
            now = self.store._runs[turn.run].row
            if (now.version, now.history_events, now.status) != (row.version, row.history_events, row.status):
                raise Violation("INV-21", f"a turn of {row.id} was answered {answer}, and changed it")
        for send, verdict in zip(batch.sends, verdicts[len(batch.starts) :], strict=False):
            run = self.store._target(send.to)
            if run is None or isinstance(verdict, (Kept, Duplicate)):
                continue
            if isinstance(verdict, MailboxFull):
                self.world.sometimes["mailbox full"] += 1
            if send.id in run.accepted and not accepted[run.row.key, send.id]:
                raise Violation("INV-21", f"{run.row.id}: message {send.id} was refused ({verdict}) and kept")
        begun = sum(1 for verdict in verdicts[: len(batch.starts)] if isinstance(verdict, Begun))
        new = sum(1 for key in self.store._runs if key not in self.shadows)
        children = sum(len(turn.starts) for turn in batch.turns)
        if new > begun + children:
            raise Violation("INV-21", f"{new} runs are new, {begun + children} starts took effect")

    def _verdict(
        self, turn: Turn, verdict: Verdict, row: Row, unread: set[str], applied: dict[int, Turn], *, again: bool
    ) -> None:
        if isinstance(verdict, Unstorable):
            raise Violation("INV-17", f"a turn of {row.id} cannot be stored: {verdict.reason}")
        fence = (
            row.ended_at is None
            and (turn.epoch, turn.version, turn.last) == (row.epoch, row.version, row.turn)
            and (turn.owner is None or (turn.owner == row.owner and self.store._lives(turn.owner)))
        )
        known = (row.turn, row.version) == (turn.id, turn.version + 1)
        if isinstance(verdict, Committed) and not known and not again:
            if not fence:
                raise Violation(
                    "INV-6",
                    f"a commit of {row.id} took effect under owner {turn.owner}, epoch {turn.epoch}, version "
                    f"{turn.version}; the row had {row.owner}, {row.epoch}, {row.version}",
                )
            applied[turn.run] = turn
        elif isinstance(verdict, Fenced) and (fence or known) and not again:
            raise Violation("INV-17", f"a turn of {row.id} was fenced although its fence held")
        elif isinstance(verdict, MoreMail):
            self.world.sometimes["more mail"] += 1
            if turn.closing and unread <= set(turn.consumed):
                raise Violation("INV-10", f"{row.id} was sent back although it knew all its mail")
            self._promise(turn)
        if isinstance(verdict, Fenced):
            self.world.sometimes["fenced"] += 1
        elif isinstance(verdict, Committed) and known:
            self.world.sometimes["committed before"] += 1

    def _promise(self, turn: Turn) -> None:
        """A turn that is thrown away: its local outcomes must come again with the times they had."""
        shadow = self.shadows[turn.run]
        for text in turn.events:
            event = stored.decode(text)
            if isinstance(event, ev.LOCAL_OUTCOMES):
                shadow.promised.setdefault((turn.epoch, event.step, event.attempt), event.at)

    def claim(self, claim: Claim) -> list[Head]:
        self.latest = max(self.latest, self.store.now())
        before = {key: run.row for key, run in self.store._runs.items()}
        heads = self.store.claim(claim)
        for head in heads:
            row = head.row
            old = before[row.key]
            if row.epoch <= old.epoch:
                raise Violation("INV-6", f"a claim of {row.id} did not raise its epoch")
            if old.owner is not None:
                raise Violation("INV-6", f"a claim took {row.id} from {old.owner}")
            if old.status == Status.SCHEDULED:
                self._starts(old, head)
            served = claim.activities if row.kind == "activity" else claim.workflows
            if row.workflow not in served:
                raise Violation("INV-24", f"{row.id} was claimed by a worker that does not serve {row.workflow}")
        self._look("claim", {})
        for head in heads:
            self.shadows[head.row.key].claims[head.row.epoch] = head.row.history_events
        return heads

    def _starts(self, row: Row, head: Head) -> None:
        """INV-11: a start that was delayed comes neither early, unless the run is asked to end, nor late."""
        assert row.wake_at is not None
        if any(mail.kind == "cancel" for mail in head.mail):
            self.world.sometimes["cancelled before its start"] += 1
        elif row.wake_at > self.latest:
            raise Violation("INV-11", f"{row.id} starts {(row.wake_at - self.latest) / 1e6:.3f} s before its time")
        else:
            self.world.sometimes["started later"] += 1
            self._lateness(row, "its start", row.wake_at)

    def reap(self) -> Reaped:
        before = {key: run.row for key, run in self.store._runs.items()}
        reaped = self.store.reap()
        for key, old in before.items():
            row = self.store._runs[key].row
            if row is not old and row.epoch <= old.epoch:
                raise Violation("INV-6", f"{row.id} was handed back without a new epoch")
        self._look("reap", {})
        if reaped.runs:
            self.world.sometimes["reaped"] += 1
        return reaped

    def prune(self, retention: Retention) -> Pruned:
        """Only what has ended long enough ago goes, whole, and nothing that a live run may still ask about."""
        store = self.store
        rows = {key: run.row for key, run in store._runs.items()}
        pruned = store.prune(retention)
        gone = rows.keys() - store._runs.keys()
        for key in gone:
            row = rows[key]
            if row.ended_at is None or row.ended_at >= retention.ended_before:
                raise Violation("INV-7", f"{row.id} was pruned, and ended at {row.ended_at}")
            above = None if row.parent is None else rows.get(row.parent)
            if above is not None and above.ended_at is None and row.parent_close == "cancel":
                raise Violation("INV-7", f"{row.id} was pruned, and {above.id}, which it ends with, lives")
            if any(other.parent == key and other.ended_at is None for other in rows.values()):
                raise Violation("INV-7", f"{row.id} was pruned, and a child of it lives")
            self.pruned.add(row.id)
            self.world.sometimes["pruned"] += 1
        if pruned.runs != len(gone) or pruned.runs > retention.limit:
            raise Violation("INV-7", f"{len(gone)} runs were pruned, {pruned.runs} are said to be")
        kept = {run for run, _ in store._idempotency.values()} | store._children.keys()
        if gone & kept or gone & set(store._newest.values()):
            raise Violation("INV-25", "something is kept of a run that was pruned")
        self._look("prune", {})
        return pruned

    def watched(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        answer = call(*args)
        self._look(name, {})
        return answer

    # --- after every change ---

    def _look(self, call: str, applied: dict[int, Turn]) -> None:
        self.latest = max(self.latest, self.store.now())
        for key, run in self.store._runs.items():
            shadow = self.shadows.get(key)
            if shadow is None:
                shadow = self.shadows[key] = self.by_id[run.row.id] = Shadow(row=run.row)
                shadow.claims[run.row.epoch] = len(run.history)
                self._changed(shadow, run, call, applied.get(key), None)
            elif run.row is not shadow.row:
                old = shadow.row
                shadow.row = run.row
                self._changed(shadow, run, call, applied.get(key), old)
            elif len(run.unread) != len(shadow.unread) or len(run.accepted) != shadow.accepted:
                self._mail(shadow, run, ())

    def _changed(self, shadow: Shadow, run: Any, call: str, turn: Turn | None, old: Row | None) -> None:
        self.commits += 1
        row: Row = run.row
        if old is not None:
            if row.epoch < old.epoch or row.version < old.version:
                raise Violation("INV-6", f"epoch or version of {row.id} went back")
            if old.ended_at is not None and (row.status, row.result) != (old.status, old.result):
                raise Violation("INV-2", f"the end of {row.id} changed from {old.status} to {row.status}")
        history: list[str] = run.history
        known = len(shadow.texts)
        if history[:known] != shadow.texts:
            raise Violation("INV-1", f"the history of {row.id} changed before event {known + 1}")
        if len(history) != row.history_events:
            raise Violation("INV-8", f"{row.id} has {len(history)} events, its row says {row.history_events}")
        new = history[known:]
        shadow.texts.extend(new)
        if new:
            shadow.chain = hashlib.blake2b((shadow.chain + "".join(new)).encode(), digest_size=16).hexdigest()
        messages = [self._event(shadow, row, stored.decode(text), turn) for text in new]
        self._mail(shadow, run, [m for m in messages if m is not None])
        if row.kind == "activity" and row.status == Status.WAITING and row.wake_at is not None:
            shadow.retries[row.parent_step or row.id] = row.wake_at
        if row.kind == "workflow":
            status = shadow.ended.status if shadow.ended is not None else None
            if (row.status if row.status in ENDED else None) != status:
                raise Violation("INV-2", f"{row.id} is {row.status}, its history says {status}")
        if row.ended_at is None:
            self._wakes(shadow, run)
        else:
            self._ended(shadow, run)

    def _event(self, shadow: Shadow, row: Row, event: Any, turn: Turn | None) -> str | None:
        place = len(shadow.events) + 1
        if shadow.ended is not None:
            raise Violation("INV-2", f"{row.id} has an event behind its end: {ev.kind(event)}")
        shadow.events.append(event)
        kind = type(event)
        if isinstance(event, ev.INPUTS):
            # The time of a run that starts later is that start's, also if it is asked to end before.
            begins = row.wake_at if kind is ev.Started and row.status == Status.SCHEDULED else None
            if event.at > max(self.latest, shadow.now) and event.at != begins:
                raise Violation(
                    "INV-11", f"{row.id}: {ev.kind(event)} says {event.at - self.latest} us more than the store's clock"
                )
            if event.at < shadow.now:
                raise Violation("INV-11", f"{row.id}: the time of {ev.kind(event)} goes back")
            shadow.now = event.at
            for step in [s for s, due in shadow.sleeps.items() if due <= event.at]:
                self._lateness(row, step, shadow.sleeps.pop(step))
            for step in [s for s, at in shadow.waits.items() if at is not None and at <= event.at]:
                self._lateness(row, step, shadow.waits.pop(step))
        if isinstance(event, ev.LOCAL_OUTCOMES):
            self._outcome(shadow, row, event, place)
        elif kind is ev.Signal:
            shadow.signals.add(event.message)
        elif kind is ev.Sleep:
            if event.due > shadow.now:
                shadow.sleeps[event.step] = event.due
        elif kind is ev.SignalWait:
            if event.deadline is None or event.deadline > shadow.now:
                shadow.waits[event.step] = event.deadline
        elif kind is ev.SignalTaken:
            if event.message not in shadow.signals:
                raise Violation("INV-10", f"{row.id}: {event.step} took message {event.message}, which never came")
            shadow.waits.pop(event.step, None)
        elif kind is ev.StepCancelled:
            self._final(shadow, row, event.step, place)
            for pending in (shadow.sleeps, shadow.waits, shadow.retries, shadow.remotes):
                pending.pop(event.step, None)
            shadow.by_epoch[event.step, row.epoch] += 1
        elif kind in (ev.Child, ev.Activity):
            if getattr(event, "awaited", True):
                shadow.remotes[event.step] = event.run
            self._remote_there(shadow, row, event)
        elif kind in (ev.ChildEnded, ev.ActivityEnded):
            shadow.remotes.pop(event.step, None)
            self._end_told(row, event)
        elif kind is ev.Ended:
            shadow.ended = event
            if len(set(event.unread)) < len(event.unread):
                raise Violation("INV-10", f"{row.id} has ended; it lists a message twice: {', '.join(event.unread)}")
        message: str | None = getattr(event, "message", None) if kind is not ev.SignalTaken else None
        return message

    def _lateness(self, row: Row, step: str, due: int | None) -> None:
        """INV-11: once everything is healed, no timer is later than the bound. due: None if there is no timer."""
        if self.healed_at is None or due is None:
            return
        late = self.store.now() - max(due, self.healed_at)
        self.latest_timer = max(self.latest_timer, late)
        if late > self.world.config.lease * 1_000_000 + LATEST:
            raise Violation("INV-11", f"{row.id}: {step} was due at {due}, and came {late / 1e6:.1f} s late")

    def _outcome(self, shadow: Shadow, row: Row, event: Any, place: int) -> None:
        step = event.step
        shadow.attempts[step] += 1
        if event.attempt != shadow.attempts[step]:
            raise Violation(
                "INV-16", f"{row.id}: attempt {event.attempt} of {step} is recorded as number {shadow.attempts[step]}"
            )
        at = shadow.promised.get((row.epoch, step, event.attempt))
        if at is not None and event.at != at:
            raise Violation(
                "INV-12", f"{row.id}: the outcome of {step} came at {at}, after a rebuild it is recorded at {event.at}"
            )
        shadow.by_epoch[step, row.epoch] += 1
        shadow.retries.pop(step, None)
        if isinstance(event, ev.AttemptFailed):
            if event.retry_at < event.at:
                raise Violation("INV-16", f"{row.id}: {step} is tried again before it failed")
            shadow.retries[step] = event.retry_at
        else:
            self._final(shadow, row, step, place)

    def _final(self, shadow: Shadow, row: Row, step: str, place: int) -> None:
        if step in shadow.outcomes:
            raise Violation("INV-3", f"{row.id}: step {step} has a second final outcome")
        shadow.outcomes[step] = place

    def _remote_there(self, shadow: Shadow, row: Row, event: Any) -> None:
        run = self.store._runs[row.key]
        named = "child" if type(event) is ev.Child else "activity"
        started = event.step in self.store._children.get(row.key, {})
        if not started and getattr(event, "awaited", True) and f"perdure:{named}:{event.step}" not in run.accepted:
            raise Violation("INV-8", f"{row.id}: {event.step} is recorded, but nothing was started")

    def _end_told(self, row: Row, event: Any) -> None:
        """INV-14: a parent is told the end that its child's row shows."""
        key = self.store._children.get(row.key, {}).get(event.step)
        if key is None:
            return  # It was never started: its id belonged to another run.
        end = self.store._runs[key].row
        there = (end.id, end.status, end.result or "null", end.error)
        error = None if event.error is None else msgspec.json.encode(event.error).decode()
        told = (event.run, event.status, bytes(event.value).decode(), error)
        if told != there:
            raise Violation("INV-14", f"{row.id} was told of {event.step} that it is {told}, it is {there}")

    def sees_end(self, id: str, seen: tuple[str, Any]) -> None:
        """INV-14: a client is shown the end that the row shows. seen: a status, and the result or None."""
        row = self.by_id[id].row
        result = None if row.result is None else msgspec.json.decode(row.result)
        # One that is quarantined has not ended, and may be terminated before we look.
        if seen != (row.status, result) and row.strikes < STRIKES:
            raise Violation("INV-14", f"{id} was seen to be {seen}, it is {(row.status, result)}")

    def _mail(self, shadow: Shadow, run: Any, consumed: Sequence[str]) -> None:
        row: Row = run.row
        if len(run.accepted) < shadow.accepted:
            raise Violation("INV-10", f"{row.id} forgot a message it had accepted")
        shadow.accepted = len(run.accepted)
        for id, mail in run.unread.items():
            shadow.positions.setdefault(id, mail.position)
        hidden = self.world.late
        for id in consumed:
            if id in shadow.taken:
                raise Violation("INV-10", f"{row.id}: message {id} was consumed twice")
            position = shadow.positions.get(id)
            if position is None:
                raise Violation("INV-10", f"{row.id}: message {id} was consumed and never accepted")
            if position < shadow.last_taken and (row.key, id) not in hidden:
                raise Violation("INV-10", f"{row.id}: message {id} was consumed out of order")
            shadow.last_taken = max(shadow.last_taken, position)
            shadow.taken[id] = len(shadow.events)
            if id in run.unread:
                raise Violation("INV-8", f"{row.id}: message {id} is in the history and still unread")
        unread = set(run.unread)
        if row.kind == "workflow":
            listed = shadow.ended.unread if shadow.ended is not None else ()
            for id in shadow.unread - unread:
                if id not in shadow.taken and id not in listed:
                    raise Violation("INV-10", f"{row.id}: message {id} left the mailbox and is not in the history")
        shadow.unread = unread

    def _wakes(self, shadow: Shadow, run: Any) -> None:
        """INV-9: somebody or something will move this run again."""
        row: Row = run.row
        if row.status == Status.WAITING:
            timers = shadow.timers
            if timers and (row.wake_at is None or row.wake_at > min(timers)):
                raise Violation(
                    "INV-9", f"{row.id} waits until {row.wake_at}, although it has a timer at {min(timers)}"
                )
        if row.owner is not None:
            if not self.store._lives(row.owner) and row.status != Status.RUNNING and row.status != Status.WAITING:
                raise Violation("INV-9", f"{row.id} is {row.status} and belongs to a dead worker")
            return
        if row.status in (Status.READY, Status.QUARANTINED) or row.wake_at is not None:
            return
        if row.status == Status.SCHEDULED:
            raise Violation("INV-9", f"{row.id} is to start later, and nothing says when")
        if run.unread:
            return
        if row.status == Status.RUNNING:
            raise Violation("INV-9", f"{row.id} is running and nobody has it")
        if None in shadow.waits.values() or shadow.loose:
            return
        for id in shadow.remotes.values():
            other = self.store._newest.get((row.namespace, id))
            if other is not None and self.store._runs[other].row.ended_at is None:
                return
        raise Violation("INV-9", f"{row.id} is {row.status}, and nothing will ever wake it")

    def _ended(self, shadow: Shadow, run: Any) -> None:
        row: Row = run.row
        if row.owner is not None:
            raise Violation("INV-25", f"{row.id} has ended and still has an owner")
        if row.status == Status.TIMED_OUT:
            self.world.sometimes["timed out"] += 1
            if row.deadline_at is None or row.deadline_at > self.latest:
                raise Violation(
                    "INV-11", f"{row.id} is out of time at {self.latest}, it may take until {row.deadline_at}"
                )
        self._lateness(row, "its timeout", row.deadline_at)
        if shadow.ended is not None:
            for id in run.unread:
                if id not in shadow.ended.unread:
                    raise Violation("INV-10", f"{row.id} has ended; message {id} is neither consumed nor listed")

    # --- steps ---

    def execution_begins(self, id: str, info: StepInfo, epoch: int) -> None:
        shadow = self.by_id[id]
        row = shadow.row
        self._tried(shadow, info, epoch)
        if row.kind == "activity":
            if epoch in shadow.claims and row.ended_at is not None and row.epoch == epoch:
                raise Violation("INV-4", f"activity {info.run_id} is executed after its end")
            return
        recorded = shadow.outcomes.get(info.id)
        if recorded is not None and recorded <= shadow.claims.get(epoch, 0):
            raise Violation("INV-4", f"{info.run_id}: {info.id} is executed, its outcome was recorded before the claim")
        if epoch != row.epoch or recorded is not None or row.ended_at is not None:
            return
        if not self.world.deep:
            return
        # Nothing leaves a run before the commit that holds its cause: the record alone must ask for this step.
        play = self.replay(shadow)
        op = play.line.ops.get(info.id)
        asked = op is not None and op.state == PENDING and op.attempt == info.attempt
        play.close()
        if play.difference is None and not asked:
            raise Violation("INV-8", f"{info.run_id}: {info.id} is executed before the commit that asks for it")

    def _tried(self, shadow: Shadow, info: StepInfo, epoch: int) -> None:
        """INV-16: an attempt is one that its policy gives, and does not begin before its time."""
        most = flows.MOST_ATTEMPTS.get(info.id, flows.DEFAULT)
        if info.attempt > most:
            raise Violation("INV-16", f"{info.run_id}: {info.id} is tried {info.attempt} times, {most} are allowed")
        due = shadow.retries.get(info.id)
        early = 0 if due is None else due - max(self.latest, self.store.now())
        # Whoever has lost the run does not know what was recorded since.
        if early > 0 and shadow.row.epoch == epoch:
            raise Violation("INV-16", f"{info.run_id}: {info.id} is tried again {early / 1e6:.3f} s before its time")

    def execution_cancelled(self, id: str, info: StepInfo, epoch: int, process: Process) -> None:
        shadow = self.by_id[id]
        row = shadow.row
        if process.down or process.leaving or row.kind == "activity" or row.epoch != epoch or row.ended_at is not None:
            return
        owner = process.shift.incarnation
        if row.owner != owner or info.id in shadow.outcomes or shadow.attempts[info.id] >= info.attempt:
            return
        if not any(r.this.id == info.run_id and not r.gone for r in process.shift.residents.values()):
            return  # It was dropped whole.
        raise Violation("INV-8", f"{info.run_id}: {info.id} is cancelled before the commit that gives it up")

    # --- replay ---

    def replay(self, shadow: Shadow, events: Sequence[ev.Event] | None = None) -> Play:
        """The recorded line, played by code that has never seen this run."""
        row = shadow.row
        world = self.world
        play = Play(
            world.registry.workflows[row.workflow],
            Shift.this_run(None, row),  # type: ignore[arg-type]  # it asks nothing of itself
            seed=row.seed,
            input=row.input,
            limits=Limits(),
            known=world.registry.workflows,
            threads=THREADS,
        )
        for _ in play.replay(shadow.events if events is None else events):
            pass
        return play

    def cold_replay(self, shadow: Shadow) -> None:
        """INV-12, for a whole history and for one prefix of it that ends before an input."""
        row = shadow.row
        if row.kind != "workflow":
            return
        events = shadow.events[:-1] if row.status in WITHOUT_CODE else shadow.events
        inputs = [i for i, event in enumerate(events) if isinstance(event, ev.INPUTS)]
        prefix = inputs[self.world.tape.choose(len(inputs), "prefix")]
        for part in (events, events[:prefix]):
            if not part:
                continue
            play = self.replay(shadow, part)
            difference = play.difference
            end = play.end
            # An end reached in the last recorded input is one that nobody had time to record.
            new = bool(play.line.commands)
            state = {op.id: op.attempt for op in play.line.pending.values() if op.kind == "run"}
            play.close()
            if difference is not None:
                raise Violation("INV-12", f"{row.id} differs from its own history of {len(part)} events: {difference}")
            if part is events and row.ended_at is not None and row.status not in WITHOUT_CODE:
                if end is None or (end.status, end.result) != (row.status, row.result):
                    raise Violation("INV-12", f"{row.id} ended as {row.status} {row.result}, replayed it is {end}")
            elif part is events and end is not None and not new:
                raise Violation("INV-12", f"{row.id} is {row.status}, replayed it has ended as {end.status}")
            for step in state:
                if part is events and step in shadow.outcomes:
                    raise Violation("INV-12", f"{row.id}: {step} has ended, replayed it is pending")

    # --- at the end ---

    def last(self) -> None:
        """Everything that is said of a universe at rest."""
        for shadow in self.shadows.values():
            self.cold_replay(shadow)
            self._executions(shadow)
            self._quarantine(shadow)
        store = self.store
        for id, workflow in self.started.items():
            if id in self.pruned:
                continue
            key = store._newest.get(("default", id))
            if key is None or store._runs[key].row.workflow != workflow:
                raise Violation("INV-7", f"the start of {id} was acknowledged, and there is no such run")
        for (id, message), kind in self.sent.items():
            if id in self.pruned:
                continue
            run = store._runs[store._newest["default", id]]
            if message not in run.accepted and not (kind == "cancel" and run.row.ended_at is not None):
                raise Violation("INV-7", f"{kind} {message} to {id} was acknowledged and is not there")
        for id in self.terminated - self.pruned:
            if store._runs[store._newest["default", id]].row.ended_at is None:
                raise Violation("INV-7", f"{id} was terminated and lives")
        for worker in {run.row.owner for run in store._runs.values() if run.row.owner is not None}:
            if not self.store._lives(worker):
                raise Violation("INV-25", f"{worker} owns a run and is no living worker")

    def _executions(self, shadow: Shadow) -> None:
        """INV-5: executions under one claim are at most its recorded attempts, and one more if it was interrupted."""
        row = shadow.row
        final = max(shadow.claims, default=0)
        for (run, step, epoch), count in self.world.effects.executions.items():
            if run != row.id:
                continue
            if row.kind == "activity":
                allowed = 1
            else:
                interrupted = epoch < final or row.status in WITHOUT_CODE or row.status == Status.QUARANTINED
                allowed = shadow.by_epoch[step, epoch] + (1 if interrupted else 0)
            if count > allowed:
                raise Violation(
                    "INV-5", f"{run}: {step} was executed {count} times under epoch {epoch}, {allowed} can be explained"
                )

    def _quarantine(self, shadow: Shadow) -> None:
        row = shadow.row
        if row.workflow == "killing" and row.status not in (Status.QUARANTINED, *ENDED):
            raise Violation("INV-20", f"{row.id} kills its workers and is {row.status}")
        if row.workflow != "killing" and row.status == Status.QUARANTINED and self.world.fair:
            raise Violation("INV-20", f"{row.id} is quarantined and has killed nobody")
