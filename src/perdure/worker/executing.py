"""Executes the functions of steps and activities: on the ordinary loop, or in threads.

An `Execution` is one attempt in flight. Its end is reported once, to `done(execution, value, error)`, on the
loop's thread; an abandoned one (cancelled, out of time) reports nothing more, whatever its function does.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Generator
from types import CoroutineType
from typing import Any, Final

from perdure.core import failure
from perdure.core.errors import NO_THREAD, NeverRests
from perdure.core.retry import length
from perdure.runtime.context import step_key
from perdure.runtime.drive_sync import BodyThreads
from perdure.runtime.logs import StepLog
from perdure.runtime.steps import LocalCall

log = logging.getLogger("perdure.worker")


class StepInfo:
    """`current_step()`: what a step's function may know of itself.

    run_id, workflow: of the run. id: the step's. attempt: this one; the first is 1. cancelled: nobody wants the outcome
    any more; a function in a thread, which cannot be interrupted, may look and stop.
    """

    __slots__ = ("_seed", "attempt", "cancelled", "id", "run_id", "workflow")

    def __init__(self, run_id: str, workflow: str, id: str, attempt: int, seed: str) -> None:
        self.run_id = run_id
        self.workflow = workflow
        self.id = id
        self.attempt = attempt
        self.cancelled = False
        self._seed = seed

    @property
    def key(self) -> str:
        """The step's idempotency key: the same on every execution, different for every step and run."""
        return step_key(self._seed, self.id)

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger that names the run and the step."""
        return StepLog(self.run_id, self.id)


_current: contextvars.ContextVar[StepInfo] = contextvars.ContextVar("perdure_step")


def current_step() -> StepInfo:
    """What the step whose function is running knows of itself; RuntimeError outside of one."""
    info = _current.get(None)
    if info is None:
        raise RuntimeError(
            "current_step() was called outside of a step. There is no step whose function is running here. "
            "Call it in the function given to ctx.step.run."
        )
    return info


ASK_AGAIN: Final = 0.1
"""Seconds after which the system is asked again for what it could not give: a thread, a little memory."""

OURS: Final = (Exception, NeverRests)
"""What goes wrong in our own code at one run: also an interruption of its code that came a moment late."""

Done = Callable[["Execution", Any, "BaseException | None"], None]

_entering: Final = threading.Lock()
"""Between a thread that calls a function and the loop that wants it never to be called."""


class Execution:
    """One attempt in flight."""

    __slots__ = ("abandoned", "attempt", "began", "call", "counted", "done", "entered", "info", "leave", "limit",
                 "step", "task", "timer")  # fmt: skip

    def __init__(self, step: str, attempt: int, call: LocalCall, info: StepInfo, done: Done) -> None:
        self.step = step
        self.attempt = attempt
        self.call = call
        self.info = info
        self.done = done
        self.abandoned = False
        self.task: asyncio.Task[Any] | None = None
        self.limit: Callable[[], Any] | None = None  # begins to count its time, as `timer`
        self.timer: Any = None
        self.began = 0
        self.counted = False
        self.entered = False  # its function was called, or never will be
        self.leave: Callable[[], None] | None = None  # gives the thread of its function up

    @property
    def of(self) -> Any:
        """The one whose method is told of its end."""
        return getattr(self.done, "__self__", None)

    @property
    def too_long(self) -> str:
        """What is recorded of it when its timeout has passed."""
        timeout = self.call.policy.timeout
        assert timeout is not None
        return f"Attempt {self.attempt} took longer than its timeout of {length(timeout)}."

    def begins(self) -> None:
        """Its function is called in a moment: its time counts from now, not from when it began to wait for a thread."""
        if self.limit is not None:
            self.timer = self.limit()

    def enter(self) -> bool:
        """Asked by a thread that is about to call the function: whether it shall."""
        with _entering:
            self.entered = True
            return not self.abandoned

    def withdraw(self) -> bool:
        """Keep the function from being called; False if it is too late for that."""
        with _entering:
            if not self.entered:
                self.abandoned = True
        return not self.entered

    def abandon(self) -> None:
        """Nobody wants its outcome any more: cancel an async function, leave a thread to itself."""
        self.abandoned = True
        self.info.cancelled = True
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.task is not None:
            self.task.cancel()
        if self.leave is not None:
            self.leave()


class Executor:
    """Runs functions for a worker: async ones in tasks of its loop, sync ones in its threads.

    A task takes one async function after another, as long as each ends without having to wait; one that waits
    keeps its task, and another task goes on with the rest. So a step that does not wait costs no task of its own.

    failed: called with the one whose method could not take an outcome, and why. may_begin: asked again for what has
    waited for a thread.
    """

    def __init__(
        self,
        loop: Any,
        threads: BodyThreads,
        failed: Callable[[Any, BaseException], None],
        *,
        may_begin: Callable[[], bool] = lambda: True,
    ) -> None:
        self.loop = loop
        self.threads = threads
        self._failed = failed
        self._may_begin = may_begin
        self._jobs: deque[Execution] = deque()
        self._runner_due = False
        self._ended: deque[tuple[Execution, Any, BaseException | None]] = deque()
        self._tell_due = False
        self._tasks: set[Any] = set()
        self._waiting: deque[tuple[Callable[[], None], Execution]] = deque()
        self._threadless = False
        self.in_threads = 0

    def begin(self, execution: Execution) -> None:
        """Run the execution's function where it belongs."""
        if execution.call.policy.on_loop:
            if execution.limit is not None:
                execution.begins()
            self._jobs.append(execution)
            if not self._runner_due:
                self._more_runners()
        else:
            self.in_thread(self.job(execution), execution)

    def forget(self) -> None:
        """What has not begun never will."""
        self._jobs.clear()

    def _more_runners(self) -> None:
        self._runner_due = True
        self.loop.create_task(self._run_jobs())

    async def _run_jobs(self) -> None:
        """What one task does: functions, until there is none, or it was cancelled by a stranger."""
        self._runner_due = False
        jobs = self._jobs
        while jobs:
            execution = jobs.popleft()
            if execution.abandoned:
                continue
            execution.entered = True
            try:
                context = execution.call.context.copy()
                coroutine, wanted = context.run(_begun, execution)
            except StopIteration as stop:
                self._end(execution, stop.value, None)
            except BaseException as error:
                # `sys.exit()` is the step's failure, not the end of the worker, as asyncio would have it.
                self._end(execution, None, error)
                if isinstance(error, KeyboardInterrupt):
                    # Perhaps of the process: that is not ours to keep.
                    if jobs and not self._runner_due:
                        self._more_runners()
                    raise
            else:
                await self._rest(execution, _resting(coroutine, wanted, context))

    async def _rest(self, execution: Execution, resting: Any) -> None:
        """The rest of a function that has to wait."""
        task: Any = asyncio.current_task(self.loop)
        execution.task = task
        self._tasks.add(task)
        if self._jobs and not self._runner_due:
            self._more_runners()
        value: Any = None
        error: BaseException | None = None
        try:
            value = await resting
        except GeneratorExit:
            raise  # nobody is left to be told: the loop is gone
        except BaseException as caught:
            error = caught
        finally:
            execution.task = None
            self._tasks.discard(task)
        self._end(execution, value, error)
        if isinstance(error, KeyboardInterrupt) or (
            isinstance(error, asyncio.CancelledError) and not execution.abandoned
        ):
            # Not by us: whoever cancels every task of the loop means this one too.
            raise error
        if hasattr(task, "uncancel"):
            while task.cancelling():
                task.uncancel()

    def _end(self, execution: Execution, value: Any, error: BaseException | None) -> None:
        """Have an end reported, together with those that come with it, outside of any task."""
        if isinstance(error, asyncio.CancelledError):
            # Not by us, or nobody wants it: a step that is cancelled from inside has failed.
            error = asyncio.CancelledError("the step's task was cancelled")
        self._ended.append((execution, value, error))
        if not self._tell_due:
            self._tell_due = True
            self.loop.call_soon(self._tell)

    def _tell(self) -> None:
        self._tell_due = False
        ended = self._ended
        try:
            while ended:
                self.report(*ended.popleft())
        finally:
            if ended and not self._tell_due:
                self._tell_due = True
                self.loop.call_soon(self._tell)

    def report(self, execution: Execution, value: Any, error: BaseException | None) -> None:
        """A function has ended, on the loop's thread."""
        if execution.timer is not None:
            execution.timer.cancel()
            execution.timer = None
        if not execution.abandoned:
            execution.abandoned = True
            try:
                execution.done(execution, value, error)
            except OURS as wrong:
                self._failed(execution.of, wrong)
        elif error is not None:
            failure.let_go(error)

    def _follow(self, execution: Execution, awaitable: Any) -> None:
        """Await what a sync function has returned, in the context that is current."""
        self.loop.create_task(self._followed(execution, awaitable))

    async def _followed(self, execution: Execution, awaitable: Any) -> None:
        if not execution.abandoned:
            await self._rest(execution, awaitable)
        elif inspect.iscoroutine(awaitable):
            # It would warn that it was never awaited.
            awaitable.close()

    async def leave_behind(self, patience: float) -> None:
        """Let tasks that were cancelled end; those that ignore it no longer hold the loop up, or its end."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=patience)
        for task in self._tasks:
            log.warning("a step ignores its cancellation and is left behind: %r", task)
            # `asyncio.run` waits for every task it knows.
            asyncio.tasks._unregister_task(task)
            task._log_destroy_pending = False

    def job(self, execution: Execution, after: Callable[[], None] | None = None) -> Callable[[], None]:
        """What a thread does for a sync function: run it in its context and hand the outcome to the loop.

        after: called on the loop before the outcome is reported.
        """

        def run() -> None:
            call = execution.call
            context = call.context
            value: Any = None
            error: BaseException | None = None
            try:
                context = context.copy()
                context.run(_current.set, execution.info)
                if execution.enter():
                    value = context.run(call.fn, *call.args, **call.kwargs)
            except BaseException as caught:
                error = caught
            soon(self.loop, ended, context, value, error)

        def ended(context: contextvars.Context, value: Any, error: BaseException | None) -> None:
            if after is not None:
                after()
            if error is None and inspect.isawaitable(value):
                # A lambda that returns a coroutine: it belongs on the loop.
                context.run(self._follow, execution, value)
            else:
                self.report(execution, value, error)

        return run

    def in_thread(self, job: Callable[[], None], execution: Execution) -> None:
        """Run a job in a thread, or as soon as one is free and its execution is still wanted."""
        if execution.abandoned:
            return
        if self._threadless or self.in_threads >= self.threads.limit:
            self._waiting.append((job, execution))
            return
        self.in_threads += 1
        free = functools.partial(self._thread_free, execution)

        def run() -> None:
            try:
                job()
            finally:
                soon(self.loop, free)

        def leave() -> None:
            # Abandoned with its function: another takes its place at once.
            self.threads.lose(thread, run)
            free()

        execution.leave = leave
        try:
            thread = self.threads.run(run)
        except NO_THREAD as error:
            log.warning('step "%s" waits for a thread: %s', execution.step, error)
            execution.leave = None
            self.in_threads -= 1
            self._waiting.appendleft((job, execution))
            self._ask_later()
        else:
            execution.begins()

    def _thread_free(self, execution: Execution) -> None:
        """A thread is free again, or was left to itself. Twice is once."""
        if execution.leave is not None:
            execution.leave = None
            self.in_threads -= 1
            self._next_in_threads()

    def _ask_later(self) -> None:
        self._threadless = True
        self.loop.call_later(ASK_AGAIN, self._ask_for_threads)

    def _ask_for_threads(self) -> None:
        self._threadless = False
        self._next_in_threads()

    def _next_in_threads(self) -> None:
        while self._waiting and not self._threadless and self.in_threads < self.threads.limit:
            if not self._may_begin():
                self._ask_later()
                return
            self.in_thread(*self._waiting.popleft())


def soon(loop: Any, callback: Callable[..., Any], *args: Any) -> None:
    """Have the loop of another thread call something; nothing once it is closed."""
    while True:
        try:
            loop.call_soon_threadsafe(callback, *args)
        except MemoryError:
            # Nobody else would ever tell.
            time.sleep(ASK_AGAIN)
            continue
        except RuntimeError:
            log.debug("%r came after the loop was closed", callback)
        return


def _begun(execution: Execution) -> tuple[Any, Any]:
    """Call a step's async function and run it until it waits; StopIteration with its value if it never does.

    The coroutine, and what it waits for.
    """
    call = execution.call
    _current.set(execution.info)
    coroutine = call.fn(*call.args, **call.kwargs)
    if type(coroutine) is not CoroutineType:
        coroutine = _awaited(coroutine)
    return coroutine, coroutine.send(None)


@types.coroutine
def _resting(coroutine: Any, wanted: Any, context: contextvars.Context) -> Generator[Any, Any, Any]:
    """Drives a coroutine that waits for something, in its own context; passes for what is awaited."""
    while True:
        try:
            value = yield wanted
        except GeneratorExit:
            context.run(coroutine.close)
            raise
        except BaseException as error:
            act, given = coroutine.throw, error
        else:
            act, given = coroutine.send, value
        try:
            wanted = context.run(act, given)
        except StopIteration as stop:
            return stop.value


async def _awaited(awaitable: Any) -> Any:
    return await awaitable
