"""`ctx` and `ctx.step`: what a workflow's code may know, say and do, in its async and its sync face.

Both faces ask through the same `_Asking`; they differ in how they wait. In an async run (and a generator) an
operation is an `Operation`, which passes for a coroutine and begins when it is awaited; in a sync run the call
itself waits. `start` begins at once in both and gives a `Pending`.
"""

from __future__ import annotations

import gc
import random
import threading
import uuid
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from hashlib import blake2b
from threading import get_ident
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Final,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    TypedDict,
    TypeVar,
    overload,
)

import msgspec

from perdure.core.codec import plan
from perdure.core.errors import Cancelled, Evicted, NoTransactions, Unwinding, timed_out
from perdure.core.limits import Limits, check_id
from perdure.core.match import CANCELLED, DONE, Line, Op
from perdure.core.retry import Retry, duration, exception_types, instant, micros, moment, retry_given
from perdure.runtime import inside, steps
from perdure.runtime.logs import RunLog
from perdure.runtime.loop import RunLoop, StepWait
from perdure.runtime.registry import Activity, Workflow
from perdure.runtime.steps import NO_OPTIONS, Options, call_site

if TYPE_CHECKING:
    from typing_extensions import Unpack

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

RETURN_WHEN: Final = ("ALL_COMPLETED", "FIRST_COMPLETED", "FIRST_EXCEPTION")


