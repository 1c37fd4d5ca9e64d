"""One run's line of inputs, and what its code asks for, matched against what is recorded.

The `Line` is the pure half of a run in memory. A driver runs the code; the line is told what the code asks
(`begin`, `cancel`, `patched`, `finish`) and what reaches it (`open`, `fire`, `apply`, `close`), and answers
with the commands to record, the local effects to act on once they are recorded, and the one difference that
blocks the run. It has no clock: `now` is the time of the input being delivered.

In replay the commands recorded behind an input lie in `expected` and must all be issued again before the next
input. A command that is not there is a difference, except the mere beginning of an operation that is waited
for: that one is *deferred* until an input `resumed` gives it a place in the line.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Final, Protocol, cast

from msgspec import UNSET, Raw

from perdure.core import events as ev
from perdure.core.errors import DuplicateStepId
from perdure.core.failure import RecordedError, record

NEW: Final = 0  # asked for, not begun: nothing awaits it yet
DEFERRED: Final = 1  # begun by new code in a replay, waits for `resumed`
PENDING: Final = 2
DONE: Final = 3
CANCELLED: Final = 4

LOCAL: Final = frozenset({"run", "transaction"})
"""Kinds of operations whose functions are executed by the worker that has the run."""

Tag = tuple[type, str]


class Op:
    """One durable operation of a run: what the code asked for under a step id, and how it stands.

    spec is what the runtime knows of it: `spec.decode(raw)` turns a recorded value into what the code sees and
    raises if it does not fit, `spec.fail(step, event)` gives what the code catches (event None: a wait ran out).
    waiters are called once, in order, when the operation has ended.
    """

    # Defaults stand in the class: most operations never have most of them.
    state = NEW
    ordinal = 0
    at = 0  # time of the call: the input behind which it was begun
    due: int | None = None  # of a sleep; the deadline of a wait
    attempt = 1  # the attempt to be made or being made
    retry_at: int | None = None
    last_error: RecordedError | None = None
    value: Any = None
    error: BaseException | None = None
    ended = 0  # the place in the order of ends
    input = b""  # of children and activities
    run = ""
    queue = ""
    awaited = True
    parent_close = "cancel"

    def __init__(
        self,
        kind: str,
        id: str,
        *,
        name: str | None = None,
        site: str = "",
        digest: str | None = None,
        spec: Any = None,
    ) -> None:
        self.kind = kind  # run, transaction, sleep, signal_wait, activity, child
        self.id = id
        self.name = name
        self.site = site
        self.digest = digest
        self.spec = spec
        self.waiters: list[Callable[[Op], None]] = []

    @property
    def over(self) -> bool:
        return self.state >= DONE


class Timer(Protocol):
    """Something of the code that comes due; `fire` makes it ready and calls no user code."""

    def fire(self) -> None: ...

    def cancelled(self) -> bool: ...


class _OpTimer:
    """Ends a sleep, or the wait for a signal, at its time."""

    __slots__ = ("line", "op")

    def __init__(self, line: Line, op: Op) -> None:
        self.line = line
        self.op = op

    def cancelled(self) -> bool:
        return self.op.state != PENDING

    def fire(self) -> None:
        self.line.time_out(self.op)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where the code and the history part: the heart of the report of a blocked run."""

    step: str
    recorded: str
    recorded_site: str
    asked: str
    asked_site: str
    number: int  # of the recorded event, counted from 1; 0 if there is none


NOTHING_EXPECTED: Final[dict[Tag, tuple[int, ev.Command]]] = {}
"""What is expected in life; never added to."""


