"""A transaction step: the effect of its function and its record in one commit of the store's own database.

An attempt has its run's commit right. It begins when no turn of the run is in flight and nothing waits to be written;
until it ends no input reaches the code and no turn is closed. So its outcome stands in the line where the attempt
began, at that time, and before whatever came meanwhile. The commit records the outcome alone: it is delivered when it
is written, and what the code does with it goes into the next turn (docs/decisions/010).
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import UNSET, Raw

from perdure.core import events as ev
from perdure.core import failure, stored
from perdure.core.errors import PayloadError, RolledBack, StoreError
from perdure.core.match import Op
from perdure.core.turn import Busy, Committed, Turn
from perdure.runtime import inside
from perdure.runtime.drive_sync import SyncDriver
from perdure.worker.executing import Execution, _current
from perdure.worker.residents import RUNNING, Gathered, Outcome, Resident

if TYPE_CHECKING:
    from perdure.stores.contract import OpenTransaction

log = logging.getLogger("perdure.worker")

FIRST_PAUSE: Final = 0.05
LAST_PAUSE: Final = 5.0
"""Seconds between tries while the store is in trouble, as the committer's."""


def wanted(resident: Resident, execution: Execution) -> None:
    """An attempt may begin as soon as its run has nothing in flight."""
    if resident.transactions is None:
        resident.transactions = deque()
    resident.transactions.append(execution)
    resident.settle()


def begin_next(resident: Resident) -> None:
    """Give the run's commit right to the attempt that waits longest. The run has nothing in flight or in hand."""
    waiting = resident.transactions
    line = resident.play.line
    while waiting and not resident.gone:
        if resident.inbox:
            return  # it is being delivered, and then the turn is settled again
        at = resident._now()
        if line.timers and line.due(at):
            resident.shift.loop.call_soon(resident.shift.safely, resident, resident.tick)
            return
        execution = waiting.popleft()
        op = line.pending.get(execution.step)
        if op is not None and resident.executions.get(execution.step) is execution and not execution.abandoned:
            Attempt(resident, execution, op, at).begin()
            return


class _Recorded:
    """Effect and outcome are written. value: decoded, where the function ran in the call that was answered."""

    def __init__(self, event: ev.StepCompleted, value: Any) -> None:
        self.event = event
        self.value = value


class _Failed:
    """Nothing is written: the function failed, or its work could not be committed. final: it would fail again."""

    def __init__(self, error: BaseException, *, final: bool = False) -> None:
        self.error = error
        self.final = final


