"""Every error Perdure raises. Each has its values as attributes and says what happened, why, and what to do.

PerdureError
├── StepFailed                    a durable call failed for good; .step .type .message .attempts .traceback .cause
│   ├── StepTimedOut              (also a TimeoutError) no attempt ended in time
│   ├── ChildFailed               a child run ended without success; .status .run_id
│   └── CallFailed                an HTTP answer that is not 2xx; .status .headers .body
├── RunEnded                      what result() raises; .run_id .info .cause
│   ├── RunFailed
│   ├── RunCancelled
│   ├── RunTerminated
│   └── RunTimedOut
├── Refused                       nothing was written
│   ├── RunNotFound
│   ├── RunExists
│   ├── RunFinished
│   ├── UnknownWorkflow
│   ├── IdempotencyConflict
│   ├── DuplicateStepId
│   ├── PayloadError              a value has a form that cannot be stored or does not fit; .what
│   ├── LimitExceeded             a value is too big or too deep; .what .limit .actual
│   └── UpdateRejected
├── NonDeterminismError           the report in a blocked run; never raised into user code
├── StoreError                    .retryable; the driver's error is the __cause__
│   ├── StoreUnavailable          retryable
│   ├── StoreLocked               retryable
│   ├── StoreFull
│   ├── StoreReadOnly
│   ├── StoreTooNew
│   ├── StoreCorrupt
│   ├── NoTransactions            it cannot work in one transaction with steps and callers
│   ├── RolledBack                a step's transaction was rolled back before its commit
│   └── NotAStore
├── NonRetryable                  raised by a step's function: do not try again
└── RetryAfter                    raised by a step's function: try again, not before .delay has passed

BaseException
├── Unwinding                     stops user code on purpose; `except Exception` does not see it
│   ├── Suspended                 a sync run gives back its thread while it waits
│   ├── Evicted                   the run left memory; its code is closed
│   └── NeverRests                the code ran on without ever waiting
└── Cancelled                     another name of asyncio.CancelledError

Where the type that a step raised is a built-in or named in `raises=`, the `StepFailed` is an instance of it too
(`failure.py`). All of them can be pickled and copied: their class, `args` and attributes come back.
"""

from __future__ import annotations

import sys
from asyncio import CancelledError as Cancelled
from asyncio import TimeoutError as _AsyncioTimeoutError
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, Final, TypeVar

from perdure.core.ids import typed

__all__ = [
    "CallFailed",
    "Cancelled",
    "ChildFailed",
    "DuplicateStepId",
    "Evicted",
    "IdempotencyConflict",
    "LimitExceeded",
    "NeverRests",
    "NoTransactions",
    "NonDeterminismError",
    "NonRetryable",
    "NotAStore",
    "PayloadError",
    "PerdureError",
    "Refused",
    "RetryAfter",
    "RolledBack",
    "RunCancelled",
    "RunEnded",
    "RunExists",
    "RunFailed",
    "RunFinished",
    "RunNotFound",
    "RunTerminated",
    "RunTimedOut",
    "StepFailed",
    "StepTimedOut",
    "StoreCorrupt",
    "StoreError",
    "StoreFull",
    "StoreLocked",
    "StoreReadOnly",
    "StoreTooNew",
    "StoreUnavailable",
    "Suspended",
    "UnknownWorkflow",
    "Unwinding",
    "UpdateRejected",
    "timed_out",
]

_E = TypeVar("_E", bound=BaseException)


