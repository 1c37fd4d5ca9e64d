"""A run in this worker's memory: takes its inputs, closes its turns, acts on what was acknowledged.

Deliver on arrival, act on acknowledgement: an input reaches the code as soon as it is here, but nothing leaves
the run (a step begins or is cancelled, a message, a child) before the commit that holds its cause has come
back. At most one commit is in flight; what arrives meanwhile gathers for the next.

Everything here happens on one thread, the shift's loop.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
from msgspec import UNSET, Raw

from perdure.core import events as ev
from perdure.core import failure, retry, stored
from perdure.core.errors import (
    LimitExceeded,
    NeverRests,
    NonDeterminismError,
    PayloadError,
    StoreError,
    timed_out,
)
from perdure.core.failure import RecordedError
from perdure.core.match import LOCAL, PENDING, Op
from perdure.core.turn import (
    Committed,
    Fenced,
    Mail,
    MoreMail,
    ParentLink,
    Row,
    Send,
    Start,
    Turn,
    Unstorable,
)
from perdure.core.waits import Waits, read_waits, waits_text
from perdure.runtime.context import ThisRun, step_key
from perdure.runtime.loop import tell_unheard
from perdure.runtime.play import NOTHING, Asked, Play
from perdure.runtime.steps import ActivityPolicy, LocalCall, RemoteCall, child_id
from perdure.worker.executing import Execution, StepInfo
from perdure.worker.remote_end import (
    NO_POLICY,
    StartPolicy,
    cancelling,
    input_of,
    policy_of,
    start_policy,
    telling_parent,
)
from perdure.worker.waits import waits_of

if TYPE_CHECKING:
    from perdure.worker.shift import Shift

log = logging.getLogger("perdure.worker")

FORCED_AFTER: Final = 3
"""So often newer mail may send an ending run back; then it lists the rest as unread. Twice as often: it ends anyway."""
FIRST_BACK_OFF: Final = 1_000_000
LAST_BACK_OFF: Final = 300_000_000
LONG_STEP: Final = 1_000_000
"""Microseconds after which a running step is put into `waits`, so that `why` can name it."""
RUNNING: Final = "running"
WAITING: Final = "waiting"


class Gathered:
    """What has come since the last commit: the inputs with what they caused, and what to do once it is recorded."""

    # Most turns have only the first two: the rest of the lists are made when something goes in.
    __slots__ = ("begun", "consumed", "events", "given_up", "progress", "sends", "starts", "unheard")

    def __init__(self) -> None:
        self.events: list[ev.Event] = []
        self.begun: list[tuple[str, int]] = []
        self.consumed: list[str] | tuple[()] = ()
        self.given_up: list[str] | tuple[()] = ()
        self.starts: list[Start] | tuple[()] = ()
        self.sends: list[Send] | tuple[()] = ()
        self.unheard: tuple[tuple[str, BaseException | None], ...] = ()
        self.progress = False

    def add(self, what: str, item: Any) -> None:
        """Put something into a list that is made with its first item."""
        there = getattr(self, what)
        if there:
            there.append(item)
        else:
            setattr(self, what, [item])


class Outcome:
    """How an attempt of a local step ended; becomes an input when it is delivered."""

    __slots__ = ("attempt", "error", "final", "raw", "step", "value")

    def __init__(
        self,
        step: str,
        attempt: int,
        *,
        raw: bytes | None = None,
        value: Any = UNSET,
        error: BaseException | RecordedError | None = None,
        final: bool = False,
    ) -> None:
        self.step = step
        self.attempt = attempt
        self.raw = raw
        self.value = value
        self.error = error
        self.final = final


class Again:
    """An input of a turn that was thrown away, delivered again with the time it had."""

    __slots__ = ("event",)

    def __init__(self, event: ev.Input) -> None:
        self.event = event


class Resident:
    """See the module. Made by a start of this process, or for a claimed run."""

    __slots__ = (
        "blocked_tries",
        "deadline_at",
        "deadlines",
        "epoch",
        "executions",
        "flight",
        "gone",
        "history_warned",
        "inbox",
        "input",
        "key",
        "known_mail",
        "last",
        "more_mail",
        "open",
        "parent",
        "parent_step",
        "play",
        "policy",
        "pumping",
        "rebuilding",
        "retrying",
        "seed",
        "seq",
        "shift",
        "status",
        "this",
        "timer_at",
        "transacting",
        "transactions",
        "unwanted",
        "version",
        "wake_at",
        "workflow",
        "written_waits",
    )

    def __init__(
        self,
        shift: Shift,
        this: ThisRun,
        *,
        key: int,
        epoch: int,
        version: int,
        last: str,
        seed: str,
        input: str,
        deadline_at: int | None = None,
        parent: int | None = None,
        parent_step: str | None = None,
        policy: StartPolicy = NO_POLICY,
    ) -> None:
        self.shift = shift
        self.this = this
        self.key = key
        self.epoch = epoch
        self.version = version
        self.last = last
        self.seed = seed
        self.input = input
        self.deadline_at = deadline_at
        self.parent = parent
        self.parent_step = parent_step
        self.policy = policy
        self.seq = 1
        self.status = RUNNING
        self.wake_at: int | None = None
        self.written_waits = ""
        self.inbox: deque[Mail | Outcome | Again] = deque()
        self.open = Gathered()
        self.flight: tuple[Turn, Gathered] | None = None
        self.unwanted: list[Outcome | Again] = []
        self.executions: dict[str, Execution | None] = {}
        self.retrying: dict[str, int] = {}
        self.deadlines: dict[str, int] = {}
        self.known_mail: set[str] = set()
        self.more_mail = 0
        self.blocked_tries = 0
        self.history_warned = False
        self.gone = False
        self.pumping = False
        self.rebuilding = True
        self.timer_at: int | None = None
        self.transactions: deque[Execution] | None = None  # attempts of transaction steps that wait for their turn
        self.transacting: Any = None  # the one that has the commit right
        self.workflow = shift.registry.workflows[this.workflow]
        self.play = self._new_play()

    @classmethod
    def of_row(cls, shift: Shift, row: Row) -> Resident:
        """For a claimed run, before its history is there."""
        resident = cls(
            shift,
            shift.this_run(row),
            key=row.key,
            epoch=row.epoch,
            version=row.version,
            last=row.turn,
            seed=row.seed,
            input=row.input,
            deadline_at=row.deadline_at,
            parent=row.parent,
            parent_step=row.parent_step,
            policy=policy_of(row.policy),
        )
        resident.wake_at = row.wake_at
        resident.written_waits = row.waits
        resident.blocked_tries = blocked_tries(row.waits)
        return resident

    def _new_play(self) -> Play:
        return Play(
            self.workflow,
            self.this,
            seed=self.seed,
            input=self.input,
            limits=self.shift.limits,
            known=self.shift.registry.workflows,
            threads=self.shift.threads,
            without_transactions="" if self.shift.store.transactions else self.shift.store.url,
        )

    # --- coming into memory ---------------------------------------------------------------------------

    def begin(self, events: Sequence[ev.Event], mail: Sequence[Mail]) -> None:
        """Bring the code to the end of the recorded line, then deliver what waits. Gives the loop back now and then."""
        self.seq = len(events) + 1
        self.known_mail.update(_messages_in(events))
        # At once: what is posted while the code comes to where it was is newer.
        for message in mail:
            self._accept(message)
        self._replay(self.play.replay(events), ())

    def live(self, started: ev.Started) -> None:
        """Begin the code of a run that was started here, and has no record yet but that."""
        self.seq = 2
        play = self.play
        try:
            with self.shift.watching(self):
                play.begin(started)
        except NeverRests as error:
            play.did_not_rest(error.where)
        self.rebuilding = False
        self._gather(play.take())
        self.pump()

    def _replay_some(self, steps: Any) -> None:
        # By itself: an interruption that comes at the jump of a loop passes every `try` of the same function.
        until = self.shift.monotonic() + 0.005
        while self.shift.monotonic() < until:
            next(steps)

    def _replay(self, steps: Any, again: Sequence[Again], resumed: ev.Resumed | None = None) -> None:
        if self.gone:
            return
        try:
            with self.shift.watching(self):
                self._replay_some(steps)
        except StopIteration:
            self._come_alive(again, resumed)
        except NeverRests as error:
            self.play.did_not_rest(error.where)
            self._come_alive(again, resumed)
        else:
            self.shift.loop.call_soon(self.shift.safely, self, self._replay, steps, again, resumed)

    def _come_alive(self, again: Sequence[Again], resumed: ev.Resumed | None) -> None:
        play = self.play
        self.rebuilding = False
        for step, site in play.line.digests_differ[:1]:
            log.warning(
                'run %s: step "%s" (%s) is called with other arguments than recorded; the recorded outcome is used',
                self.this.id,
                step,
                site,
            )
        if not play.over:
            self._gather(play.take(), replayed=True)
            if play.line.deferred:
                # One that was thrown away with its turn comes again with the time it had.
                self._deliver(resumed if resumed is not None else ev.Resumed(at=self._now()))
        else:
            self._gather(play.take(), replayed=True)
        # What was thrown away comes again, with its times, after the mail.
        waiting, self.inbox = self.inbox, deque()
        self.inbox.extend(item for item in waiting if _message_of(item) is not None)
        self.inbox.extend(again)
        self.inbox.extend(item for item in waiting if _message_of(item) is None)
        self._wake_what_is_due()
        self.pump()

    # --- inputs ---------------------------------------------------------------------------------------

    def post(self, mail: Mail) -> None:
        """A message has arrived; one that is known is left alone."""
        if self._accept(mail):
            self.pump()

    def _accept(self, mail: Mail) -> bool:
        if mail.id in self.known_mail:
            return False
        self.known_mail.add(mail.id)
        self.inbox.append(mail)
        return True

    def outcome(self, outcome: Outcome) -> None:
        """An attempt of a local step has ended."""
        self.inbox.append(outcome)
        self.pump()

    def tick(self) -> None:
        """A timer, a retry or a deadline may have come due."""
        # Also where nothing is done now: a timer that is still thought to be set would never be set again.
        self.timer_at = None
        if self.gone or self.rebuilding:
            return
        self._wake_what_is_due()
        self.pump()

    def _wake_what_is_due(self) -> None:
        now = self._now()
        if self.deadlines:
            for step in [s for s, due in self.deadlines.items() if due <= now]:
                del self.deadlines[step]
                op = self.play.line.ops.get(step)
                if op is not None and op.state == PENDING:
                    error = failure.out_of_time(failure.NO_TIME_LEFT, op.last_error)
                    self.inbox.append(Outcome(step, op.attempt, error=error, final=True))
        if self.retrying:
            for step in [s for s, due in self.retrying.items() if due <= now]:
                del self.retrying[step]
                op = self.play.line.ops.get(step)
                if op is not None and op.state == PENDING:
                    self.open.begun.append((step, op.attempt))

    def _now(self) -> int:
        now = self.shift.now()
        before = self.play.line.now
        return now if now > before else before

    def pump(self) -> None:
        """Deliver what is in the inbox, one by one, each timer that is due before it; then close the turn."""
        if self.pumping or self.rebuilding or self.gone or self.transacting is not None:
            return
        self.pumping = True
        play = self.play
        inbox = self.inbox
        try:
            while not play.over:
                item = inbox[0] if inbox else None
                now = self._now()
                if isinstance(item, Again):
                    now = max(item.event.at, play.line.now)
                if play.line.timers and play.line.due(now):
                    self._deliver(ev.Time(at=now))
                elif item is None:
                    break
                else:
                    inbox.popleft()
                    self._take_in(item, now)
        finally:
            self.pumping = False
        self.settle()

    def _take_in(self, item: Mail | Outcome | Again, now: int) -> None:
        if isinstance(item, Outcome):
            self._take_outcome(item, now)
        elif isinstance(item, Mail):
            self._deliver(input_of(item, now))
        else:
            event = item.event
            if isinstance(event, ev.LOCAL_OUTCOMES) and not self.play.line.wants(event.step, event.attempt):
                self._keep_unwanted(item)
                return
            if isinstance(event, ev.AttemptFailed):
                self.retrying[event.step] = event.retry_at
            self._deliver(msgspec.structs.replace(event, at=now))

    def _keep_unwanted(self, item: Outcome | Again) -> None:
        """An outcome is dropped when the commit that gave its step up is acknowledged, and not before."""
        if self.flight is not None or self.open.events:
            self.unwanted.append(item)

    def _take_outcome(self, item: Outcome, now: int) -> None:
        """Record an outcome, if the code still wants it: a value, a final failure, or an attempt to be repeated."""
        line = self.play.line
        if not line.wants(item.step, item.attempt):
            self._keep_unwanted(item)
            return
        op = line.ops[item.step]
        if item.raw is not None:
            self._take_value(op, item.raw, item.value, now)
            return
        assert item.error is not None
        call: LocalCall = op.spec
        if isinstance(item.error, RecordedError):
            error = item.error
        else:
            refused = item.final and isinstance(item.error, (PayloadError, LimitExceeded))
            error = failure.record(item.error, kind="payload" if refused else "failed")
        delay: timedelta | None = None
        if not item.final:
            raised = item.error if isinstance(item.error, BaseException) else timed_out(error.message)
            delay = retry.decide(call.policy.retry, raised, item.attempt, self.shift.spread())
        facts: dict[str, Any] = {
            "at": now,
            "step": op.id,
            "ordinal": op.ordinal,
            "op": op.kind,
            "name": op.name,
            "site": op.site,
            "digest": op.digest,
            "attempt": item.attempt,
            "error": error,
        }
        if isinstance(item.error, BaseException):
            failure.let_go(item.error)
        deadline = self.deadlines.get(op.id)
        if delay is None:
            self._deliver(ev.StepFailed(**facts))
        elif deadline is not None and now + retry.micros(delay) >= deadline:
            facts["error"] = failure.out_of_time(failure.LAST_OF_ALL, error)
            self._deliver(ev.StepFailed(**facts))
        else:
            retry_at = now + retry.micros(delay)
            self.retrying[op.id] = retry_at
            self._deliver(ev.AttemptFailed(**facts, retry_at=retry_at))

    def _take_value(self, op: Op, raw: bytes, value: Any, now: int) -> None:
        """Record the value of a step that the code wants."""
        event = ev.StepCompleted(
            at=now,
            step=op.id,
            ordinal=op.ordinal,
            name=op.name,
            site=op.site,
            digest=op.digest,
            attempt=op.attempt,
            value=Raw(raw),
        )
        self._deliver(event, value)

    def _deliver(self, event: ev.Input, value: Any = UNSET) -> None:
        """Let one input reach the code, and gather it with what it caused.

        value: the decoded value of an outcome, where it is at hand.
        """
        gathered = self.open
        gathered.events.append(event)
        kind = type(event)
        if kind is ev.StepCompleted or kind is ev.StepFailed:
            gathered.progress = True
            if event.step in self.executions:  # type: ignore[union-attr]  # an outcome has a step
                # It ended by its deadline, or ran out of its time, and still executes.
                gathered.add("given_up", event.step)  # type: ignore[union-attr]  # as above
            if self.deadlines:
                self.deadlines.pop(event.step, None)  # type: ignore[union-attr]  # as above
        elif hasattr(event, "message"):
            gathered.add("consumed", event.message)
        elif kind is ev.AttemptFailed and event.step in self.executions:  # type: ignore[union-attr]  # it has a step
            gathered.add("given_up", event.step)  # type: ignore[union-attr]  # as above
        play = self.play
        shift = self.shift
        # As `with shift.watching(self)`, at every input.
        watched = shift.watched
        watched.resident = self
        watched.since = monotonic()
        try:
            try:
                play.deliver(event, value)
            finally:
                watched.leave()
        except NeverRests as error:
            # The watchdog's exception came a moment late: it must not reach the caller's loop.
            watched.since = 0.0
            play.did_not_rest(error.where)
        asked = play.take()
        if asked is not NOTHING:
            self._gather(asked)
        size = self.seq + len(gathered.events) + (len(self.flight[0].events) if self.flight else 0)
        if size > shift.limits.history_warn:
            self._mind_the_size(size)

    def _mind_the_size(self, size: int) -> None:
        limits = self.shift.limits
        if not self.history_warned:
            self.history_warned = True
            log.warning("run %s has %d events; it fails at %d", self.this.id, size, limits.history_stop)
        if size > limits.history_stop and not self.play.over:
            error = LimitExceeded(
                f"The run has more than {limits.history_stop} events. A history this long makes every replay slow. "
                "Start a child for each part of the work.",
                what="the history",
                limit=limits.history_stop,
                actual=size,
            )
            self.play.fail(error)
            self._gather(self.play.take())

    def _gather(self, asked: Asked, *, replayed: bool = False) -> None:
        gathered = self.open
        line = self.play.line
        if asked.commands:
            gathered.events.extend(asked.commands)
        for op in asked.begun:
            if op.state != PENDING:
                continue
            spec: LocalCall = op.spec
            if spec.policy.total_timeout is not None:
                self.deadlines[op.id] = op.at + retry.micros(spec.policy.total_timeout)
            if op.retry_at is not None and replayed:
                self.retrying[op.id] = op.retry_at
            else:
                gathered.begun.append((op.id, op.attempt))
        for op in asked.starts:
            gathered.add("starts", self._start_of(op))
        for op in asked.dropped:
            if op.kind in LOCAL:
                gathered.add("given_up", op.id)
                self.retrying.pop(op.id, None)
                self.deadlines.pop(op.id, None)
            elif op.kind in ("child", "activity"):
                gathered.add("sends", cancelling(self.key, op.id, line.cancel_reason or "its parent gave it up"))
        for message, why in line.skipped:
            log.warning("run %s: the signal %s does not fit and was skipped: %s", self.this.id, message, why)
        line.skipped = ()

    def _start_of(self, op: Op) -> Start:
        spec: RemoteCall = op.spec
        queue, timeout = op.queue, spec.timeout if op.kind == "child" else spec.policy.total_timeout
        input = bytes(op.input)
        if spec.elsewhere:
            known = self.shift.announced_of(op.name or "")
            queue, timeout = queue or known.queue, timeout if timeout is not None else known.timeout
            input = known.signature.rewritten(input)
        given = spec.policy if spec.policy is not None else StartPolicy(awaited=op.awaited)
        policy = start_policy(given, self.this.workflow) if isinstance(given, ActivityPolicy) else given
        if op.run.split("/")[0] != self.this.root:
            policy = msgspec.structs.replace(policy, root=self.this.root)
        return self.shift.start_facts(
            workflow=op.name or "",
            id=op.run,
            input=input.decode(),
            # An activity is a step of this run, and its key is the step's.
            seed=step_key(self.seed, f"child:{op.id}") if op.kind == "child" else self.seed,
            kind="workflow" if op.kind == "child" else "activity",
            queue=queue,
            timeout=timeout,
            parent=ParentLink(run=self.key, step=op.id),
            parent_close=op.parent_close,
            policy=policy,
            idempotency_key=spec.idempotency_key,
        )

    # --- turns ----------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Close the turn that has gathered, if no commit is in flight and there is anything to write; else act."""
        if self.gone or self.rebuilding:
            return
        if self.flight is not None:
            # Timers come due while a commit is under way too: inputs have their own times, answers have none.
            if not self.play.over:
                self._set_timer(self._next_wake())
            return
        play = self.play
        if play.over:
            if play.difference is not None:
                self._block(play.difference)
            elif play.end is not None:
                self._close()
            else:
                self._strike()
            return
        gathered = self.open
        leaves = self.shift.draining and not self.inbox
        if leaves and not any(e is not None and e.counted for e in self.executions.values()):
            self._hand_over(gathered)
            return
        # What is given up with this turn does not count: it ends when the turn is acknowledged.
        executes = self.executions and not (gathered.given_up and self.executions.keys() <= set(gathered.given_up))
        status = RUNNING if executes or gathered.begun else WAITING
        wake_at = self._next_wake() if play.line.timers or self.retrying or self.deadlines else None
        waiting = status == WAITING
        if gathered.events or status != self.status or (waiting and wake_at != self.wake_at):
            self.open = Gathered()
            release = waiting and not self.inbox and self.shift.should_release(self)
            self._commit(
                gathered,
                status=status,
                wake_at=wake_at,
                waits=waits_of(self, status) if waiting else "",
                release=release,
            )
        elif gathered.begun or gathered.given_up:
            self.open = Gathered()
            self._act(gathered)
        if wake_at is not None:
            self._set_timer(wake_at)
        if self.transactions and self.flight is None:
            self.shift.transact_next(self)

    def _hand_over(self, gathered: Gathered) -> None:
        """The worker leaves, and nothing of this run executes here any more: another takes it on at once."""
        ready = bool(self.executions or gathered.begun)
        self.open = Gathered()
        self._commit(
            gathered,
            status="ready" if ready else WAITING,
            wake_at=self._next_wake(),
            waits="" if ready else waits_of(self, WAITING),
            release=True,
        )

    def _next_wake(self) -> int | None:
        line = self.play.line
        wake = line.next_timer() if line.timers else None
        for times in (self.retrying, self.deadlines):
            if times:
                first = min(times.values())
                wake = first if wake is None or first < wake else wake
        return wake

    def _set_timer(self, wake_at: int | None) -> None:
        if wake_at is not None and (self.timer_at is None or wake_at < self.timer_at):
            self.timer_at = wake_at
            self.shift.wake_resident(self, wake_at)

    def _commit(self, gathered: Gathered, *, status: str, **facts: Any) -> None:
        shift = self.shift
        line = self.play.line
        if line.unheard:
            gathered.unheard, line.unheard = line.unheard, ()
        turn = Turn(
            run=self.key,
            owner=shift.incarnation,
            epoch=self.epoch,
            version=self.version,
            last=self.last,
            id=shift.turn_id(),
            first_seq=self.seq,
            events=list(map(stored.encode, gathered.events)),
            consumed=gathered.consumed,
            starts=gathered.starts,
            sends=gathered.sends,
            progress=gathered.progress,
            status=status,
            **facts,
        )
        self.flight = (turn, gathered)
        shift.committer.turn(turn, self.answered)
        shift.kick()

    def _close(self) -> None:
        """The run has ended: its closing turn tells the parent and asks its children to cancel."""
        end = self.play.end
        assert end is not None
        gathered, self.open = self.open, Gathered()
        gathered.progress = True
        line = self.play.line
        reason = line.cancel_reason or "its parent has ended"
        for step in line.emitted:
            gathered.add("sends", cancelling(self.key, step, reason))
        if self.parent is not None and self.policy.awaited:
            assert self.parent_step is not None
            gathered.add(
                "sends",
                telling_parent(
                    kind="workflow",
                    parent=self.parent,
                    step=self.parent_step,
                    run=self.this.id,
                    status=end.status,
                    result=end.result,
                    error=end.error,
                ),
            )
        if self.more_mail >= FORCED_AFTER:
            # The code has ended before these: they are taken by being listed, so that only newer ones send it back.
            unread = tuple(id for id in map(_message_of, self.inbox) if id is not None)
            gathered.consumed = [*gathered.consumed, *unread]
            gathered.events = [
                msgspec.structs.replace(event, unread=event.unread + unread) if isinstance(event, ev.Ended) else event
                for event in gathered.events
            ]
        self._commit(
            gathered,
            status=end.status,
            closing=True,
            forced=self.more_mail >= 2 * FORCED_AFTER,
            result=end.result,
            error=None if end.error is None else msgspec.json.encode(end.error).decode(),
        )

    def _block(self, difference: Any) -> None:
        """The code differs from the history: write nothing but that, with the report, and let others try."""
        report = NonDeterminismError(
            self.this.id,
            difference.step,
            recorded=f"event {difference.number}, {difference.recorded}" if difference.number else difference.recorded,
            recorded_site=difference.recorded_site,
            asked=difference.asked,
            asked_site=difference.asked_site,
        )
        self._put_aside(str(report))

    def _put_aside(self, report: str) -> None:
        """Write the run as blocked, with nothing that has gathered; it is tried again after a pause."""
        self.blocked_tries += 1
        if self.blocked_tries == 1:
            log.error("%s", report)
        self.open = Gathered()
        self._commit(
            Gathered(),
            status="blocked",
            wake_at=self.shift.now() + back_off(self.blocked_tries),
            waits=waits_text(Waits(blocked=report, tries=self.blocked_tries)),
            release=True,
        )

    def _strike(self) -> None:
        """The code did not rest: a strike, a pause, and `why` names its line."""
        self.open = Gathered()
        self._commit(
            Gathered(),
            status=WAITING,
            wake_at=self.shift.now() + FIRST_BACK_OFF * 5,
            waits=waits_text(Waits(restless=self.play.restless)),
            release=True,
            strike=True,
        )

    # --- answers --------------------------------------------------------------------------------------

    def answered(self, verdict: Any) -> None:
        """The commit in flight came back."""
        if self.gone or self.flight is None:
            return
        turn, gathered = self.flight
        self.flight = None
        if type(verdict) is Committed:
            self._committed(turn, gathered)
        elif isinstance(verdict, MoreMail):
            self._rebuild(gathered)
        elif isinstance(verdict, Fenced):
            self.shift.lost(self)
        elif isinstance(verdict, Unstorable) and turn.status != "blocked":
            self._put_aside(
                f"run {self.this.id}: the store cannot keep its turn: {verdict.reason}. That is a bug of Perdure's, "
                "not of the workflow's. The run is tried again from its last commit; report it."
            )
        elif isinstance(verdict, (Unstorable, StoreError)):
            log.error("run %s: the store refused its turn: %s", self.this.id, verdict)
            self.shift.lost(self)
        else:  # Busy: the same turn again in a moment
            self.flight = (turn, gathered)
            self.shift.loop.call_later(0.05, self.shift.safely, self, self._again, turn)

    def _again(self, turn: Turn) -> None:
        if not self.gone:
            self.shift.committer.turn(turn, self.answered)
            self.shift.kick()

    def _committed(self, turn: Turn, gathered: Gathered) -> None:
        self.version += 1
        self.last = turn.id
        self.seq += len(turn.events)
        self.status = turn.status
        self.wake_at = turn.wake_at
        self.written_waits = turn.waits
        for message, error in gathered.unheard:
            tell_unheard(self.this.id, message, error)
        for start in turn.starts:
            if start.awaited or start.parent is None:
                continue
            if start.idempotency_key is not None or start.id != child_id(self.this.id, start.parent.step):
                self.shift.see_that_it_began(self, start)
        if turn.status != RUNNING or self.key in self.shift.parked:
            self.shift.noted(self)
        if self.key == self.shift.alone_with and turn.progress:
            self.shift.no_longer_alone()
        if turn.closing:
            self.shift.ended(self, turn)
        elif turn.release:
            self.shift.dropped(self)
        else:
            self.blocked_tries = self.more_mail = 0
            if self.unwanted and not self.open.events:
                self.unwanted = []
            if gathered.given_up:
                self._act(gathered)
            else:
                for step, attempt in gathered.begun:
                    self._begin_step(step, attempt)
            # What has not changed since the turn was closed needs no look: it still executes something.
            quiet = self.executions and turn.status == RUNNING and not self.shift.draining and not self.transactions
            if not quiet or self.open.events or self.open.begun or self.play.over or self.inbox:
                self.settle()

    def _act(self, gathered: Gathered) -> None:
        """What the acknowledged turn caused may now leave the run."""
        for step in gathered.given_up:
            execution = self.executions.pop(step, None)
            if execution is not None:
                self.shift.abandon(execution)
        for step, attempt in gathered.begun:
            self._begin_step(step, attempt)

    def _begin_step(self, step: str, attempt: int) -> None:
        line = self.play.line
        op = line.pending.get(step)
        if op is None or op.attempt != attempt:
            return
        there = self.executions.get(step)
        if there is not None and there.attempt == attempt:
            return  # It survived a rebuild of this run.
        call: LocalCall = op.spec
        info = StepInfo(self.this.id, self.this.workflow, step, attempt, self.seed)
        execution = Execution(step, attempt, call, info, self._step_ended)
        self.executions[step] = execution
        self.shift.execute(self, op, execution)

    def _step_ended(self, execution: Execution, value: Any, error: BaseException | None) -> None:
        """An execution has reported; on the loop's thread."""
        self.shift.freed(execution)
        if self.gone:
            return
        if self.executions.get(execution.step) is execution:
            del self.executions[execution.step]
        call = execution.call
        if error is None:
            try:
                raw, decoded = call.encode(value, execution.step)
            except (PayloadError, LimitExceeded) as refused:
                # It would be refused again: no retry.
                self.outcome(Outcome(execution.step, execution.attempt, error=refused, final=True))
            else:
                line = self.play.line
                op = line.pending.get(execution.step)
                if (
                    op is None
                    or op.attempt != execution.attempt
                    or line.timers
                    or self.inbox
                    or self.pumping
                    or self.rebuilding
                    or self.transacting is not None
                    or self.play.over
                ):
                    self.outcome(Outcome(execution.step, execution.attempt, raw=raw, value=decoded))
                else:
                    # Nothing stands before it: as `pump` would, without the ceremony.
                    self._take_value(op, raw, decoded, self._now())
                    self.settle()
        else:
            self.outcome(Outcome(execution.step, execution.attempt, error=error))

    # --- rebuilding -----------------------------------------------------------------------------------

    def _rebuild(self, gathered: Gathered) -> None:
        """Newer mail came before the end: throw the turn away, read all mail, deliver it and then the rest again."""
        self.more_mail += 1
        inputs: list[Any] = [e for e in (*gathered.events, *self.open.events) if isinstance(e, ev.INPUTS)]
        again = [
            Again(event)
            for event in inputs
            if not hasattr(event, "message") and not isinstance(event, (ev.Time, ev.Resumed))
        ]
        first = inputs[0].at if inputs else self.play.line.now
        resumed = next((event for event in inputs if isinstance(event, ev.Resumed)), None)
        # Mail is read again, all of it; what of it had been delivered, now or in an earlier turn, keeps its time.
        delivered = [*inputs, *(item.event for item in self.inbox if isinstance(item, Again))]
        times = {event.message: event.at for event in delivered if hasattr(event, "message")}
        self.inbox = deque([*self.unwanted, *(item for item in self.inbox if _message_of(item) is None)])
        self.unwanted = []
        # What is thrown away has not happened: nothing is logged of it.
        self.play.line.replaying = True
        self.play.close()
        self.open = Gathered()
        self.retrying.clear()
        self.deadlines.clear()
        self.rebuilding = True
        self.play = self._new_play()
        self.shift.read_again(self, lambda events, mail: self._read(events, mail, again, times, first, resumed))

    def _read(
        self,
        events: Sequence[ev.Event],
        mail: Sequence[Mail],
        again: Sequence[Again],
        times: dict[str, int],
        first: int,
        resumed: ev.Resumed | None,
    ) -> None:
        # Posted since then, and perhaps after the mailbox was read.
        posted = {item.id: item for item in self.inbox if isinstance(item, Mail)}
        unread = {**posted, **{message.id: message for message in mail}}
        taken = set(_messages_in(events))
        # Mail comes first and in mailbox order, old with the time it had, new with that of the turn's first input. What
        # it overtakes keeps its time, so that mail comes no later than that.
        if again:
            times = {message: min(at, again[0].event.at) for message, at in times.items()}
        messages = [
            Again(input_of(message, times.get(message.id, first)))
            for message in sorted(unread.values(), key=lambda m: m.position)
            if message.id not in taken
        ]
        self.known_mail = taken | unread.keys()
        self.inbox = deque([*messages, *(item for item in self.inbox if not isinstance(item, Mail))])
        self._replay(iter(self.play.replay(events)), again, resumed)

    # --- leaving memory -------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """The run's public id."""
        return self.this.id

    @property
    def waits(self) -> str:
        """What its row says it waits for."""
        return self.written_waits

    @property
    def fence(self) -> Fence:
        """What the next turn finds in the store, if nothing has come before it."""
        return Fence(self.key, self.shift.incarnation, self.epoch, self.version, self.last, self.seq)

    @property
    def parked(self) -> bool:
        """Whether it only waits, with nothing in flight, in hand or unacknowledged."""
        return (
            not self.gone
            and not self.rebuilding
            and self.flight is None
            and not self.executions
            and not self.inbox
            and not self.open.events
            and self.status == WAITING
        )

    @property
    def owes(self) -> bool:
        """Whether it may hold outcomes that nobody else knows, although nothing of it executes."""
        return self.rebuilding or (
            self.flight is not None and any(isinstance(event, ev.LOCAL_OUTCOMES) for event in self.flight[1].events)
        )

    def leave(self) -> None:
        """Leave memory: the code is closed, functions in flight are cancelled."""
        if self.gone:
            return
        self.gone = True
        for execution in self.executions.values():
            if execution is not None:
                self.shift.abandon(execution)
        self.executions.clear()
        self.inbox.clear()
        self.play.close()

    def name_long_steps(self) -> None:
        """Put steps that have run for a while into `waits`, by a commit without events."""
        if self.gone or self.flight is not None or self.rebuilding or self.play.over or not self.executions:
            return
        # One that has not begun yet, for want of room, is named too.
        long_ago = self.shift.now() - LONG_STEP
        if not any(e is not None and e.began <= long_ago for e in self.executions.values()):
            return
        waits = waits_of(self, RUNNING)
        if waits != self.written_waits:
            gathered, self.open = self.open, Gathered()
            self._commit(gathered, status=RUNNING, wake_at=self._next_wake(), waits=waits)


