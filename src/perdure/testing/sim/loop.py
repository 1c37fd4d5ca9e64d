"""An ordinary event loop whose time is the universe's: what a simulated process runs its shift and its steps on."""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import inspect
from asyncio import events as asyncio_events
from asyncio import tasks as asyncio_tasks
from collections import deque
from collections.abc import Callable
from typing import Any

_unregister_task = asyncio_tasks._unregister_task
_set_running_loop = asyncio_events._set_running_loop


class SimLoop(asyncio.AbstractEventLoop):
    """See the module. clock: seconds, the process's own; `read`: takes what is to be executed outside the loop."""

    def __init__(
        self, clock: Callable[[], float], read: Callable[[Callable[[], Any], Callable[[Any], None]], None]
    ) -> None:
        self._clock = clock
        self._read = read
        self.ready: deque[asyncio.Handle] = deque()
        self.tasks: dict[Any, None] = {}
        self.errors: list[BaseException] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._count = 0
        self._closed = False

    def step(self) -> None:
        """Run everything that is ready now; what that makes ready waits for the next step."""
        now = self._clock() + 1e-9
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if not timer._cancelled:
                self.ready.append(timer)
        ready, self.ready = self.ready, deque()
        _set_running_loop(self)
        try:
            while ready:
                handle = ready.popleft()
                if not handle._cancelled:
                    handle._context.run(handle._callback, *handle._args)  # type: ignore[attr-defined]  # it has them
        finally:
            _set_running_loop(None)
            if ready:
                self.ready.extendleft(reversed(ready))

    def next_timer(self) -> float | None:
        """When the earliest timer comes due, by the loop's clock."""
        timers = self._timers
        while timers and timers[0][2]._cancelled:
            heapq.heappop(timers)
        return timers[0][0] if timers else None

    def crash(self) -> None:
        """The process is gone: nothing runs any more, what was running is closed without being heard."""
        self._closed = True
        self.ready.clear()
        self._timers.clear()
        _set_running_loop(self)
        try:
            for task in list(self.tasks):
                if not task.done():
                    task._log_destroy_pending = False
                    coroutine = task.get_coro()
                    if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                        # A first step outside of any step's context, where it fails at once: that is quieter than
                        # Python's warning of a coroutine that was never awaited.
                        try:
                            coroutine.send(None)
                        except BaseException:  # as was meant
                            pass
                    coroutine.close()
        finally:
            _set_running_loop(None)
        self.tasks.clear()
        self.ready.clear()

    # --- what asyncio asks of a loop ---

    def time(self) -> float:
        return self._clock()

    def call_soon(  # type: ignore[override]  # the types of the arguments are the callback's business
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self.ready.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override]  # as above
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        if self._closed:
            raise RuntimeError("the loop of a process that is gone")
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override]  # as above
        self, delay: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._clock() + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]  # as above
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Cancelled timers are dropped when they come up."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Any = None, **extra: Any) -> Any:
        named: dict[str, Any] = {"name": name if name is not None else "sim"}
        if context is not None:
            named["context"] = context
        task: Any = asyncio.Task(coro, loop=self, **named)
        _unregister_task(task)
        self.tasks[task] = None
        task.add_done_callback(self._done)
        return task

    def _done(self, task: Any) -> None:
        self.tasks.pop(task, None)

    def run_in_executor(  # type: ignore[override]  # as above
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> Any:
        future = self.create_future()

        def done(result: Any) -> None:
            if not future.done():
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

        self._read(lambda: func(*args), done)
        return future

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self._closed

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.errors.append(error if error is not None else RuntimeError(str(context.get("message"))))

    default_exception_handler = call_exception_handler


SimLoop.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]  # every class of an ABC has it
