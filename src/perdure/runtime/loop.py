"""The deterministic event loop of one async run: its time and order come from the history.

A small `AbstractEventLoop` that can only do what replay can repeat: callbacks in the order in which they were
made, timers that are the line's, tasks and futures whose hash is a number counted per run, so that a set of
them has the same order on every replay. Whatever would reach outside (sockets, threads, executors,
subprocesses) raises at its line. It nests inside a running loop: `enter` leaves the outer task and loop, and
restores them.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import sys
import threading
from asyncio import events as asyncio_events
from asyncio import tasks as asyncio_tasks
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Final, NoReturn

from perdure.core.errors import NeverRests
from perdure.core.match import CANCELLED, DONE, Line, Op
from perdure.core.retry import LONGEST

log = logging.getLogger("perdure.runtime")

MOST_CALLBACKS: Final = 100_000
"""Callbacks in one activation that count as code that does not rest."""

_get_running_loop = asyncio_events._get_running_loop
_set_running_loop = asyncio_events._set_running_loop
_enter_task = asyncio_tasks._enter_task
_leave_task = asyncio_tasks._leave_task
_unregister_task = asyncio_tasks._unregister_task
_ENSURE_FUTURE: Final = ("ensure_future", "_ensure_future")
"""The function through which asyncio makes tasks of bare coroutines: the second on Python 3.10 and 3.11."""


class RunFuture(asyncio.Future[Any]):
    """A future with a place in the order of its run."""

    __slots__ = ("number",)

    def __init__(self, *, loop: RunLoop) -> None:
        super().__init__(loop=loop)
        loop.count += 1
        self.number = loop.count

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other


class StepWait:
    """What a task awaits in `run`: future enough for asyncio's Task, and the handle that wakes it, in one object.

    Cancelling it gives the step up.
    """

    __slots__ = ("_asyncio_future_blocking", "_callback", "_context", "given_up", "loop", "op")

    _cancelled = False

    def __init__(self, op: Op, loop: RunLoop) -> None:
        self.op = op
        self.loop = loop
        self.given_up: tuple[Any, ...] | None = None
        self._asyncio_future_blocking = True  # how a task knows that it is awaited, not just yielded
        self._callback: Any = None

    def get_loop(self) -> RunLoop:
        """The loop of its run."""
        return self.loop

    def add_done_callback(self, callback: Any, *, context: contextvars.Context) -> None:
        """Wake a task when the step has ended. A task asks once, right after it was given this."""
        self._callback = callback
        self._context = context
        if self.given_up is not None:
            self.loop.ready.append(self)

    def settle(self, op: Op) -> None:
        """The step has ended: so does the wait for it."""
        if self._callback is not None and self.given_up is None:
            self.loop.ready.append(self)

    def cancel(self, msg: Any = None) -> bool:
        """Give the step up; False if it has ended."""
        op = self.op
        if self.given_up is not None or op.state >= DONE:
            return False
        self.loop.line.cancel(op)
        self.given_up = () if msg is None else (msg,)
        if op.state < DONE and self._callback is not None:
            # The line is dead: only the task that waits hears of it.
            self.loop.ready.append(self)
        return True

    def result(self) -> Any:
        """The step's value; its error is raised."""
        op = self.op
        if op.error is not None:
            raise op.error
        if op.state == CANCELLED or self.given_up is not None:
            raise asyncio.CancelledError(*(self.given_up or ()))
        return op.value


class RunTask(asyncio.Task[Any]):
    """A task with a place in the order of its run; not among `asyncio.all_tasks()`."""

    __slots__ = ("number",)

    def __init__(self, coro: Coroutine[Any, Any, Any], *, loop: RunLoop, **named: Any) -> None:
        # Before the C constructor, which already hashes the task into a weak set.
        loop.count += 1
        self.number = loop.count
        super().__init__(coro, loop=loop, **named)
        # All first tasks of all runs have the same hash: in one global set they would be a long chain.
        _unregister_task(self)
        self._log_destroy_pending = False
        loop.keep(self)

    def __hash__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self is other


_NOT_THEIRS: Final = (f"{Path(__file__).parents[1]}{os.sep}", f"{Path(asyncio.__file__).parent}{os.sep}", "<frozen")


def is_theirs(file: str) -> bool:
    """Whether a source file is neither ours nor asyncio's."""
    return not file.startswith(_NOT_THEIRS)


def line_of(task: Any) -> str:
    """Where the code of a task waits; "" if it is none."""
    waits: Any = task.get_coro() if isinstance(task, asyncio.Task) else None
    where = ""
    while (frame := getattr(waits, "cr_frame", None) or getattr(waits, "gi_frame", None)) is not None:
        code = frame.f_code
        if is_theirs(code.co_filename):
            where = f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
        waits = getattr(waits, "cr_await", None) or getattr(waits, "gi_yieldfrom", None)
    return where