class ThisRun(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """`ctx.run`: what a run knows of itself."""

    id: str
    generation: int
    workflow: str
    queue: str
    namespace: str
    attempt: int
    max_attempts: int | None
    parent: str | None
    root: str
    created_micros: int

    @property
    def created_at(self) -> datetime:
        """When the run was started: aware, UTC."""
        return moment(self.created_micros)


MOST_REFUSALS: Final = 100
"""So often a dead context raises; then it makes the caller wait for ever, or a loop with a bare `except` would spin."""


class Host(Protocol):
    """The driver as the context sees it: may the caller speak, and how does it wait?"""

    line: Line

    @property
    def stopped(self) -> BaseException | None:
        """What every call raises again once the body was told to stop."""

    def hold(self) -> None:
        """Sync runs: keep a thread that does not want to end for ever."""

    @property
    def inside(self) -> int:
        """The thread in which this run's body runs now, or 0."""

    def wait_for(self, ready: Callable[[], bool], ops: Sequence[Op], own: Op | None = None) -> None:
        """Sync runs: give the thread back until `ready()`."""


class _Asking:
    """What the two faces of `ctx.step` share: checks at the call, and the `Op` that the line begins."""

    __slots__ = ("_collecting", "_facts", "_options")

    def __init__(self, facts: Facts, options: Options = NO_OPTIONS) -> None:
        self._facts = facts
        self._options = options

    def _checked(self, id: str, what: str = "a step id") -> Line:
        facts = self._facts
        # As `may_speak`, which says why not.
        if facts.line.dead or facts.where.inside != get_ident() or _collecting:
            facts.may_speak(what)
        if type(id) is not str or not id.isprintable() or not 0 < len(id) <= 255:
            check_id(id, what)
        return facts.line

    def _local(self, id: str, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], depth: int = 3) -> Op:
        line = self._checked(id)
        options = self._options
        if type(fn) is Activity and (fn.queue is not None or options.queue is not None):
            op = steps.activity(id, fn, args, kwargs, options, self._facts.limits, call_site(depth), line.run_id)
        else:
            op = steps.local(id, fn, args, kwargs, options, self._facts.limits, call_site(depth))
        line.ask(op)
        return op

    def _transaction(self, id: str, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Op:
        line = self._checked(id)
        if self._facts.without_transactions:
            raise NoTransactions.of(f'ctx.step.transaction("{id}", …)', store=self._facts.without_transactions)
        op = steps.transaction(id, fn, args, kwargs, self._options, self._facts.limits, call_site(3))
        line.ask(op)
        return op

    def _child(
        self, id: str, workflow: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, awaited: bool, depth: int = 3
    ) -> Op:
        line = self._checked(id)
        op = steps.child(
            id,
            workflow,
            args,
            kwargs,
            self._options,
            self._facts.limits,
            call_site(depth),
            line.run_id,
            awaited=awaited,
            known=self._facts.known,
        )
        line.ask(op)
        return op

    def _target(self, id: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Op:
        if isinstance(target, (Workflow, str)):
            return self._child(id, target, args, kwargs, awaited=True, depth=4)
        return self._local(id, target, args, kwargs, depth=4)

    def _without_options(self, what: str) -> None:
        if self._options is not NO_OPTIONS:
            raise TypeError(
                f"{what} was called on ctx.step.options(…). It has no settings but its own arguments. Call it on "
                "ctx.step itself."
            )

    def _sleep(self, id: str, length: Any, days: float, hours: float, minutes: float, seconds: float) -> Op:
        line = self._checked(id)
        self._without_options(f'sleep("{id}")')
        given = {"days": days, "hours": hours, "minutes": minutes, "seconds": seconds}
        for name, value in given.items():
            duration(value, f'{name}= of sleep "{id}"', negative=True)
        try:
            total = timedelta(**given)
            if length is not None:
                total += duration(length, f'the duration of sleep "{id}"', negative=True)
        except OverflowError:
            raise ValueError(
                f'The duration of sleep "{id}" is more than a timedelta holds, 999999999 days. Give less.'
            ) from None
        # Year 9999 is the last a datetime can name.
        due = min(line.now + max(micros(total), 0), LATEST)
        op = Op("sleep", id, site=call_site(3), spec=steps.Length(length=due - line.now))
        line.ask(op)
        return op

    def _sleep_until(self, id: str, when: datetime) -> Op:
        line = self._checked(id)
        self._without_options(f'sleep_until("{id}")')
        due = instant(when, f'the time of sleep_until "{id}"')
        op = Op("sleep", id, site=call_site(3), spec=steps.Length(due=due))
        line.ask(op)
        return op

    def _signal(self, id: str, name: str | None, returns: Any, timeout: Any) -> Op:
        line = self._checked(id)
        self._without_options(f'wait_signal("{id}")')
        length = None if timeout is None else micros(duration(timeout, f'the timeout of wait_signal "{id}"'))
        if length is not None:
            length = min(length, LATEST - line.now)
        name = id if name is None else check_id(name, "the name of a signal")
        op = Op(
            "signal_wait",
            id,
            name=name,
            site=call_site(3),
            spec=steps.Length(length=length, returns=plan(returns, what="returns=")),
        )
        line.ask(op)
        return op

    def key(self, id: str, /) -> str:
        """The step's idempotency key: the same on every execution, different for every step and run.

        Works before and after the step; equals `current_step().key` inside it.
        """
        self._checked(id)
        return step_key(self._facts.seed, id)

    def _with(self, options: Mapping[str, Any]) -> Options:
        changes: dict[str, Any] = {}
        for name, value in options.items():
            if value is None:
                continue
            if name in ("timeout", "total_timeout"):
                value = duration(value, f"{name}=", zero=False)
            elif name == "raises":
                value = exception_types(value, "raises=")
            elif name == "retry":
                value = retry_given(value, "retry=")
            elif name == "parent_close" and value not in ("cancel", "abandon"):
                raise ValueError(f'parent_close={value!r} is not known. It is "cancel" or "abandon".')
            elif name in ("id", "queue", "idempotency_key"):
                value = check_id(value, f"{name}=")
            changes[name] = value
        return self._options.with_(**changes)


LATEST: Final = instant(datetime.fromisoformat("9999-12-31T23:59:59+00:00"), "the last time")


def step_key(seed: str, step: str) -> str:
    """The idempotency key of a step, derived from the run's seed: 32 hexadecimal characters."""
    return blake2b(step.encode(), key=bytes.fromhex(seed), digest_size=16).hexdigest()


class Facts:
    """What the contexts of one run share; made by the play, told by it when the run is over."""

    __slots__ = (
        *("host", "input_first", "known", "limits", "line", "raised", "random", "run", "seed", "uuids", "where"),
        "without_transactions",
    )

    def __init__(
        self, *, host: Host, run: ThisRun, seed: str, limits: Limits, known: Mapping[str, Workflow[Any, Any]]
    ) -> None:
        self.host = host
        # The one of the two that keeps `inside`: the loop of an async run, else the driver.
        self.where: Any = getattr(host, "loop", host)
        self.line = host.line
        self.run = run
        self.seed = seed
        self.limits = limits
        self.known = known
        self.random: random.Random | None = None
        self.uuids = 0
        self.input_first: Any = None
        self.raised = 0
        self.without_transactions = ""  # the URL of a store that has none

    def may_speak(self, what: str) -> None:
        """Refuse calls of a dead context, and of anybody but the body."""
        if self.line.dead:
            _refuse_elsewhere(self.line, what)
            self.raised += 1
            if self.raised <= MOST_REFUSALS:
                raise Evicted(f"Run {self.run.id} has left memory.")
            self.host.hold()
            return
        ident = get_ident()
        if self.host.inside != ident:
            if self.host.stopped is not None:
                self.raised += 1
                if self.raised > MOST_REFUSALS:
                    self.host.hold()
                raise self.host.stopped
            raise RuntimeError(
                f"ctx was used outside the workflow's own body (for {what}). Only the body may call it, because "
                "threads, steps and finalizers do not come again in the same order. Return a value from the step, "
                "and call ctx with it in the body."
            )
        if ident == _collecting.get("stop"):
            raise RuntimeError(
                f"ctx was used while the garbage collector ran (for {what}). A replay would not do that at the same "
                "place. Call it in the body, not in __del__."
            )


def _refuse_elsewhere(line: Line, what: str) -> None:
    """What a dead context raises ends its own run's code; that of another run is told what it did."""
    here = inside.other_body(line)
    if here:
        raise RuntimeError(
            f"The ctx of run {line.run_id}, which has ended or left memory, was used in the code of run {here} "
            f"(for {what}). A ctx belongs to one run. Use the one that the workflow function was called with."
        )


_collecting: Final[dict[str, Any]] = {}
"""In which thread the collector runs now, under `stop`, which takes it away; one at a time."""


def _collector(phase: str, info: dict[str, int]) -> None:
    if phase == "start":
        _collecting["stop"] = threading.get_ident()


# No code of Python's: the watchdog could interrupt it, and the thread would be taken for a collecting one.
gc.callbacks.append(_collecting.pop)
gc.callbacks.append(_collector)


# --- waiting, async ------------------------------------------------------------------------------------


class Operation(Coroutine[Any, Any, T]):
    """A durable operation that was asked for and waits to be awaited; passes for a coroutine."""

    __slots__ = ("_begun", "_iterator", "_loop", "_op", "number")

    def __init__(self, op: Op, loop: RunLoop) -> None:
        self._op = op
        self._loop = loop
        self._iterator: Generator[Any, Any, T] | None = None
        self._begun = False
        loop.count += 1
        self.number = loop.count

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other

    def __await__(self) -> Generator[Any, Any, T]:
        if self._begun:
            raise RuntimeError(f'The operation "{self._op.id}" was awaited twice. Keep its result instead.')
        self._begun = True
        op = self._op
        loop = self._loop
        line = loop.line
        if line.dead:
            _refuse_elsewhere(line, f'"{op.id}"')
            if loop.held:
                yield from loop.create_future()
            raise Evicted(f"Run {line.run_id} has left memory.")
        if not loop.inside:
            raise RuntimeError(f'The operation "{op.id}" was awaited outside its workflow. Await it in the body.')
        wait = StepWait(op, loop)
        line.begin(op)
        if op.state < DONE:
            op.waiters.append(wait.settle)
            yield wait
        result: T = wait.result()
        return result

    def send(self, value: Any) -> Any:
        if self._iterator is None:
            self._iterator = self.__await__()
        return self._iterator.send(value)

    def throw(self, *error: Any) -> Any:
        if self._iterator is None:
            self._begun = True
            self._loop.line.cancel(self._op)
            raise error[0] if isinstance(error[0], BaseException) else error[1] or error[0]
        return self._iterator.throw(*error)

    def close(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
        self._begun = True

    def __del__(self) -> None:
        if not self._begun and not self._loop.line.dead and not self._loop.closed:
            warnings.warn(
                f'The durable operation "{self._op.id}" ({self._op.site}) was never awaited, so it did not happen.',
                RuntimeWarning,
                stacklevel=1,
            )


class _PendingBase(Generic[R]):
    __slots__ = ("_facts", "_op")

    def __init__(self, op: Op, facts: Facts) -> None:
        self._op = op
        self._facts = facts

    @property
    def id(self) -> str:
        """The step id."""
        return self._op.id

    def done(self) -> bool:
        """Whether it has ended: with a value, an error or a cancellation."""
        return self._op.over

    def _give_up(self) -> None:
        self._facts.may_speak(f'cancelling "{self._op.id}"')
        self._facts.line.cancel(self._op)

    def __repr__(self) -> str:
        return f"<pending {self._op.kind} {self._op.id!r}>"


class Pending(_PendingBase[R]):
    """A durable operation that has begun: `await .result()`, `await .cancel()`."""

    __slots__ = ()

    if not TYPE_CHECKING:  # for a checker it is not awaitable

        def __await__(self) -> Any:
            raise TypeError(
                f'What ctx.step.start("{self.id}", …) returned was awaited itself. It has begun already. Await its '
                "outcome: `await pending.result()`, or ctx.step.wait for several."
            )

    def result(self, timeout: timedelta | float | None = None) -> Awaitable[R]:
        """Its value or its error; waiting longer than `timeout` is a `TimeoutError` and leaves it running."""
        return _waited(self._facts, [self._op], timeout, lambda ops: _outcome(ops[0]))

    def cancel(self) -> Awaitable[None]:
        """Give it up: its final outcome is then a cancellation. Twice is once."""
        return _now(self._give_up)


async def _now(act: Callable[[], None]) -> None:
    act()


def _outcome(op: Op) -> Any:
    if op.error is not None:
        raise op.error
    if op.state == CANCELLED:
        raise Cancelled(f'the step "{op.id}" was cancelled')
    return op.value


async def _waited(facts: Facts, ops: list[Op], timeout: Any, read: Callable[[list[Op]], T]) -> T:
    """Wait in an async run until all of `ops` have ended."""
    await _until(facts, lambda: all(op.over for op in ops), ops, timeout, strict=True)
    return read(ops)


async def _until(facts: Facts, ready: Callable[[], bool], ops: list[Op], timeout: Any, *, strict: bool) -> None:
    """Wait in an async run until `ready()`; a wait that ran out is a TimeoutError if `strict`."""
    facts.may_speak("waiting")
    length = None if timeout is None else duration(timeout, "timeout=").total_seconds()
    if ready():
        return
    if length == 0:
        if strict:
            raise timed_out(_too_long(ops))
        return
    loop: RunLoop = facts.host.loop  # type: ignore[attr-defined]  # the host of an async run has one
    future = loop.create_future()

    def check(op: Op) -> None:
        if not future.done() and ready():
            future.set_result(None)

    for op in ops:
        if not op.over:
            op.waiters.append(check)
    timer = None
    if length is not None:

        def ring() -> None:
            if not future.done():
                future.set_exception(timed_out(_too_long(ops)))

        timer = loop.call_later(length, ring)
    try:
        await future
    except TimeoutError:
        if strict:
            raise
    finally:
        if timer is not None:
            timer.cancel()
        for op in ops:
            if check in op.waiters:
                op.waiters.remove(check)


def _too_long(ops: Sequence[Op]) -> str:
    names = ", ".join(f'"{op.id}"' for op in ops[:3])
    return f"Waiting for {names} took longer than the timeout. It goes on; wait again, or cancel it."


def _enough(ops: Sequence[Op], return_when: str) -> Callable[[], bool]:
    if return_when not in RETURN_WHEN:
        raise ValueError(f"return_when={return_when!r} is not known. It is one of {', '.join(RETURN_WHEN)}.")
    if return_when == "FIRST_COMPLETED":
        return lambda: not ops or any(op.over for op in ops)
    if return_when == "FIRST_EXCEPTION":
        return lambda: all(op.over for op in ops) or any(op.error is not None for op in ops)
    return lambda: all(op.over for op in ops)


def _split(pending: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    handles = list(dict.fromkeys(pending))
    done = sorted((h for h in handles if h._op.over), key=lambda h: h._op.ended)
    return done, [h for h in handles if not h._op.over]


def _handles(pending: Any, facts: Facts) -> list[Any]:
    if not isinstance(pending, Iterable):
        raise TypeError(
            f"ctx.step.wait got {pending!r}. It waits for several, also where there is only one. Pass a list of what "
            "ctx.step.start returned."
        )
    handles = list(pending)
    for handle in handles:
        if not isinstance(handle, _PendingBase):
            raise TypeError(
                f"ctx.step.wait got {handle!r}. It waits for what ctx.step.start returned. Start the operation first."
            )
        if handle._facts is not facts:
            raise ValueError(
                f"ctx.step.wait got {handle!r} of run {handle._facts.run.id}. A run waits for what it has started "
                "itself. Send what another run has found with a signal, or run it as a child."
            )
    return handles


class StepOptions(TypedDict, total=False):
    """What `ctx.step.options(…)` takes. id, parent_close, idempotency_key: of children only."""

    retry: Retry | None
    timeout: timedelta | float | None
    total_timeout: timedelta | float | None
    returns: Any
    raises: tuple[type[BaseException], ...] | type[BaseException] | None
    queue: str | None
    id: str | None
    parent_close: Literal["cancel", "abandon"] | None
    idempotency_key: str | None


class Step(_Asking):
    """`ctx.step` of async and generator workflows: everything durable, id first."""

    __slots__ = ()

    def _operation(self, op: Op) -> Operation[Any]:
        return Operation(op, self._facts.where)

    def options(self, **options: Unpack[StepOptions]) -> Step:
        """The same `step` with settings in front of your own arguments; a second call adds to them.

        retry, timeout, total_timeout, returns, raises: instead of the function's own (`@activity`). queue: where an
        activity or a child is executed. Of children only, which take timeout, returns and queue besides: id (default
        `parent/step`), parent_close ("cancel" or "abandon"), idempotency_key. None leaves a setting as it is.
        Durations are timedeltas or seconds. TypeError for a setting that is not known or, at the call, not of its kind:
        sleeps and `wait_signal` take none.
        """
        _known_options(options)
        return Step(self._facts, self._with(options))

    @overload
    def run(self, id: str, fn: Activity[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Operation[R]: ...
    @overload
    def run(
        self, id: str, fn: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Operation[R]: ...
    @overload
    def run(self, id: str, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Operation[R]: ...
    def run(self, id: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Operation[Any]:
        """Run `fn(*args, **kwargs)` here; once its outcome is recorded it never runs again.

        fn: async or plain (in a thread), a lambda, a method, an activity (with a queue it is dispatched). It is tried
        by its own `Retry`, default `Retry()`; then StepFailed, which is also the exception that `fn` raised where that
        is a built-in or named in `raises=`; StepTimedOut if it ran out of time. The id is this run's alone:
        DuplicateStepId.
        """
        return Operation(self._local(id, fn, args, kwargs), self._facts.where)

    @overload
    def transaction(
        self, id: str, fn: Activity[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Operation[R]: ...
    @overload
    def transaction(
        self, id: str, fn: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Operation[R]: ...
    def transaction(self, id: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Operation[Any]:
        """Run `fn(connection, *args, **kwargs)` in a thread, its effect and its record in one commit.

        connection: open on the store's own database, in a transaction that Perdure commits when `fn` returns, or
        rolls back when it raises. `fn` is plain, quick (5 seconds on SQLite, where it is the only writer) and does
        nothing elsewhere: it runs again if its transaction was rolled back. Retries and errors as of `run`;
        NoTransactions where the store has none.
        """
        return self._operation(self._transaction(id, fn, args, kwargs))

    def sleep(
        self,
        id: str,
        duration: timedelta | float | None = None,
        /,
        *,
        days: float = 0,
        hours: float = 0,
        minutes: float = 0,
        seconds: float = 0,
    ) -> Operation[None]:
        """Go on after this long, whatever happens to the process; zero and the past go on at once.

        duration: a timedelta or seconds; what is given by name is added. DuplicateStepId as of `run`.
        """
        return self._operation(self._sleep(id, duration, days, hours, minutes, seconds))

    def sleep_until(self, id: str, when: datetime, /) -> Operation[None]:
        """Go on at this time (aware, to the year 9999); the past goes on at once."""
        return self._operation(self._sleep_until(id, when))

    @overload
    def wait_signal(
        self, id: str, /, *, name: str | None = None, returns: type[T], timeout: timedelta | float | None = None
    ) -> Operation[T]: ...
    @overload
    def wait_signal(
        self, id: str, /, *, name: str | None = None, returns: Any = Any, timeout: timedelta | float | None = None
    ) -> Operation[Any]: ...
    def wait_signal(
        self, id: str, /, *, name: str | None = None, returns: Any = Any, timeout: timedelta | float | None = None
    ) -> Operation[Any]:
        """The next signal of this name (default: the id), also one that came before; `TimeoutError` if too late.

        What it was sent with: None without an argument, a list of several. returns: the type of that; one that does not
        fit is skipped, with a warning in the log. timeout: a timedelta or seconds; default without end.
        """
        return self._operation(self._signal(id, name, returns, timeout))

    @overload
    def run_workflow(self, id: str, workflow: Workflow[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Operation[R]: ...
    @overload
    def run_workflow(self, id: str, workflow: str, /, *args: Any, **kwargs: Any) -> Operation[Any]: ...
    def run_workflow(self, id: str, workflow: Any, /, *args: Any, **kwargs: Any) -> Operation[Any]:
        """Start a child run and wait for its result; `ChildFailed` if it ends otherwise.

        workflow: the object, or a name that workers serve. The child's id is `parent/step`. parent_close: default
        "cancel", so that it is asked to cancel when this run ends first.
        """
        return self._operation(self._child(id, workflow, args, kwargs, awaited=True))

    @overload
    def emit_workflow(
        self, id: str, workflow: Workflow[P, Any], /, *args: P.args, **kwargs: P.kwargs
    ) -> Operation[str]: ...
    @overload
    def emit_workflow(self, id: str, workflow: str, /, *args: Any, **kwargs: Any) -> Operation[str]: ...
    def emit_workflow(self, id: str, workflow: Any, /, *args: Any, **kwargs: Any) -> Operation[str]:
        """Start a child run and go on: its run id. As `run_workflow`, but parent_close is "abandon": it lives on.

        Where another run has that id or key already, none is started, and the log says so.
        """
        return self._operation(self._child(id, workflow, args, kwargs, awaited=False))

    @overload
    def start(
        self, id: str, target: Activity[P, R] | Workflow[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> Pending[R]: ...
    @overload
    def start(self, id: str, target: str, /, *args: Any, **kwargs: Any) -> Pending[Any]: ...
    @overload
    def start(
        self, id: str, target: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Pending[R]: ...
    @overload
    def start(self, id: str, target: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Pending[R]: ...
    def start(self, id: str, target: Any, /, *args: Any, **kwargs: Any) -> Pending[Any]:
        """Begin a step, activity or child now and wait later. A child's parent_close is "cancel".

        Errors come with `result()` of what is returned.
        """
        op = self._target(id, target, args, kwargs)
        self._facts.line.begin(op)
        return Pending(op, self._facts)

    async def wait(
        self,
        pending: Iterable[Pending[Any]],
        /,
        *,
        timeout: timedelta | float | None = None,
        return_when: str = "ALL_COMPLETED",
    ) -> tuple[list[Pending[Any]], list[Pending[Any]]]:
        """`(done, not_done)` as in `concurrent.futures.wait`, but lists, in the order in which they ended.

        return_when: "ALL_COMPLETED", "FIRST_COMPLETED" or "FIRST_EXCEPTION". timeout: a timedelta or seconds, default
        without end; waiting longer is no error, what has not ended is in `not_done`.
        """
        handles = _handles(pending, self._facts)
        ops = [handle._op for handle in handles]
        await _until(self._facts, _enough(ops, return_when), ops, timeout, strict=False)
        return _split(handles)


class SyncPending(_PendingBase[R]):
    """A durable operation that has begun, in a sync run: `.result()`, `.cancel()`."""

    __slots__ = ()

    def result(self, timeout: timedelta | float | None = None) -> R:
        """Its value or its error; waiting longer than `timeout` is a `TimeoutError` and leaves it running."""
        _block(self._facts, lambda: self._op.over, [self._op], timeout, strict=True)
        value: R = _outcome(self._op)
        return value

    def cancel(self) -> None:
        """Give it up: its final outcome is then a cancellation. Twice is once."""
        self._give_up()


class _Alarm:
    """The timeout of a sync wait: a timer of the line that only marks itself."""

    __slots__ = ("gone", "rang")

    def __init__(self) -> None:
        self.rang = self.gone = False

    def fire(self) -> None:
        self.rang = True

    def cancelled(self) -> bool:
        return self.gone


def _block(facts: Facts, ready: Callable[[], bool], ops: Sequence[Op], timeout: Any, *, strict: bool) -> None:
    facts.may_speak("waiting")
    inside.refuse("waiting for a step")
    if ready():
        return
    if timeout is None:
        facts.host.wait_for(ready, ops)
        return
    length = micros(duration(timeout, "timeout="))
    alarm = _Alarm()
    if length > 0:
        facts.line.add_timer(facts.line.now + length, alarm)
        try:
            facts.host.wait_for(lambda: alarm.rang or ready(), ops)
        except Unwinding:
            # Only the thread goes: the deadline of the wait stays.
            raise
        except BaseException:
            alarm.gone = True
            raise
        alarm.gone = True
    if strict and not ready():
        raise timed_out(_too_long(ops))


class SyncStep(_Asking):
    """`ctx.step` of sync workflows: the same names, each call waits."""

    __slots__ = ()

    def _finish(self, op: Op) -> Any:
        inside.refuse(f'ctx.step ("{op.id}")')
        line = self._facts.line
        line.begin(op)
        if not op.over:
            try:
                self._facts.host.wait_for(lambda: op.over, (op,), own=op)
            except Cancelled:
                line.cancel(op)
                raise
        return _outcome(op)

    def options(self, **options: Unpack[StepOptions]) -> SyncStep:
        """As `Step.options`."""
        _known_options(options)
        return SyncStep(self._facts, self._with(options))

    @overload
    def run(self, id: str, fn: Activity[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def run(self, id: str, fn: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def run(self, id: str, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    def run(self, id: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As `Step.run`."""
        return self._finish(self._local(id, fn, args, kwargs))

    @overload
    def transaction(self, id: str, fn: Activity[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def transaction(self, id: str, fn: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    def transaction(self, id: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As `Step.transaction`."""
        return self._finish(self._transaction(id, fn, args, kwargs))

    def sleep(
        self,
        id: str,
        duration: timedelta | float | None = None,
        /,
        *,
        days: float = 0,
        hours: float = 0,
        minutes: float = 0,
        seconds: float = 0,
    ) -> None:
        """As `Step.sleep`."""
        self._finish(self._sleep(id, duration, days, hours, minutes, seconds))

    def sleep_until(self, id: str, when: datetime, /) -> None:
        """As `Step.sleep_until`."""
        self._finish(self._sleep_until(id, when))

    @overload
    def wait_signal(
        self, id: str, /, *, name: str | None = None, returns: type[T], timeout: timedelta | float | None = None
    ) -> T: ...
    @overload
    def wait_signal(
        self, id: str, /, *, name: str | None = None, returns: Any = Any, timeout: timedelta | float | None = None
    ) -> Any: ...
    def wait_signal(
        self, id: str, /, *, name: str | None = None, returns: Any = Any, timeout: timedelta | float | None = None
    ) -> Any:
        """As `Step.wait_signal`."""
        return self._finish(self._signal(id, name, returns, timeout))

    @overload
    def run_workflow(self, id: str, workflow: Workflow[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def run_workflow(self, id: str, workflow: str, /, *args: Any, **kwargs: Any) -> Any: ...
    def run_workflow(self, id: str, workflow: Any, /, *args: Any, **kwargs: Any) -> Any:
        """As `Step.run_workflow`."""
        return self._finish(self._child(id, workflow, args, kwargs, awaited=True))

    @overload
    def emit_workflow(self, id: str, workflow: Workflow[P, Any], /, *args: P.args, **kwargs: P.kwargs) -> str: ...
    @overload
    def emit_workflow(self, id: str, workflow: str, /, *args: Any, **kwargs: Any) -> str: ...
    def emit_workflow(self, id: str, workflow: Any, /, *args: Any, **kwargs: Any) -> str:
        """As `Step.emit_workflow`."""
        return str(self._finish(self._child(id, workflow, args, kwargs, awaited=False)))

    @overload
    def start(
        self, id: str, target: Activity[P, R] | Workflow[P, R], /, *args: P.args, **kwargs: P.kwargs
    ) -> SyncPending[R]: ...
    @overload
    def start(self, id: str, target: str, /, *args: Any, **kwargs: Any) -> SyncPending[Any]: ...
    @overload
    def start(
        self, id: str, target: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> SyncPending[R]: ...
    @overload
    def start(self, id: str, target: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> SyncPending[R]: ...
    def start(self, id: str, target: Any, /, *args: Any, **kwargs: Any) -> SyncPending[Any]:
        """As `Step.start`."""
        op = self._target(id, target, args, kwargs)
        self._facts.line.begin(op)
        return SyncPending(op, self._facts)

    def wait(
        self,
        pending: Iterable[SyncPending[Any]],
        /,
        *,
        timeout: timedelta | float | None = None,
        return_when: str = "ALL_COMPLETED",
    ) -> tuple[list[SyncPending[Any]], list[SyncPending[Any]]]:
        """As `Step.wait`."""
        handles = _handles(pending, self._facts)
        ops = [handle._op for handle in handles]
        _block(self._facts, _enough(ops, return_when), ops, timeout, strict=False)
        return _split(handles)


OPTIONS: Final = frozenset(StepOptions.__annotations__)


def _known_options(options: Mapping[str, Any]) -> None:
    unknown = sorted(set(options) - OPTIONS)
    if unknown:
        raise TypeError(
            f"ctx.step.options() does not know {', '.join(unknown)}. It takes {', '.join(sorted(OPTIONS))}. "
            "Arguments of your own function go behind it, into run or start."
        )


# --- ctx -----------------------------------------------------------------------------------------------


class _ContextBase:
    __slots__ = ("_facts", "step")

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    @property
    def log(self) -> RunLog:
        """A logger that is silent during replay and names the run."""
        return RunLog(self._facts.line)

    @property
    def run(self) -> ThisRun:
        """What the run knows of itself."""
        return self._facts.run

    @property
    def input(self) -> Any:
        """The first argument; all a workflow with no parameter but `ctx` needs."""
        return self._facts.input_first

    def now(self) -> datetime:
        """The time of the input being delivered, aware, UTC: the same on every replay."""
        self._facts.may_speak("ctx.now")
        return moment(self._facts.line.now)

    @property
    def random(self) -> random.Random:
        """A generator seeded from the run: the same numbers on every replay."""
        self._facts.may_speak("ctx.random")
        if self._facts.random is None:
            self._facts.random = random.Random(self._facts.seed)
        return self._facts.random

    def uuid4(self) -> uuid.UUID:
        """A version 4 UUID derived from the run: the same on every replay, different in every run."""
        self._facts.may_speak("ctx.uuid4")
        self._facts.uuids += 1
        digest = blake2b(
            f"uuid:{self._facts.uuids}".encode(), key=bytes.fromhex(self._facts.seed), digest_size=16
        ).digest()
        return uuid.UUID(bytes=digest, version=4)

    @property
    def cancelled(self) -> bool:
        """Whether cancellation was asked for."""
        return self._facts.line.cancel_requested

    @property
    def cancel_reason(self) -> str:
        """The reason given with it, or an empty text."""
        return self._facts.line.cancel_reason

    def patched(self, change: str, /) -> bool:
        """True for runs that had not passed this line when the change came; one answer for the whole run."""
        self._facts.may_speak("ctx.patched")
        check_id(change, "the name of a change")
        return self._facts.line.patched(change, call_site(2))


class Context(_ContextBase):
    """What an `async def` or generator workflow gets as its first argument."""

    __slots__ = ()

    step: Step

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.step = Step(facts)


class SyncContext(_ContextBase):
    """What a `def` workflow gets as its first argument; `perdure.sync.Context`."""

    __slots__ = ()

    step: SyncStep

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self.step = SyncStep(facts)