class PerdureError(Exception):
    """Root of every error of Perdure's own."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The constructors take values, `args` holds the text: copying by the default `cls(*args)` would mix them up.
        return restored, (type(self), self.args, dict(self.__dict__))


def restored(kind: type[_E], args: tuple[Any, ...], attributes: Mapping[str, Any]) -> _E:
    """An exception with this class, args and attributes, without running its `__init__`."""
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


# --- what a durable call raises


class StepFailed(PerdureError):
    """A durable call failed for good.

    type: the name of what was raised, `ValueError` or `orders.CardDeclined`; message: its text.
    attempts: how many were made. traceback: text of the last one.
    cause: the error behind it, in the same form, or None.
    """

    step: str
    type: str
    message: str
    attempts: int
    traceback: str
    cause: StepFailed | None

    def __init__(
        self,
        step: str,
        type: str,
        message: str,
        *,
        attempts: int = 1,
        traceback: str = "",
        cause: StepFailed | None = None,
    ) -> None:
        self.step = step
        self.type = type
        self.message = message
        self.attempts = attempts
        self.traceback = traceback
        self.cause = cause
        super().__init__(self._text())

    def _text(self) -> str:
        return (
            f"Step {quoted(self.step)} failed after {_attempts(self.attempts)}. "
            f"The last one raised {_shown(self.type, self.message)} "
            "Catch StepFailed in the workflow to handle it, or the original type: a built-in, or one named in raises=."
        )


class StepTimedOut(StepFailed, TimeoutError, *(() if sys.version_info >= (3, 11) else (_AsyncioTimeoutError,))):  # type: ignore[misc]  # a base that only 3.10 needs
    """No attempt of a step ended in time. Also a `TimeoutError`."""

    def _text(self) -> str:
        return (
            f"Step {quoted(self.step)} did not end in time after {_attempts(self.attempts)}. {_sentence(self.message)} "
            "Let it do less, give it a longer timeout= or total_timeout=, or catch StepTimedOut to go on without it."
        )


class ChildFailed(StepFailed):
    """A child run ended without success.

    status: how it ended (`failed`, `cancelled`, `terminated`, `timed_out`). run_id: its id.
    """

    status: str
    run_id: str

    def __init__(
        self,
        step: str,
        type: str,
        message: str,
        *,
        status: str,
        run_id: str,
        attempts: int = 1,
        traceback: str = "",
        cause: StepFailed | None = None,
    ) -> None:
        self.status = status
        self.run_id = run_id
        super().__init__(step, type, message, attempts=attempts, traceback=traceback, cause=cause)

    def _text(self) -> str:
        why = _shown(self.type, self.message) if self.type else _sentence(self.message)
        return (
            f"Step {quoted(self.step)} failed: the child run {quoted(self.run_id)} ended as {_plain(self.status)}. "
            f"{why} See `perdure show {typed(self.run_id)}`, or catch ChildFailed to go on without it."
        )


class CallFailed(StepFailed):
    """An HTTP call was answered, but not with 2xx.

    status: the answer's code. headers, body: what came with it.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    def __init__(
        self,
        step: str,
        type: str,
        message: str,
        *,
        status: int,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        attempts: int = 1,
        traceback: str = "",
        cause: StepFailed | None = None,
    ) -> None:
        self.status = status
        self.headers = dict(headers or {})
        self.body = body
        super().__init__(step, type, message, attempts=attempts, traceback=traceback, cause=cause)

    def _text(self) -> str:
        return (
            f"Step {quoted(self.step)} failed after {_attempts(self.attempts)}: the answer was {self.status}. "
            f"{_sentence(self.message)} Look at .headers and .body, or catch CallFailed to handle it in the workflow."
        )


# --- what result() raises


class RunEnded(PerdureError):
    """A run ended without a result.

    run_id: its id. info: its `RunInfo`, if known. reason: what was given with cancel or terminate.
    cause: the recorded error with `.type`, `.message`, `.traceback` and `.cause`, or None.
    """

    run_id: str
    reason: str
    info: Any
    cause: Any

    def __init__(self, run_id: str, *, info: Any = None, cause: Any = None, reason: str = "") -> None:
        self.run_id = run_id
        self.info = info
        self.cause = cause
        self.reason = reason
        super().__init__(self._text())

    def _text(self) -> str:
        raise NotImplementedError

    def _given(self) -> str:
        return f"The reason given was {quoted(self.reason)}." if self.reason else "No reason was given."


