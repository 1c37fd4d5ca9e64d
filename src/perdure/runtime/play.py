"""A run in memory: its line, its code and the driver between them.

`replay` brings the code to where the recorded line ends; `deliver` lets one more input reach it. After each,
`take` gives what the code asked for. A play that has ended, or differs, is done with: `close` it.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET

from perdure.core import events as ev
from perdure.core import failure
from perdure.core.errors import Cancelled, NeverRests, Unwinding
from perdure.core.failure import RecordedError
from perdure.core.limits import Limits
from perdure.core.match import Difference, Line, Op
from perdure.runtime import steps
from perdure.runtime.context import Context, Facts, SyncContext, ThisRun
from perdure.runtime.drive_async import AsyncDriver
from perdure.runtime.drive_sync import BodyThreads, SyncDriver
from perdure.runtime.loop import MOST_CALLBACKS, is_theirs, line_of
from perdure.runtime.registry import Workflow, place_of


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a run's code ended: its status, with the stored result or the recorded error."""

    status: str
    result: str | None = None
    error: RecordedError | None = None


class Asked(msgspec.Struct, frozen=True):
    """What the code asked for behind one input.

    commands: to be recorded behind it. begun: local steps whose functions may begin once that is done.
    dropped: operations given up. starts: children and activities to be started with it.
    """

    commands: Sequence[ev.Command]
    begun: Sequence[Op]
    dropped: Sequence[Op]
    starts: Sequence[Op]


NOTHING = Asked((), (), (), ())