class _Timer(asyncio.TimerHandle):
    """A timer of `call_at`, kept in the line with those of sleeps and waits."""

    __slots__ = ()

    def fire(self) -> None:
        self._loop.ready.append(self)  # type: ignore[attr-defined]  # its loop is a RunLoop


class RunLoop(asyncio.AbstractEventLoop):
    """See the module. `inside` is the thread in which the run's code is active, or 0."""

    def __init__(self, line: Line, started_at: int) -> None:
        self.line = line
        self.started_at = started_at
        self.ready: deque[asyncio.Handle | StepWait] = deque()
        self.tasks: dict[RunTask, None] = {}
        self.prune_at = 64
        self.count = 0
        self.inside = 0
        self._outside: tuple[Any, Any, Any] | None = None
        self.closed = False
        self.held = False
        self._generators: list[Any] | None = None

    # --- one function enters a run ---

    def enter(self) -> None:
        """Make this loop the running one of this thread, whatever ran before; `leave` restores it.

        A pair of calls, not a context manager: it happens at every input.
        """
        outer = _get_running_loop()
        task = asyncio_tasks.current_task(outer) if outer is not None else None
        if task is not None:
            _leave_task(outer, task)  # type: ignore[arg-type]  # no task without a loop
        hooks = sys.get_asyncgen_hooks()
        _set_running_loop(self)
        sys.set_asyncgen_hooks(None, self._generator_dropped)
        self._outside = outer, task, hooks
        self.inside = threading.get_ident()

    def leave(self) -> None:
        """Restore what `enter` found. Twice is once, and what an interruption cut short is done by the next call."""
        self.inside = 0
        if self._outside is None:
            return
        outer, task, hooks = self._outside
        sys.set_asyncgen_hooks(*hooks)
        _set_running_loop(outer)
        if task is not None and asyncio_tasks.current_task(outer) is None:
            _enter_task(outer, task)
        self._outside = None

    def run_to_rest(self, main: RunTask | None) -> None:
        """Run what is ready, and what that makes ready, until nothing is; stop the moment `main` is done."""
        self.enter()
        # The interruption of code that does not rest, like Ctrl-C, may come at any instruction of the thread; from
        # Python 3.12 on no `finally` is reached from the jump of a loop in the same function.
        try:
            self._run_ready(main)
        finally:
            self.leave()

    def _run_ready(self, main: RunTask | None) -> None:
        ready = self.ready
        left = MOST_CALLBACKS
        while ready:
            handle: Any = ready.popleft()
            if handle._cancelled:
                continue
            try:
                if type(handle) is StepWait:
                    handle._context.run(handle._callback, handle)
                else:
                    handle._context.run(handle._callback, *handle._args)
            except (KeyboardInterrupt, SystemExit):
                # The task has kept it as its outcome; a real interrupt of the process comes again.
                pass
            except Exception as error:
                self.call_exception_handler({"message": "a callback failed", "exception": error})
            if main is not None and main.done():
                return
            left -= 1
            if left == 0:
                raise NeverRests(
                    f"{MOST_CALLBACKS} callbacks without rest",
                    where=line_of(getattr(handle._callback, "__self__", None)),
                )

    def keep(self, task: RunTask) -> None:
        """Hold a task until it is done, so that the collector never closes one behind the code's back."""
        self.tasks[task] = None
        if len(self.tasks) >= self.prune_at:
            self.tasks = {kept: None for kept in self.tasks if not kept.done()}
            self.prune_at = max(64, 2 * len(self.tasks))

    def tell_unretrieved(self) -> None:
        """Log the exceptions that nobody asked for, once, at the end of the run."""
        for task in self.tasks:
            # asyncio's own mark, which its logging at the collection of a task goes by.
            if task.done() and getattr(task, "_log_traceback", False):
                tell_unheard(self.line.run_id, "an exception in a task was never retrieved", task.exception())

    def close_all(self) -> list[Any]:
        """Close every coroutine, newest task first; what survives ten tries is returned."""
        self.closed = True
        left = [task for task in self.tasks if not task.done()]
        self.tasks.clear()
        survivors: list[Any] = []
        if left:
            self.enter()
            try:
                survivors = _not_closed(left)
            finally:
                self.leave()
        self.ready.clear()
        return survivors

    def _generator_dropped(self, generator: Any) -> None:
        # Never scheduled: the collector would run a `finally` in life that replay does not.
        if self._generators is None:
            self._generators = []
        self._generators.append(generator)

    # --- what asyncio asks of a loop ---

    def time(self) -> float:
        return (self.line.now - self.started_at) / 1_000_000

    def call_soon(  # type: ignore[override]  # the types of the arguments are the callback's business
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self.ready.append(handle)
        return handle

    def call_later(  # type: ignore[override]  # as above
        self, delay: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]  # as above
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        micros = min(when * 1_000_000, LONGEST)
        # Rounded up: a timer never fires early. A nanosecond of slack keeps what was a whole number one.
        due = self.started_at + -int(-(micros - 0.001) // 1)
        timer = _Timer(when, callback, args, self, context)
        timer._scheduled = True  # type: ignore[attr-defined]  # as asyncio's own loops do
        self.line.add_timer(due, timer)
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """The line drops cancelled timers by itself."""

    def create_future(self) -> RunFuture:
        return RunFuture(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None, **extra: Any) -> RunTask:
        if self.line.dead:
            coro.close()
            raise RuntimeError("This run has left memory: its code can begin nothing more.")
        frame = sys._getframe(1)
        if frame.f_code.co_name in _ENSURE_FUTURE and frame.f_globals.get("__name__") == "asyncio.tasks":
            self._refuse_as_completed(frame, coro)
        if name is not None:
            extra["name"] = name
        else:
            extra["name"] = f"task-{self.count + 1}"
        if context is not None:
            extra["context"] = context
        return RunTask(coro, loop=self, **extra)

    def _refuse_as_completed(self, frame: Any, coro: Any) -> None:
        """`as_completed` puts bare coroutines into a set, whose order is by address."""
        caller = frame.f_back
        for _ in range(4):
            if caller is None or caller.f_globals.get("__name__") != "asyncio.tasks":
                return
            where = getattr(caller.f_code, "co_qualname", caller.f_code.co_name)
            if where.startswith(("as_completed", "_AsCompletedIterator")):
                coro.close()
                raise TypeError(
                    "asyncio.as_completed over bare coroutines has no replayable order, because it puts them into a "
                    "set by address. Pass tasks: asyncio.as_completed([asyncio.create_task(c) for c in coros])."
                )
            caller = caller.f_back

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        """There is no debug mode: it would change the order."""

    def is_running(self) -> bool:
        return bool(self.inside)

    def is_closed(self) -> bool:
        return self.closed

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep what nobody caught, in life only: it is logged once, when the turn in which it happened is recorded."""
        if self.line.replaying or self.line.dead or self.closed:
            return
        told = (context.get("message", "unhandled error"), context.get("exception"))
        self.line.unheard = (*self.line.unheard, told)

    default_exception_handler = call_exception_handler

    def get_exception_handler(self) -> None:
        return None

    def get_task_factory(self) -> None:
        return None

    async def shutdown_asyncgens(self) -> None:
        """Nothing to do: generators are kept until the run ends."""


def tell_unheard(run_id: str, message: str, error: BaseException | None) -> None:
    """Log an error of a run's code that nobody caught."""
    log.error("run %s: %s", run_id, message, exc_info=error)


def arrives() -> None:
    """The interpreter raises what another thread has set for this one when a function begins, and no later."""


def _not_closed(tasks: list[RunTask]) -> list[RunTask]:
    return [task for task in reversed(tasks) if not _closed(task)]


def _closed(task: RunTask) -> bool:
    """Close a task's coroutine, which may refuse; False if it survives ten tries."""
    coroutine: Any = task.get_coro()
    for _ in range(10):
        try:
            coroutine.close()
            return True
        except BaseException:
            # Whatever dying code raises has no one left to tell.
            continue
    return False


def _refusing(name: str) -> Callable[..., NoReturn]:
    def refuse(self: RunLoop, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(
            f"loop.{name}() was called in a workflow body. A workflow's own code cannot reach outside, because a "
            "replay would do it again. Put it in a step: await ctx.step.run(id, function)."
        )

    refuse.__name__ = name
    return refuse


_OUTSIDE: Final = (
    "run_in_executor call_soon_threadsafe set_default_executor getaddrinfo getnameinfo create_connection create_server "
    "create_unix_connection create_unix_server start_tls sendfile connect_accepted_socket create_datagram_endpoint "
    "connect_read_pipe connect_write_pipe subprocess_shell subprocess_exec add_reader remove_reader add_writer "
    "remove_writer sock_recv sock_recv_into sock_recvfrom sock_recvfrom_into sock_sendall sock_sendto sock_connect "
    "sock_accept sock_sendfile add_signal_handler remove_signal_handler run_forever run_until_complete stop close "
    "set_task_factory set_exception_handler shutdown_default_executor"
).split()

for _name in _OUTSIDE:
    setattr(RunLoop, _name, _refusing(_name))
RunLoop.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]  # every class of an ABC has it
