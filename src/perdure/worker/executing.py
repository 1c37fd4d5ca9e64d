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
from collections.abc import Callable
from typing import Any, Final

from perdure.runtime.context import step_key
from perdure.runtime.drive_sync import BodyThreads
from perdure.runtime.steps import LocalCall

log = logging.getLogger("perdure.worker")


class StepInfo:
    """`current_step()`: what a step's function may know of itself."""

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
        return logging.LoggerAdapter(logging.getLogger("perdure.step"), {"run": self.run_id, "step": self.id})


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


@functools.lru_cache(maxsize=1024)
def _is_async_code(fn: Any) -> bool:
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004


def is_async(fn: Any) -> bool:
    """Whether calling this gives a coroutine, as far as can be seen from outside."""
    target = fn
    while isinstance(target, functools.partial):
        target = target.func
    target = getattr(target, "__func__", target)
    try:
        return _is_async_code(target)
    except TypeError:  # not hashable
        return inspect.iscoroutinefunction(target)


Done = Callable[["Execution", Any, "BaseException | None"], None]


class Execution:
    """One attempt in flight."""

    __slots__ = ("abandoned", "attempt", "began", "call", "counted", "done", "info", "leave", "step", "task", "timer")

    def __init__(self, step: str, attempt: int, call: LocalCall, info: StepInfo, done: Done) -> None:
        self.step = step
        self.attempt = attempt
        self.call = call
        self.info = info
        self.done = done
        self.abandoned = False
        self.task: asyncio.Task[Any] | None = None
        self.timer: Any = None
        self.began = 0
        self.counted = False
        self.leave: Callable[[], None] | None = None  # gives the thread of its function up

    def report(self, value: Any, error: BaseException | None) -> None:
        """The function has ended, on the loop's thread."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if not self.abandoned:
            self.abandoned = True
            self.done(self, value, error)

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
    """Runs functions for a worker: async ones as tasks of its loop, sync ones in its threads."""

    def __init__(self, loop: Any, threads: BodyThreads) -> None:
        self.loop = loop
        self.threads = threads
        self._tasks: set[Any] = set()
        self._waiting: list[tuple[Callable[[], None], Execution]] = []
        self.in_threads = 0

    def begin(self, execution: Execution) -> None:
        """Run the execution's function where it belongs."""
        call = execution.call
        if is_async(call.fn):
            call.context.copy().run(self._begin_task, execution)
        else:
            self.in_thread(self.job(execution), execution)

    def _begin_task(self, execution: Execution) -> None:
        call = execution.call
        _current.set(execution.info)
        try:
            coroutine = call.fn(*call.args, **call.kwargs)
        except BaseException as error:
            self.loop.call_soon(execution.report, None, error)
            return
        self._follow(execution, coroutine)

    def _follow(self, execution: Execution, awaitable: Any) -> None:
        task = self.loop.create_task(_awaited(awaitable))
        execution.task = task
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._ended, execution, awaitable))

    def _ended(self, execution: Execution, awaitable: Any, task: Any) -> None:
        self._tasks.discard(task)
        execution.task = None
        if task.cancelled():
            if inspect.iscoroutine(awaitable):
                # Cancelled before its first step, it would warn that it was never awaited.
                awaitable.close()
            # Not by us, or nobody wants it: a step that is cancelled from inside has failed.
            execution.report(None, asyncio.CancelledError("the step's task was cancelled"))
            return
        error = task.exception()
        value: Any = None if error is not None else task.result()
        if isinstance(value, _Left):
            value, error = None, value.error
        execution.report(value, error)

    async def leave_behind(self, patience: float) -> None:
        """Let tasks that were cancelled end; those that ignore it no longer hold the loop up, or its end."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=patience)
        for task in self._tasks:
            log.warning("a step ignores its cancellation and is left behind: %r", task)
            # `asyncio.run` waits for every task it knows.
            asyncio.tasks._unregister_task(task)
            task._log_destroy_pending = False

    def on_loop(self, fn: Any) -> bool:
        """Whether the function belongs on the loop."""
        return is_async(fn)

    def job(self, execution: Execution, after: Callable[[], None] | None = None) -> Callable[[], None]:
        """What a thread does for a sync function: run it in its context and hand the outcome to the loop.

        after: called on the loop before the outcome is reported.
        """

        def run() -> None:
            call = execution.call
            context = call.context.copy()
            context.run(_current.set, execution.info)
            value: Any = None
            error: BaseException | None = None
            try:
                value = context.run(call.fn, *call.args, **call.kwargs)
            except BaseException as caught:
                error = caught
            self._soon(functools.partial(ended, context, value, error))

        def ended(context: contextvars.Context, value: Any, error: BaseException | None) -> None:
            if after is not None:
                after()
            if error is None and inspect.isawaitable(value):
                # A lambda that returns a coroutine: it belongs on the loop.
                context.run(self._follow, execution, value)
            else:
                execution.report(value, error)

        return run

    def in_thread(self, job: Callable[[], None], execution: Execution) -> None:
        """Run a job in a thread, or as soon as one is free and its execution is still wanted."""
        if execution.abandoned:
            return
        if self.in_threads >= self.threads.limit:
            self._waiting.append((job, execution))
            return
        self.in_threads += 1
        free = functools.partial(self._thread_free, execution)

        def run() -> None:
            try:
                job()
            finally:
                self._soon(free)

        def leave() -> None:
            # Abandoned with its function: another takes its place at once.
            self.threads.lose(thread, run)
            free()

        execution.leave = leave
        thread = self.threads.run(run)

    def _thread_free(self, execution: Execution) -> None:
        """A thread is free again, or was left to itself. Twice is once."""
        if execution.leave is None:
            return
        execution.leave = None
        self.in_threads -= 1
        while self._waiting and self.in_threads < self.threads.limit:
            self.in_thread(*self._waiting.pop(0))

    def _soon(self, callback: Callable[[], Any]) -> None:
        try:
            self.loop.call_soon_threadsafe(callback)
        except RuntimeError:
            log.debug("a step ended after its engine was closed")


class _Left:
    """A step called `sys.exit()`: its failure, not the end of the worker, as asyncio would have it."""

    def __init__(self, error: SystemExit) -> None:
        self.error = error


async def _awaited(awaitable: Any) -> Any:
    try:
        return await awaitable
    except SystemExit as error:
        return _Left(error)


DEFAULT_THREADS: Final = 32