class RunFailed(RunEnded):
    """An exception left the workflow function; or the run has killed its workers: its `.info.status` is quarantined."""

    def _text(self) -> str:
        if getattr(self.info, "status", "") == "quarantined" and self.cause is not None:
            return (
                f"Run {quoted(self.run_id)} is quarantined. {self.cause.message} Mend its code, then end it with "
                f"`perdure terminate {typed(self.run_id)}` and start a new run."
            )
        why = "No error was recorded."
        if self.cause is not None:
            why = f"Its code raised {_shown(self.cause.type, self.cause.message)}"
        return (
            f"Run {quoted(self.run_id)} failed. {why} "
            f"`perdure show {typed(self.run_id)}` lists its steps and the traceback; a mended workflow needs a new run."
        )


class RunCancelled(RunEnded):
    """The run stopped because it was asked to."""

    def _text(self) -> str:
        return (
            f"Run {quoted(self.run_id)} was cancelled. {self._given()} "
            "It has no result: start a new run if you need one."
        )


class RunTerminated(RunEnded):
    """The run was ended without asking its code."""

    def _text(self) -> str:
        return (
            f"Run {quoted(self.run_id)} was terminated. {self._given()} "
            "Its code was not asked and no cleanup ran: check what its steps left behind before you start a new run."
        )


class RunTimedOut(RunEnded):
    """The run did not end before its timeout."""

    def _text(self) -> str:
        return (
            f"Run {quoted(self.run_id)} was ended by its timeout. It had not finished in the time given at its start. "
            f"Give it a longer timeout=, and see `perdure history {typed(self.run_id)}` for where the time went."
        )


# --- refusals: nothing was written


class Refused(PerdureError):
    """A call that was refused before anything was written."""


class RunNotFound(Refused):
    """No run has this id."""

    run_id: str
    namespace: str

    def __init__(self, run_id: str, *, namespace: str = "default") -> None:
        self.run_id = run_id
        self.namespace = namespace
        super().__init__(
            f"There is no run {quoted(run_id)}. Namespace {quoted(namespace)} of this store has none with that id. "
            "Check the id, the store and the namespace; `perdure list` shows what is there."
        )


class RunExists(Refused):
    """A run with this id or idempotency key exists and `if_exists="fail"` was given.

    run_id: that run. key: the idempotency key, if that is what it has.
    """

    run_id: str
    key: str | None

    def __init__(self, run_id: str, *, key: str | None = None) -> None:
        self.run_id = run_id
        self.key = key
        if key is None:
            what = (
                f"Run {quoted(run_id)} exists already. An id belongs to one run, also after its end. Choose another id"
            )
        else:
            what = f"The idempotency key {quoted(key)} was used before. It is that of run {quoted(run_id)}. Use another"
        super().__init__(f'{what}, or pass if_exists="use" to get the existing run.')


class RunFinished(Refused):
    """The run has ended and takes no more messages."""

    run_id: str
    status: str

    def __init__(self, run_id: str, *, status: str = "") -> None:
        self.run_id = run_id
        self.status = status
        how = f" as {_plain(status)}" if status else ""
        super().__init__(
            f"Run {quoted(run_id)} has ended{how}. An ended run takes no signal or update. "
            "Start a new run, or send to the one that took its place."
        )


class UnknownWorkflow(Refused):
    """No worker has ever announced this name.

    name: what was asked for. known: names that are announced.
    """

    name: str
    known: tuple[str, ...]

    def __init__(self, name: str, known: Iterable[str] = ()) -> None:
        self.name = name
        self.known = tuple(sorted(known))
        shown = ", ".join(map(quoted, self.known[:10])) + (", …" if len(self.known) > 10 else "")
        super().__init__(
            f"There is no workflow {quoted(name)}. "
            + (f"Announced are: {shown}. " if shown else "No worker has announced any workflow in this store. ")
            + "Check the name, or start a worker that serves it."
        )


class IdempotencyConflict(Refused):
    """The same run id or idempotency key was used with another workflow or another input.

    key: the id or key. run_id: the run that has it. differs: "workflow" or "input".
    """

    key: str
    run_id: str
    differs: str

    def __init__(self, key: str, *, run_id: str, differs: str = "input") -> None:
        self.key = key
        self.run_id = run_id
        self.differs = differs
        which = (
            f"The run id {quoted(key)} was used before"
            if key == run_id
            else (f"The idempotency key {quoted(key)} was used before, for run {quoted(run_id)}")
        )
        super().__init__(
            f"{which}. That start had another {differs}, so this one cannot be the same start repeated. "
            "Use a new id or key for new work, or repeat the first start exactly."
        )