class Attempt:
    """One attempt while it has the commit right: begun and ended on the loop's thread, made in another."""

    def __init__(self, resident: Resident, execution: Execution, op: Op, at: int) -> None:
        shift = resident.shift
        self.resident = resident
        self.execution = execution
        self.op = op
        self.at = at
        self.turn = Turn(
            run=resident.key,
            owner=shift.incarnation,
            epoch=resident.epoch,
            version=resident.version,
            last=resident.last,
            id=shift.turn_id(),
            first_seq=resident.seq,
            status=RUNNING,
            wake_at=resident._next_wake(),
            progress=True,
        )
        self._after: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._given_up = threading.Event()
        self._open: OpenTransaction | None = None
        self._committing = False
        self._last = False  # what ends with this attempt's time is the step's

    # --- on the loop's thread ---

    def begin(self) -> None:
        resident, execution, op = self.resident, self.execution, self.op
        shift = resident.shift
        resident.transacting = self
        resident.flight = (self.turn, Gathered())
        if self._seconds_left() is not None:
            if self._last:
                execution.timer = self._clock()
            else:
                execution.limit = self._clock
        driver = resident.play.driver
        if isinstance(driver, SyncDriver) and driver.may_execute(op):
            self._after = lambda: driver.finished(op)
            execution.begins()
            driver.execute(op, self._make)
        else:
            shift.executor.in_thread(self._make, execution)

    def _clock(self) -> Any:
        shift = self.resident.shift
        return shift.loop.call_later(self._seconds_left() or 0, shift.safely, self.resident, self._out_of_time)

    def _seconds_left(self) -> float | None:
        """How long the attempt may take: its timeout, or what is left of the step's total_timeout."""
        timeout: timedelta | None = self.execution.call.policy.timeout
        seconds = None if timeout is None else timeout.total_seconds()
        deadline = self.resident.deadlines.get(self.execution.step)
        if deadline is not None:
            left = max(deadline - self.resident._now(), 0) / 1_000_000
            if seconds is None or left < seconds:
                self._last = True
                return left
        return seconds

    def _out_of_time(self) -> None:
        """The attempt took longer than it may: it is rolled back, unless it is being committed."""
        with self._lock:
            if self._committing:
                return
            self._given_up.set()
            opened = self._open
        if opened is None:
            self._gave_up()
        else:
            # Not here: it may have to wait for a statement.
            threading.Thread(target=self._roll_back, args=(opened,), name="perdure-roll-back", daemon=True).start()

    def _gave_up(self) -> None:
        if self.resident.transacting is not self:
            return
        execution = self.execution
        self._leave()
        error = failure.out_of_time(failure.NO_TIME_LEFT if self._last else execution.too_long)
        self.resident.outcome(Outcome(execution.step, execution.attempt, error=error, final=self._last))
        self.resident.shift.abandon(execution)

    def _ended(self, result: _Recorded | _Failed | Any) -> None:
        """The attempt has a result: a record, a failure, or a verdict on its fence."""
        if self._after is not None:
            self._after()
        resident = self.resident
        if resident.transacting is not self or resident.gone:
            return
        if isinstance(result, _Recorded):
            self._recorded(result)
        elif isinstance(result, _Failed) and self._given_up.is_set():
            self._gave_up()
        elif isinstance(result, _Failed):
            self._failed(result)
        else:
            resident.transacting = None
            resident.answered(result)

    def _recorded(self, result: _Recorded) -> None:
        """Deliver the outcome, which is written; only what it causes is gathered."""
        resident = self.resident
        self._leave()
        resident.flight = (msgspec.structs.replace(self.turn, events=("",)), Gathered())
        resident._deliver(result.event, result.value)
        del resident.open.events[0]
        resident.answered(Committed(run=resident.key))
        resident.pump()
        self._free()

    def _failed(self, result: _Failed) -> None:
        execution, error = self.execution, result.error
        self._leave()
        outcome: Any = error
        if isinstance(error, RolledBack) and error.seconds is not None:
            outcome = failure.out_of_time(str(error))
        self.resident.outcome(Outcome(execution.step, execution.attempt, error=outcome, final=result.final))
        self._free()

    def _free(self) -> None:
        execution = self.execution
        execution.abandoned = True
        if execution.timer is not None:
            execution.timer.cancel()
            execution.timer = None
        # Last of all: it may begin what waited for room, also of this run.
        self.resident.shift.freed(execution)

    def _leave(self) -> None:
        resident, step = self.resident, self.execution.step
        resident.transacting = None
        resident.flight = None
        if resident.executions.get(step) is self.execution:
            del resident.executions[step]

    # --- in a thread ---

    def _make(self) -> None:
        transacting = self.resident.shift.transacting
        transacting.add(self)
        try:
            result = self._tried()
        except BaseException as error:
            log.exception('run %s: step "%s"', self.resident.this.id, self.execution.step)
            result = _Failed(error)
        finally:
            transacting.discard(self)
        if result is not None:
            self._soon(self._ended, result)

    def _roll_back(self, opened: OpenTransaction) -> None:
        try:
            opened.roll_back()
        except StoreError as error:
            log.warning('run %s: step "%s" was given up, and: %s', self.resident.this.id, self.execution.step, error)
        self._soon(self._gave_up)

    def _soon(self, tell: Callable[..., None], *args: Any) -> None:
        shift = self.resident.shift
        shift._soon(shift.safely, self.resident, tell, *args)

    @property
    def _unwanted(self) -> bool:
        return self._given_up.is_set() or self.execution.abandoned

    def _tried(self) -> Any:
        """Try until the store has said what became of it; None once nobody wants to know."""
        pause = FIRST_PAUSE
        store = self.resident.shift.store
        while not self._unwanted:
            try:
                opened = store.transaction(self.turn)
                if isinstance(opened, Committed):
                    return self._read_back()
                if isinstance(opened, msgspec.Struct):
                    if not isinstance(opened, Busy):
                        return opened
                else:
                    result = self._work(opened)
                    if result is not None:
                        return result
                    continue  # the same work would succeed if done again
            except (StoreError, MemoryError) as error:
                # Nothing is known of it, or it could not begin. The same turn is asked for again: it is written, or
                # it is not and never will be.
                if pause == FIRST_PAUSE:
                    log.error('run %s: step "%s" is tried again: %s', self.resident.this.id, self.execution.step, error)
            self._given_up.wait(pause)
            pause = min(pause * 2, LAST_PAUSE)
        # Its thread is the driver's again, whoever waits for it.
        return _Failed(RolledBack("it was given up"))

    def _work(self, opened: OpenTransaction) -> _Recorded | _Failed | None:
        """Run the function in an open transaction and commit it; None to do it again."""
        call, step = self.execution.call, self.execution.step
        with self._lock:
            self._open = opened
        final = False
        try:
            if self._unwanted:
                raise RolledBack("it was given up")
            context = call.context.copy()
            context.run(_current.set, self.execution.info)
            context.run(inside.step.set, step)
            value = context.run(call.fn, opened.connection, *call.args, **call.kwargs)
            final = True
            raw, decoded = self._encoded(value)
        except BaseException as error:
            again = opened.repeats(error) and not self._unwanted
            opened.roll_back()
            return None if again else _Failed(_reason(opened, error), final=final)
        with self._lock:
            self._committing = not self._unwanted
        if not self._committing:
            opened.roll_back()
            return _Failed(RolledBack("it was given up"))
        event = self._event(raw)
        try:
            opened.commit([stored.encode(event)])
        except RolledBack as error:
            return self._uncommitted(error)
        except StoreError:
            with self._lock:
                self._committing, self._open = False, None
            raise
        except Exception as error:
            return self._uncommitted(error) if not opened.repeats(error) else self._uncommitted(None)
        return _Recorded(event, decoded)

    def _uncommitted(self, error: Exception | None) -> _Failed | None:
        with self._lock:
            self._committing, self._open = False, None
        return None if error is None else _Failed(error)

    def _encoded(self, value: Any) -> tuple[bytes, Any]:
        call, step = self.execution.call, self.execution.step
        if inspect.isawaitable(value):
            if inspect.iscoroutine(value):
                value.close()
            raise PayloadError(
                f'The function of the transaction step "{step}" returned an awaitable. Its transaction ends when it '
                "returns, so nothing could be awaited in it. Give a plain function.",
                what=f'the result of step "{step}"',
            )
        return call.encode(value, step)

    def _event(self, raw: bytes) -> ev.StepCompleted:
        op = self.op
        return ev.StepCompleted(
            at=max(self.resident.shift.now(), self.at),
            step=op.id,
            ordinal=op.ordinal,
            op=op.kind,
            name=op.name,
            site=op.site,
            digest=op.digest,
            attempt=self.execution.attempt,
            value=Raw(raw),
        )

    def _read_back(self) -> _Recorded:
        """It was written by an earlier try, whose answer was lost: what that one recorded holds."""
        [text] = self.resident.shift.store.history(self.resident.key, self.turn.first_seq - 1)
        event = stored.decode(text)
        assert isinstance(event, ev.StepCompleted)
        return _Recorded(event, UNSET)


def _reason(opened: OpenTransaction, error: BaseException) -> BaseException:
    """Why an attempt failed: the store's own limit, if it ended the transaction under the function."""
    return opened.gone if opened.gone is not None and opened.gone.seconds is not None else error