class Play:
    """See the module. input: the stored input, read from the run's row.

    without_transactions: the URL of a store that has none, so that transaction steps are refused.
    """

    def __init__(
        self,
        workflow: Workflow[Any, Any],
        run: ThisRun,
        *,
        seed: str,
        input: str,
        limits: Limits,
        known: Mapping[str, Workflow[Any, Any]],
        threads: BodyThreads,
        without_transactions: str = "",
    ) -> None:
        self.workflow = workflow
        self.run = run
        self.end: End | None = None
        self.restless = ""
        """Where the code was stopped because it did not rest; "" if it did."""
        self._seed = seed
        self._input = input
        self._limits = limits
        self._known = known
        self._threads = threads
        self._without_transactions = without_transactions
        self.line = Line(run.id)
        self.driver: AsyncDriver | SyncDriver | None = None
        # A sync run gives its thread back while it waits, and is rebuilt from this.
        self._kept: list[ev.Event] | None = [] if workflow.style == "sync" else None

    @property
    def difference(self) -> Difference | None:
        return self.line.difference

    @property
    def over(self) -> bool:
        """Whether nothing more can be delivered: the code has ended, differs or did not rest."""
        return self.end is not None or self.line.difference is not None or bool(self.restless)

    def did_not_rest(self, where: str = "") -> None:
        """The code was stopped. Twice is once: what is known of where, stays."""
        self.restless = where or self.restless or "at a line that nobody saw"

    def begin(self, started: ev.Started) -> None:
        """Begin a life that has no record yet but its `started`."""
        self.line.open(started.at, number=1, last=True)
        self._deliver(started, UNSET)
        if self._kept is not None:
            self._kept.append(started)

    def replay(self, events: Sequence[ev.Event]) -> Iterator[None]:
        """Bring the code to the end of the recorded line, yielding now and then so that others get their turn.

        A lone `started` is life: nothing was recorded behind it yet. So is the outcome of a transaction step at the
        end of the line: its commit holds the outcome alone, what the code did with it comes with the next one.
        """
        if self._kept is not None:
            self._kept.extend(events)
        line = self.line
        inputs = [i for i, event in enumerate(events) if isinstance(event, ev.INPUTS)]
        line.replaying = len(events) > 1 or self._rebuilding
        for n, start in enumerate(inputs):
            stop = inputs[n + 1] if n + 1 < len(inputs) else len(events)
            line.following = events[stop] if stop < len(events) else None
            event: Any = events[start]
            if start + 1 == stop == len(events) and type(event) is ev.StepCompleted and event.op == "transaction":
                line.replaying = self._rebuilding
            line.open(
                event.at,
                number=start + 1,
                expected=events[start + 1 : stop],  # type: ignore[arg-type]  # between two inputs stand commands
                last=stop == len(events),
            )
            self._deliver(event, UNSET)
            line.close()
            if self.end is not None and stop < len(events):
                line.differ(stop + 1, events[stop], None, text=f"the run's end ({line.status})")
            if line.difference is not None:
                # An end that the record does not bear out is none.
                self.end = None
            if self.over:
                return
            if n % 64 == 63:
                yield
        line.replaying = False

    def deliver(self, event: ev.Input, value: Any = UNSET) -> None:
        """Let one input reach the code, in life. value: the decoded value of an outcome, where it is at hand."""
        line = self.line
        line.open(event.at)
        if value is not UNSET and not line.timers and self._kept is None:
            # What most inputs are: the value of a step, for an async run. As `_deliver`, without looking around.
            line.complete(event.step, value)  # type: ignore[union-attr]  # only outcomes have a value
            self._run()
            return
        self._deliver(event, value)
        if self._kept is not None:
            self._kept.append(event)

    def take(self) -> Asked:
        """What the code asked for since the last `take`, in order."""
        line = self.line
        if not (line.commands or line.begun or line.dropped or line.starts):
            return NOTHING
        asked = Asked(line.commands, line.begun, line.dropped, line.starts)
        if self._kept is not None:
            self._kept.extend(line.commands)
        line.commands, line.begun, line.dropped, line.starts = [], [], [], []
        return asked

    def fail(self, error: BaseException) -> None:
        """End the run from outside its code, as failed."""
        if not self.over:
            self._end_with("failed", None, failure.record(error))

    def close(self) -> None:
        """Close the code: it can begin nothing more, its cleanup blocks start no durable operation."""
        self.line.dead = True
        if self.driver is not None:
            self.driver.close()

    # --- inside ---

    def _deliver(self, event: Any, value: Any) -> None:
        line = self.line
        driver = self.driver
        if driver is None:
            self._start(event)
            driver = self.driver
        else:
            # What a transaction step has done was recorded without looking at timers that came due while it was open.
            first = type(event) is ev.StepCompleted and event.op == "transaction"
            if line.timers and not first and not self._fire_all():
                return
            # A second request does not interrupt the cleanup that the first one began.
            first_request = type(event) is ev.CancelRequested and not line.cancel_requested
            line.apply(event, value)
            if first_request:
                driver.cancel()
        self._run()
        # Only a sync body may be elsewhere.
        if (
            self._kept is not None
            and driver is not None
            and driver.wants_body
            and not (self._rebuilding or self._stopped())
        ):
            self._rebuild(event, value)

    def _fire_all(self) -> bool:
        """Fire the timers that are due, each to rest before the next; False if that has stopped the code."""
        left = MOST_CALLBACKS
        while self.line.fire():
            self._run()
            left -= 1
            if left == 0:
                # Each timer sets another one for the same instant.
                self.did_not_rest(line_of(getattr(self.driver, "main", None)))
            if self._stopped():
                return False
        return True

    def _run(self) -> None:
        driver = self.driver
        assert driver is not None
        try:
            over = driver.run()
        except NeverRests as error:
            self.did_not_rest(error.where)
            return
        if over and self.end is None and self.line.difference is None:
            self._finish()

    def _stopped(self) -> bool:
        return self.over or self.line.dead

    def _start(self, event: ev.Started) -> None:
        line = self.line
        workflow = self.workflow
        driver: AsyncDriver | SyncDriver
        if workflow.style == "sync":
            driver = SyncDriver(line, self._threads)
        else:
            driver = AsyncDriver(line, event.at)
        self.driver = driver
        facts = Facts(host=driver, run=self.run, seed=self._seed, limits=self._limits, known=self._known)
        facts.without_transactions = self._without_transactions
        try:
            args, kwargs = workflow.signature.decode(self._input)
        except Exception as error:
            self._refuse_input(error)
            return
        facts.input_first = args[0] if args else next(iter(kwargs.values()), None)
        if workflow.bare:
            args = []
        context: Any = SyncContext(facts) if workflow.style == "sync" else Context(facts)
        driver.start(lambda: workflow.fn(context, *args, **kwargs), generator=workflow.style == "generator")

    def _refuse_input(self, error: Exception) -> None:
        line = self.line
        recorded = failure.record(error)
        if line.replaying and not line.refused("input"):
            line.differ(1, None, None, text=f"an input that no longer fits: {error}")
            return
        if not line.replaying:
            line.refuse("input", recorded)
        self._end_with("failed", None, recorded)

    def _finish(self) -> None:
        assert self.driver is not None
        value, error = self.driver.outcome()
        if self.line.replaying:
            self.line.end_site = self._end_site(error)
        if error is None:
            try:
                result = self.workflow.returns.roundtrip(value, "the run's result", self._limits)[0].decode()
            except Exception as refused:
                error = refused
            else:
                self._end_with("completed", result, None)
                return
        if isinstance(error, NeverRests):
            self.did_not_rest(error.where)
        elif isinstance(error, Unwinding):
            # The code was closed; nothing it did then counts.
            self.line.dead = True
        elif isinstance(error, Cancelled) and self.line.cancel_requested:
            self._end_with("cancelled", None, RecordedError(type="Cancelled", message=self.line.cancel_reason))
        else:
            self._end_with("failed", None, failure.record(error))
            failure.let_go(error)

    def _end_site(self, error: BaseException | None) -> str:
        """Where the code has ended, for a report: the line that raised, or where the function begins."""
        where = ""
        for frame, number in traceback.walk_tb(error.__traceback__ if error is not None else None):
            if is_theirs(frame.f_code.co_filename):
                where = f"{steps.short(frame.f_code.co_filename)}:{number}"
        if not where:
            file, _, number_ = place_of(self.workflow.fn).rpartition(":")
            where = f"{steps.short(file)}:{number_}" if file else ""
        return where

    def _end_with(self, status: str, result: str | None, error: RecordedError | None) -> None:
        self.line.finish(status)
        if self.line.difference is None:
            self.end = End(status=status, result=result, error=error)

    # A sync body whose thread is elsewhere starts again over the whole line.

    _rebuilding = False

    def unwind(self) -> bool:
        """Give the thread of a waiting sync body back; False if there is none to give."""
        return isinstance(self.driver, SyncDriver) and self.driver.unwind()

    def _rebuild(self, event: Any, value: Any) -> None:
        """The wait is resolved, but the body's thread was given back or executes a function."""
        assert self.driver is not None
        assert self._kept is not None
        self.driver.close()
        recorded, self._kept = self._kept, []
        self.line = Line(self.run.id)
        self.driver = None
        self._rebuilding = True
        try:
            for _ in self.replay(recorded):
                pass
            line = self.line
            line.digests_differ = ()
            if line.difference is not None:
                return
            # What the first life began is known to the worker; only this input's doing is new.
            line.commands, line.begun, line.dropped, line.starts = [], [], [], []
            line.open(event.at)
            self._deliver(event, value)
        finally:
            self._rebuilding = False