def _messages_in(events: Iterable[ev.Event]) -> Iterator[str]:
    """The ids of the messages that a history has taken."""
    return (message for message in (getattr(event, "message", None) for event in events) if message is not None)


def _message_of(item: Mail | Outcome | Again) -> str | None:
    """The id of the message that waits here, also when it comes again."""
    if isinstance(item, Mail):
        return item.id
    return getattr(item.event, "message", None) if isinstance(item, Again) else None


def back_off(tries: int) -> int:
    """Microseconds until a blocked run is tried again, after so many tries: 1 s doubling to 5 min."""
    return min(FIRST_BACK_OFF << min(tries - 1, 20), LAST_BACK_OFF)


def blocked_tries(waits: str) -> int:
    """How often a blocked run was tried in vain, from its row."""
    return read_waits(waits).tries


class Fence(NamedTuple):
    """What a turn must find in the store to take effect, and where its events go."""

    run: int
    owner: str | None
    epoch: int
    version: int
    last: str
    first_seq: int


def fence_of(row: Row) -> Fence:
    """For the next turn of a claimed run."""
    return Fence(row.key, row.owner, row.epoch, row.version, row.turn, row.history_events + 1)


def put_aside(fence: Fence, waits: str, reason: str, *, now: int, turn_id: str) -> Turn:
    """The turn of a run at which this worker failed: it blocks, and is tried again later.

    By this worker, or by one that can: a newer version, other code, more memory. waits: those of its row.
    reason: what `why` says.
    """
    tries = blocked_tries(waits) + 1
    return Turn(
        **fence._asdict(),
        id=turn_id,
        status="blocked",
        wake_at=now + back_off(tries),
        waits=waits_text(Waits(blocked=reason, tries=tries)),
        release=True,
    )