class DuplicateStepId(Refused):
    """Two steps of one run ask for the same id.

    sites: the source lines of the first and the second, where known.
    """

    step: str
    sites: tuple[str, ...]

    def __init__(self, step: str, *, sites: Iterable[str] = ()) -> None:
        self.step = step
        self.sites = tuple(site for site in sites if site)
        where = f" ({', '.join(self.sites)})" if self.sites else ""
        super().__init__(
            f"The step id {quoted(step)} is used twice in this run{where}. "
            "A step's record is found by its id, so each id belongs to one step. "
            'In a loop put the index into it: f"' + step.replace("{", "").replace("}", "") + '-{n}".'
        )


class PayloadError(Refused):
    """A value has a form that cannot be stored, or a stored one does not fit its annotation.

    what: the argument or result it is about.
    """

    what: str

    def __init__(self, text: str, *, what: str = "") -> None:
        self.what = what
        super().__init__(text)


class LimitExceeded(Refused):
    """Something is larger than a limit allows.

    what: what is too large. limit: how much is allowed. actual: how much there was, where that is known.
    """

    what: str
    limit: int
    actual: int | None

    def __init__(self, text: str, *, what: str = "", limit: int = 0, actual: int | None = None) -> None:
        self.what = what
        self.limit = limit
        self.actual = actual
        super().__init__(text)


class UpdateRejected(Refused):
    """The workflow's validator refused an update."""

    run_id: str
    update: str
    reason: str

    def __init__(self, run_id: str, update: str, reason: str) -> None:
        self.run_id = run_id
        self.update = update
        self.reason = reason
        super().__init__(
            f"Update {quoted(update)} of run {quoted(run_id)} was rejected. {_sentence(reason)} "
            "Nothing was changed: mend the arguments and send it again."
        )


# --- the report in a blocked run


class NonDeterminismError(PerdureError):
    """The code asks for something else than the history holds: the report of a blocked run.

    recorded, asked: what each side says (`event 4, run activity "charge"`, `sleep 1:00:00`; empty: nothing).
    recorded_site, asked_site: their source lines. patch: the id proposed for `ctx.patched`.
    note: a further sentence, such as a change of the interpreter.
    """

    run: str
    step: str
    recorded: str
    recorded_site: str
    asked: str
    asked_site: str
    patch: str
    note: str

    def __init__(
        self,
        run: str,
        step: str,
        *,
        recorded: str = "",
        recorded_site: str = "",
        asked: str = "",
        asked_site: str = "",
        patch: str = "",
        note: str = "",
    ) -> None:
        self.run = run
        self.step = step
        self.recorded = recorded
        self.recorded_site = recorded_site
        self.asked = asked
        self.asked_site = asked_site
        self.patch = patch or f"{step or 'code'}-changed"
        self.note = note
        super().__init__(self._text())

    def _text(self) -> str:
        then, now = self.recorded or "nothing", self.asked or "nothing"
        width = max(len(then), len(now)) if max(len(then), len(now)) <= 80 else 0
        where = f" at step {quoted(self.step)}" if self.step else ""
        lines = [
            f"run {self.run} cannot be replayed{where}.",
            _side("recorded", then, self.recorded_site, width),
            _side("now asks", now, self.asked_site, width),
            "The code changed under a run that had started. The run is blocked, not failed: keep the old path for",
            f'runs that had passed this line with `if ctx.patched("{self.patch}")`, and it goes on by itself.',
        ]
        return "\n".join(lines + ([self.note] if self.note else []))


# --- stores


class StoreError(PerdureError):
    """The store could not do what was asked. The driver's error is the `__cause__`.

    retryable: whether the same call may succeed later without anybody changing anything.
    store: its URL without password.
    """

    retryable: bool = False
    store: str
    of_one_item = False  # one start or message of a batch cannot be stored, and the rest might be

    def __init__(self, text: str, *, store: str = "") -> None:
        self.store = store
        super().__init__(text)


