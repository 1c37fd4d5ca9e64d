"""A dispatched activity: a run without a history. Claimed, executed with its retries, its end told to the parent."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from perdure.core import failure, retry
from perdure.core.errors import LimitExceeded, PayloadError, timed_out
from perdure.core.failure import RecordedError
from perdure.core.retry import Retry
from perdure.core.turn import Busy, Committed, Mail, Row, Turn
from perdure.core.waits import Wait, Waits, waits_text
from perdure.runtime.steps import NO_OPTIONS, LocalCall, Policy
from perdure.worker.executing import Execution, StepInfo
from perdure.worker.remote_end import StartPolicy, policy_of, reason_of, telling_parent
from perdure.worker.residents import Fence, fence_of

if TYPE_CHECKING:
    from perdure.worker.shift import Shift

log = logging.getLogger("perdure.worker")


def policy_from(kept: StartPolicy, own: Retry) -> Retry:
    """The caller's numbers with the function's own rules: exception types and predicates do not travel."""
    if kept.retry is None:
        return own
    delays = {name: timedelta(microseconds=kept.retry[name]) for name in ("first_delay", "max_delay")}
    return Retry(**{**kept.retry, **delays}, give_up_on=own.give_up_on, retry_if=own.retry_if)


class ActivityRun:
    """One claimed activity. Everything happens on the shift's loop."""

    def __init__(self, shift: Shift, row: Row, mail: Sequence[Mail]) -> None:
        self.shift = shift
        self.row = row
        self.attempt = row.attempt
        self.seen = [m.id for m in mail]
        self.cancelled = next((m for m in mail if m.kind == "cancel"), None)
        self.gone = False
        self.execution: Execution | None = None
        self.flight: Turn | None = None
        shift.activities[row.key] = self

    @property
    def id(self) -> str:
        """The activity's public id."""
        return self.row.id

    @property
    def key(self) -> int:
        """Its key in the store."""
        return self.row.key

    @property
    def waits(self) -> str:
        """What its row says it waits for."""
        return self.row.waits

    @property
    def fence(self) -> Fence:
        """What its next turn finds in the store."""
        return fence_of(self.row)

    def begin(self) -> None:
        """Execute the attempt that is due, or end what was cancelled."""
        activity = self.shift.registry.activities[self.row.workflow]
        kept = policy_of(self.row.policy)
        if self.cancelled is not None:
            self._end_cancelled(self.cancelled)
            return
        try:
            args, kwargs = activity.signature.decode(self.row.input)
        except PayloadError as error:
            self._end("failed", None, failure.record(error))
            return
        policy = Policy(activity, NO_OPTIONS)
        policy.retry = policy_from(kept, activity.retry)
        policy.timeout = None if kept.timeout is None else timedelta(microseconds=kept.timeout)
        policy.total_timeout = None if kept.total_timeout is None else timedelta(microseconds=kept.total_timeout)
        call = LocalCall(activity.fn, tuple(args), kwargs, policy, self.shift.limits)
        step = self.row.parent_step or self.row.id
        workflow = kept.workflow or self.row.workflow
        info = StepInfo(self.row.parent_id or self.row.id, workflow, step, self.attempt, self.row.seed)
        self.execution = Execution(step, self.attempt, call, info, self._ended)
        self.shift.admit(self.execution, self._begin)

    def _begin(self) -> None:
        execution = self.execution
        assert execution is not None
        timeout = execution.call.policy.timeout
        if timeout is not None:
            execution.limit = lambda: self.shift.loop.call_later(
                timeout.total_seconds(), self.shift.safely, self, self._out_of_time, execution
            )
        self.shift.executor.begin(execution)

    def settle(self) -> None:
        """The worker leaves: what has not begun here goes to others at once."""
        if self.flight is None and not self.gone and self.execution is not None and not self.execution.counted:
            self._commit(status="ready", release=True)

    def post(self, mail: Mail) -> None:
        """A message: only a request to cancel means anything."""
        if mail.id in self.seen:
            return
        self.seen.append(mail.id)
        if mail.kind == "cancel" and self.flight is None and not self.gone:
            self.cancelled = mail
            # Its function is cancelled when that is recorded, as this leaves memory; one not called yet never is.
            if self.execution is not None and self.execution.withdraw():
                self.shift.abandon(self.execution)
            self._end_cancelled(mail)

    def _end_cancelled(self, request: Mail) -> None:
        reason = reason_of(request) or "it was asked to cancel"
        self._end("cancelled", None, RecordedError(type="Cancelled", message=reason))

    def _out_of_time(self, execution: Execution) -> None:
        execution.timer = None
        if self.gone or self.flight is not None:
            return
        self._failed(
            execution,
            failure.out_of_time(execution.too_long),
            None,
        )

    def _ended(self, execution: Execution, value: Any, error: BaseException | None) -> None:
        self.shift.freed(execution)
        if self.gone or self.flight is not None:
            return
        if error is None:
            try:
                raw, _ = execution.call.encode(value, execution.step)
            except (PayloadError, LimitExceeded) as refused:
                self._end("failed", None, failure.record(refused, kind="payload"))
            else:
                self._end("completed", raw.decode(), None)
            return
        self._failed(execution, failure.record(error), error)

    def _failed(self, execution: Execution, recorded: RecordedError, error: BaseException | None) -> None:
        call = execution.call
        spread = self.shift.spread()
        raised = error if error is not None else timed_out(recorded.message)
        delay = retry.decide(call.policy.retry, raised, self.attempt, spread)
        failure.let_go(raised)
        now = self.shift.now()
        if delay is not None and call.policy.total_timeout is not None:
            over = self.row.created_at + retry.micros(call.policy.total_timeout)
            if now + retry.micros(delay) >= over:
                delay = None
                recorded = failure.out_of_time(failure.NO_TIME_LEFT, recorded)
        if delay is None:
            self._end("failed", None, recorded)
            return
        # Handed back until the next attempt is due: the wait is the row's, not this process's.
        retry_at = now + retry.micros(delay)
        wait = Wait(
            kind="retry",
            step=execution.step,
            since=now,
            until=retry_at,
            attempt=self.attempt + 1,
            attempts=call.policy.retry.max_attempts,
            error=f"{recorded.type}: {recorded.message[:200]}",
        )
        self._commit(
            status="waiting",
            wake_at=retry_at,
            waits=waits_text(Waits(waits=[wait])),
            attempt=self.attempt + 1,
            release=True,
            progress=True,
        )

    def _end(self, status: str, result: str | None, error: RecordedError | None) -> None:
        row = self.row
        sends = []
        if row.parent is not None and row.parent_step is not None:
            sends.append(
                telling_parent(
                    kind="activity",
                    parent=row.parent,
                    step=row.parent_step,
                    run=row.id,
                    status=status,
                    result=result,
                    error=error,
                    attempts=self.attempt,
                )
            )
        self._commit(
            status=status,
            closing=True,
            forced=True,
            result=result,
            error=None if error is None else msgspec.json.encode(error).decode(),
            sends=sends,
            progress=True,
        )

    def _commit(self, **facts: Any) -> None:
        self.flight = Turn(
            **self.fence._asdict(),
            id=self.shift.turn_id(),
            consumed=list(self.seen),
            **facts,
        )
        self.shift.committer.turn(self.flight, self._answered)
        self.shift.kick()

    def _answered(self, verdict: Any) -> None:
        turn = self.flight
        if isinstance(verdict, Busy) and turn is not None:
            self.shift.loop.call_later(0.05, self.shift.safely, self, self._again, turn)
            return
        if not isinstance(verdict, Committed):
            log.debug("activity %s: %s", self.row.id, verdict)
        self.leave()
        if isinstance(verdict, Committed) and turn is not None and turn.closing:
            self.shift.ended_run(self.row.key, turn)

    def _again(self, turn: Turn) -> None:
        if not self.gone:
            self.shift.committer.turn(turn, self._answered)
            self.shift.kick()

    def leave(self) -> None:
        """Leave memory. Twice is once."""
        if self.gone:
            return
        self.gone = True
        if self.execution is not None:
            self.shift.abandon(self.execution)
        if self.shift.activities.get(self.row.key) is self:
            del self.shift.activities[self.row.key]
        if self.shift.alone_with == self.row.key:
            self.shift.no_longer_alone()
        if self.shift.wants_room:
            self.shift.made_room()