class Line:
    """See the module. `events` counts what is recorded or about to be; the next event gets the number after it."""

    # Defaults stand in the class, and what few runs need is made when something goes in.
    now = 0
    replaying = False
    last_input = False
    ending = False
    following: ev.Event | None = None  # the next recorded input, for reports
    dead = False
    difference: Difference | None = None
    cancel_requested = False
    cancel_reason = ""
    status = ""  # of the end, once there is one
    expected: dict[Tag, tuple[int, ev.Command]] = NOTHING_EXPECTED
    deferred: tuple[Op, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()  # (message id, why) of signals that did not fit
    unheard: tuple[tuple[str, BaseException | None], ...] = ()  # errors of the code that nobody caught, in life
    digests_differ: tuple[tuple[str, str], ...] = ()  # (step, site) of the first
    end_site: str = ""  # where the code has ended, in replay
    answers: Mapping[str, bool] = MappingProxyType({})
    signals: Mapping[str, deque[ev.Signal]] = MappingProxyType({})
    waits: Mapping[str, deque[Op]] = MappingProxyType({})
    emitted: list[str] | tuple[()] = ()  # steps of children nobody awaits that end with their parent
    _timer_count = 0
    _ordinal = 0
    _ends = 0
    _number = 0  # of the input, in replay
    _behind = 0  # commands recorded behind it
    _found = 0  # number of the command that was found last
    _latest: Op | None = None

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self.ops: dict[str, Op] = {}
        self.pending: dict[str, Op] = {}
        self.commands: list[ev.Command] = []
        self.begun: list[Op] = []
        self.dropped: list[Op] = []
        self.starts: list[Op] = []
        self.timers: list[tuple[int, int, Timer]] = []

    # --- the driver's side: inputs -------------------------------------------------------------------

    def open(self, at: int, *, number: int = 0, expected: Sequence[ev.Command] = (), last: bool = False) -> None:
        """Begin an input at its time; in replay also with the commands recorded behind it."""
        if at > self.now:
            self.now = at
        self._number = number
        self.last_input = last
        self._behind = len(expected)
        if expected:
            self.expected = {_tag(c): (number + i, c) for i, c in enumerate(expected, start=1)}

    def fire(self) -> bool:
        """Fire the earliest timer that is due, if any: the driver then lets the code rest before the next."""
        timers = self.timers
        while timers and timers[0][0] <= self.now:
            _, _, timer = heapq.heappop(timers)
            if not timer.cancelled():
                timer.fire()
                return True
        return False

    def apply(self, event: ev.Input, value: Any = UNSET) -> None:
        """Let an input reach the operations. value: the decoded value of an outcome, where it is at hand."""
        _APPLY[type(event)](self, event, value)

    def complete(self, step: str, value: Any) -> None:
        """Let the value of a step that is pending reach the code, in life."""
        op = self.pending[step]
        op.value = value
        self._end(op)

    def close(self) -> None:
        """End an input: in replay, everything recorded behind it must have been issued again."""
        if self.expected and self.difference is None:
            number, command = next(iter(self.expected.values()))
            if self.status:
                self.differ(number, command, None, text=f"the run's end ({self.status})", site=self.end_site)
            else:
                self.differ(number, command, self._latest)

    # --- the code's side: operations -----------------------------------------------------------------

    def ask(self, op: Op) -> None:
        """Take the step id of an operation; refused if the run has used it."""
        if self.dead:
            return
        if op.id in self.ops:
            first = self.ops[op.id]
            raise DuplicateStepId(op.id, sites=(first.site, op.site))
        self.ops[op.id] = op
        self._latest = op

    def begin(self, op: Op) -> None:
        """Begin an operation; it may end at once. A line that is dead begins nothing."""
        if op.state != NEW or self.dead:
            return
        self._ordinal = op.ordinal = self._ordinal + 1
        op.at = self.now
        self._latest = op
        if op.kind == "run":
            op.state = PENDING
            self.pending[op.id] = op
            self.begun.append(op)
        else:
            _BEGIN[op.kind](self, op)

    def cancel(self, op: Op) -> None:
        """Give an operation up: its final outcome, if it had begun. Twice is once; a dead line gives up nothing."""
        if self.dead:
            return
        if op.state == NEW:
            op.state = CANCELLED
            return
        if op.state == DEFERRED:
            self.deferred = tuple(other for other in self.deferred if other is not op)
            self._end(op, CANCELLED)
            return
        if op.state != PENDING:
            return
        if not self._issue(ev.StepCancelled(step=op.id)):
            return
        if op.kind == "signal_wait":
            self.waits[cast(str, op.name)].remove(op)
        self.dropped.append(op)
        self._end(op, CANCELLED)

    def patched(self, change: str, site: str) -> bool:
        """Whether this run had not passed the line when the change came; the first answer holds."""
        answer = self.answers.get(change)
        if answer is None:
            if self.replaying:
                answer = self.expected.pop((ev.Patched, change), None) is not None
            else:
                answer = True
                self.commands.append(ev.Patched(change=change, site=site))
            self.answers = {**self.answers, change: answer}
        return answer

    def refuse(self, what: str, error: RecordedError) -> bool:
        """A value does not fit its annotation: recorded in life, matched in replay; False if it is a difference."""
        return self._issue(ev.Refused(what=what, error=error))

    def refused(self, what: str) -> bool:
        """Whether the record says, behind this input, that this value was refused."""
        return self.expected.pop((ev.Refused, what), None) is not None

    def finish(self, status: str) -> None:
        """The main code has ended: pending steps end with it, children that are to be abandoned go on."""
        self.ending = True
        for op in self.deferred:
            self.cancel(op)
        for op in sorted(self.pending.values(), key=lambda op: op.ordinal):
            if op.kind != "child" or op.parent_close == "cancel":
                self.cancel(op)
            if self.difference is not None:
                return
        unread = tuple(s.message for queue in self.signals.values() for s in queue)
        if self._issue(ev.Ended(status=status, unread=unread)):
            self.status = status

    def add_timer(self, due: int, timer: Timer) -> None:
        """Wake the code at a time; equal times fire in the order in which they were set."""
        self._timer_count += 1
        heapq.heappush(self.timers, (due, self._timer_count, timer))

    # --- what is known --------------------------------------------------------------------------------

    def next_timer(self) -> int | None:
        """When the earliest timer comes due."""
        timers = self.timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        return timers[0][0] if timers else None

    def due(self, now: int) -> bool:
        """Whether a timer has come due by then."""
        first = self.next_timer()
        return first is not None and first <= now

    def wants(self, op_id: str, attempt: int) -> bool:
        """Whether the outcome of this attempt of a local step still means anything to the code."""
        op = self.ops.get(op_id)
        return op is not None and op.state == PENDING and op.kind in LOCAL and op.attempt == attempt

    def differ(self, number: int, event: ev.Event | None, asked: Op | None, *, text: str = "", site: str = "") -> None:
        """Keep the first difference; the driver stops the code."""
        if self.difference is None:
            if event is None and self.expected:
                number, event = next(iter(self.expected.values()))
            elif event is None and self.following is not None:
                event = self.following
                number = self._number + self._behind + 1
            step = getattr(event, "step", "") or (asked.id if asked is not None else "")
            self.difference = Difference(
                step=step,
                recorded=describe(event) if event is not None else "nothing more",
                recorded_site=getattr(event, "site", "") if event is not None else "",
                asked=text or (describe_op(asked) if asked is not None else "nothing"),
                asked_site=asked.site if asked is not None and not text else site,
                number=number,
            )
        self.dead = True

    # --- inside ---------------------------------------------------------------------------------------

    def _issue(self, command: ev.Command) -> bool:
        """Record a command in life; in replay find it in the record. False if it is a difference."""
        if not self.replaying:
            self.commands.append(command)
            return True
        if self.expected.pop(_tag(command), None) is not None:
            return True
        if self.last_input and self.ending:
            # An end reached in the last recorded input is written behind it, with what it cancels.
            self.commands.append(command)
            return True
        site = self.end_site if isinstance(command, ev.Ended) else ""
        self.differ(self._number, None, None, text=describe(command), site=site)
        return False

    def _recorded(self, kind: type, op: Op) -> ev.Command | None:
        """The record of this operation's beginning behind the current input, taken out of `expected`."""
        found = self.expected.pop((kind, op.id), None)
        if found is None:
            return None
        self._found, command = found
        return command

    def _pend(self, op: Op) -> None:
        op.state = PENDING
        self.pending[op.id] = op

    def _defer(self, op: Op) -> None:
        op.state = DEFERRED
        self.deferred = (*self.deferred, op)

    def _end(self, op: Op, state: int = DONE) -> None:
        self.pending.pop(op.id, None)
        self._ends += 1
        op.ended = self._ends
        op.state = state
        op.last_error = None
        if op.kind not in ("child", "activity"):
            op.spec = None  # an emitted or given up child may be over before its start has been taken from here
        if op.waiters:
            waiters, op.waiters = op.waiters, []
            for waiter in waiters:
                waiter(op)

    def time_out(self, op: Op) -> None:
        """The time of a sleep, or the deadline of a wait, has come."""
        if op.kind == "signal_wait":
            self.waits[cast(str, op.name)].remove(op)
            op.error = op.spec.fail(op.id, None)
        self._end(op)

    def _begin_run(self, op: Op) -> None:
        self._pend(op)
        self.begun.append(op)

    def _begin_sleep(self, op: Op) -> None:
        if self.replaying:
            recorded = cast("ev.Sleep | None", self._recorded(ev.Sleep, op))
            if recorded is None:
                return self._defer(op)
            op.due = recorded.due
        else:
            # A length counts from the call, a given time is what it is.
            op.due = op.spec.due if op.spec.due is not None else self.now + op.spec.length
            self.commands.append(ev.Sleep(step=op.id, ordinal=op.ordinal, due=op.due, site=op.site))
        self._pend(op)
        if op.due <= self.now:
            self._end(op)
        else:
            self.add_timer(op.due, _OpTimer(self, op))
        return None

    def _begin_signal_wait(self, op: Op) -> None:
        name = cast(str, op.name)
        if self.replaying:
            recorded = cast("ev.SignalWait | None", self._recorded(ev.SignalWait, op))
            if recorded is None:
                return self._defer(op)
            if recorded.name != name:
                return self.differ(self._found, recorded, op)
            op.due = recorded.deadline
        else:
            op.due = None if op.spec.length is None else self.now + op.spec.length
            self.commands.append(
                ev.SignalWait(step=op.id, ordinal=op.ordinal, name=name, deadline=op.due, site=op.site)
            )
        self._pend(op)
        queue = self.signals.get(name)
        while queue:
            if self._take(op, queue.popleft()):
                return None
        if op.due is not None and op.due <= self.now:
            op.error = op.spec.fail(op.id, None)
            self._end(op)
            return None
        if name not in self.waits:
            self.waits = {**self.waits, name: deque()}
        self.waits[name].append(op)
        if op.due is not None:
            self.add_timer(op.due, _OpTimer(self, op))
        return None

    def _take(self, op: Op, signal: ev.Signal) -> bool:
        """Give a signal to a wait; False if it does not fit, and so is skipped."""
        if self.refused(signal.message):
            return False
        try:
            op.value = op.spec.decode(signal.value)
        except Exception as error:
            if self.refuse(signal.message, record(error)):
                self.skipped = (*self.skipped, (signal.message, str(error)))
            return False
        if self._issue(ev.SignalTaken(step=op.id, message=signal.message)):
            self._end(op)
        return True

    def _begin_remote(self, op: Op) -> None:
        kind = ev.Child if op.kind == "child" else ev.Activity
        if self.replaying:
            recorded = cast("ev.Child | ev.Activity | None", self._recorded(kind, op))
            if recorded is None:
                if op.awaited:
                    return self._defer(op)
                return self.differ(self._number, None, op)
            if recorded.name != op.name or getattr(recorded, "awaited", True) != op.awaited:
                return self.differ(self._found, recorded, op)
            if op.digest != recorded.digest:
                self._digest_differs(op)
            op.run = recorded.run
            op.parent_close = getattr(recorded, "parent_close", op.parent_close)
        else:
            self.commands.append(_remote_command(op))
            self.starts.append(op)
        if op.awaited:
            self._pend(op)
        else:
            if op.parent_close == "cancel":
                self.emitted = self.emitted or []
                self.emitted.append(op.id)
            op.value = op.run
            self._end(op)
        return None

    # Inputs, one function a kind.

    def _apply_nothing(self, event: Any, value: Any) -> None:
        """Started and time: the driver does what they mean."""

    def _apply_signal(self, event: ev.Signal, value: Any) -> None:
        waiting = self.waits.get(event.name)
        if waiting:
            op = waiting[0]
            if self._take(op, event):
                if op.state == DONE:
                    waiting.popleft()
                return
            return
        if event.name not in self.signals:
            self.signals = {**self.signals, event.name: deque()}
        self.signals[event.name].append(event)

    def _apply_cancel(self, event: ev.CancelRequested, value: Any) -> None:
        if not self.cancel_requested:
            self.cancel_requested = True
            self.cancel_reason = event.reason

    def _local(self, event: Any) -> Op | None:
        op = self.ops.get(event.step)
        if op is None or op.state != PENDING or op.kind != event.op:
            self.differ(self._number, event, op if op is not None and op.kind != event.op else self._asked())
            return None
        if op.name is not None and event.name is not None and op.name != event.name:
            self.differ(self._number, event, op)
            return None
        if op.digest != event.digest:
            self._digest_differs(op)
        op.attempt = event.attempt
        return op

    def _digest_differs(self, op: Op) -> None:
        """A step is called with other arguments than recorded: kept once, for a warning."""
        if not self.digests_differ:
            self.digests_differ = ((op.id, op.site),)

    def _asked(self) -> Op | None:
        """What the code asks for that the record does not know, for the report."""
        latest = self._latest
        return latest if latest is not None and not latest.over else None

    def _apply_completed(self, event: ev.StepCompleted, value: Any) -> None:
        op = self._local(event)
        if op is not None:
            self._value(op, event, value)

    def _apply_failed(self, event: ev.StepFailed, value: Any) -> None:
        op = self._local(event)
        if op is not None:
            op.error = op.spec.fail(op.id, event)
            self._end(op)

    def _apply_attempt(self, event: ev.AttemptFailed, value: Any) -> None:
        op = self._local(event)
        if op is not None:
            op.attempt = event.attempt + 1
            op.retry_at = event.retry_at
            op.last_error = event.error

    def _apply_remote(self, event: ev.ChildEnded | ev.ActivityEnded, value: Any) -> None:
        op = self.ops.get(event.step)
        kind = "child" if type(event) is ev.ChildEnded else "activity"
        if op is None or op.kind != kind or op.state in (NEW, DEFERRED):
            self.differ(self._number, event, self._asked())
        elif op.state == PENDING:
            if event.error is not None or event.status != "completed":
                op.error = op.spec.fail(op.id, event)
                self._end(op)
            else:
                self._value(op, event, value)

    def _value(self, op: Op, event: Any, value: Any) -> None:
        if value is UNSET:
            try:
                value = op.spec.decode(event.value)
            except Exception as error:
                self.differ(self._number, event, op, text=f"{describe_op(op)}, whose value no longer fits: {error}")
                return
        op.value = value
        self._end(op)

    def _apply_resumed(self, event: ev.Resumed, value: Any) -> None:
        waiting, self.deferred = self.deferred, ()
        for op in waiting:
            # In replay what is not recorded behind this input is deferred again.
            if op.state == DEFERRED:
                op.at = self.now
                _BEGIN[op.kind](self, op)


_BEGIN: Final[dict[str, Callable[[Line, Op], None]]] = {
    "run": Line._begin_run,
    "transaction": Line._begin_run,
    "sleep": Line._begin_sleep,
    "signal_wait": Line._begin_signal_wait,
    "child": Line._begin_remote,
    "activity": Line._begin_remote,
}

_APPLY: Final[dict[type, Callable[[Line, Any, Any], None]]] = {
    ev.Started: Line._apply_nothing,
    ev.Time: Line._apply_nothing,
    ev.Signal: Line._apply_signal,
    ev.CancelRequested: Line._apply_cancel,
    ev.StepCompleted: Line._apply_completed,
    ev.StepFailed: Line._apply_failed,
    ev.AttemptFailed: Line._apply_attempt,
    ev.ChildEnded: Line._apply_remote,
    ev.ActivityEnded: Line._apply_remote,
    ev.Resumed: Line._apply_resumed,
}


def _tag(command: ev.Command) -> Tag:
    """What makes a command the same command: its kind, and its step, change or message."""
    if isinstance(command, ev.Patched):
        return ev.Patched, command.change
    if isinstance(command, ev.Refused):
        return ev.Refused, command.what
    if isinstance(command, ev.Ended):
        return ev.Ended, ""
    return type(command), command.step


def _remote_command(op: Op) -> ev.Command:
    if op.kind == "child":
        return ev.Child(
            step=op.id,
            ordinal=op.ordinal,
            name=cast(str, op.name),
            input=Raw(op.input),
            run=op.run,
            awaited=op.awaited,
            parent_close=op.parent_close,
            site=op.site,
            digest=op.digest,
        )
    return ev.Activity(
        step=op.id,
        ordinal=op.ordinal,
        name=cast(str, op.name),
        queue=op.queue,
        input=Raw(op.input),
        run=op.run,
        site=op.site,
        digest=op.digest,
    )


# --- words for reports --------------------------------------------------------------------------------


_WORDS: Final[dict[type, str]] = {
    ev.Sleep: 'sleep "{0.step}"',
    ev.SignalWait: 'wait "{0.step}" for signal "{0.name}"',
    ev.SignalTaken: 'signal taken by "{0.step}"',
    ev.Child: 'child workflow "{0.step}" ({0.name})',
    ev.ChildEnded: 'child workflow "{0.step}"',
    ev.Activity: 'activity "{0.step}" ({0.name})',
    ev.ActivityEnded: 'activity "{0.step}"',
    ev.StepCancelled: 'step "{0.step}" cancelled',
    ev.Patched: 'patched("{0.change}")',
    ev.Ended: "the run's end ({0.status})",
}


def describe(event: ev.Event) -> str:
    """An event as a report names it."""
    if isinstance(event, (ev.StepCompleted, ev.StepFailed, ev.AttemptFailed)):
        named = f" ({event.name})" if event.name and event.name != event.step else ""
        return f'{event.op} step "{event.step}"{named}'
    return _WORDS.get(type(event), ev.kind(event)).format(event)


def describe_op(op: Op) -> str:
    """An operation as a report names it."""
    if op.kind in LOCAL:
        named = f" ({op.name})" if op.name and op.name != op.id else ""
        return f'{op.kind} step "{op.id}"{named}'
    if op.kind == "sleep":
        length = getattr(op.spec, "length", None)
        return f'sleep "{op.id}"' + (f" {timedelta(microseconds=length)}" if length is not None else "")
    if op.kind == "signal_wait":
        return f'wait "{op.id}" for signal "{op.name}"'
    return f'{"child workflow" if op.kind == "child" else "activity"} "{op.id}" ({op.name})'