class StoreUnavailable(StoreError):
    """The store cannot be reached."""

    retryable = True


class StoreLocked(StoreError):
    """Somebody else holds the store's lock for longer than we wait."""

    retryable = True


class StoreFull(StoreError):
    """There is no room left."""


class StoreReadOnly(StoreError):
    """The store cannot be written."""


class StoreTooNew(StoreError):
    """A later version of Perdure has changed the schema."""


class StoreCorrupt(StoreError):
    """What is stored is damaged."""


class NoTransactions(StoreError):
    """This kind of store cannot work in one transaction with a step or a caller."""

    @classmethod
    def of(cls, what: str, *, store: str) -> NoTransactions:
        """What was asked of which store."""
        return cls(
            f"{what} needs a store with transactions, and {store} has none. Effect and record could not be one commit. "
            "Use SQLite or PostgreSQL, or an ordinary step whose function is safe to repeat.",
            store=store,
        )


class RolledBack(StoreError):
    """A step's transaction was rolled back before its commit: nothing of it was kept.

    seconds: the store's limit of time, if that was why.
    """

    seconds: float | None

    def __init__(self, text: str, *, seconds: float | None = None, store: str = "") -> None:
        self.seconds = seconds
        super().__init__(text, store=store)


class NotAStore(StoreError):
    """This is no store of Perdure's, or not one that can be opened."""


# --- raised by a step's function


class NonRetryable(PerdureError):
    """Stop trying: the step has failed whatever its `Retry` says."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message)


class RetryAfter(PerdureError):
    """Try again, but not before `delay` has passed; counts as an attempt.

    delay: a timedelta or a number of seconds; kept as a timedelta.
    """

    delay: timedelta

    def __init__(self, delay: timedelta | float, message: str = "") -> None:
        from .retry import duration  # Imported here: durations raise errors of this file.

        self.delay = duration(delay, "the delay of RetryAfter")
        super().__init__(message)


# --- what stops user code on purpose


class Unwinding(BaseException):
    """Root of what stops user code on purpose. An innocent `except Exception` must not swallow it."""


class Suspended(Unwinding):
    """A sync run gives its thread back while it waits; it is rebuilt by replay."""


class Evicted(Unwinding):
    """The run has left memory, or another worker has it: this copy of the code is closed."""


NO_THREAD: Final = (RuntimeError, MemoryError)
"""What `Thread.start` raises where memory, or the number of threads, has run out."""


class NeverRests(Unwinding):
    """The workflow's code ran on without waiting for anything. What takes long belongs in a step.

    where: the line at which it was stopped, if that is known.
    """

    def __init__(self, text: str = "", *, where: str = "") -> None:
        super().__init__(text)
        self.where = where


if sys.version_info >= (3, 11):

    def timed_out(text: str) -> TimeoutError:
        """The error of a wait that took too long: a built-in `TimeoutError`, also `asyncio.TimeoutError`."""
        return TimeoutError(text)

else:

    class WaitTimedOut(TimeoutError, _AsyncioTimeoutError):
        """On Python 3.10 the two timeout errors are two classes: one object for both."""

    def timed_out(text: str) -> TimeoutError:
        """The error of a wait that took too long: a built-in `TimeoutError`, also `asyncio.TimeoutError`."""
        return WaitTimedOut(text)


# --- words


def quoted(text: str) -> str:
    """`text` between double quotes, its control characters escaped: ids come from outside."""
    return '"' + "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text) + '"'


def _plain(status: str) -> str:
    # A `str` enum prints as `Status.failed` in f-strings of some interpreters and as `failed` in others.
    return str.__str__(status)


def _attempts(count: int) -> str:
    return "1 attempt" if count == 1 else f"{count} attempts"


def _shown(type: str, message: str) -> str:
    return _sentence(f"{type}: {message}" if message else type)


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) or not text else text + "."


def _side(label: str, what: str, site: str, width: int) -> str:
    return f"  {label}: {what:<{width}}  ({site})" if site else f"  {label}: {what}"
