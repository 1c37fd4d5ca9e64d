"""Drives a sync workflow: its body runs in a thread of ours, one baton goes between it and the driver.

While the body runs, the driver waits; when the body waits for something (or executes the function of a `run`),
the driver goes on. A body that waits long gives its thread back: `Suspended` is raised at its wait, and the
next input that resolves the wait starts the body again over the whole line (`play.py`).
"""

from __future__ import annotations

import contextvars
import logging
import threading
import traceback
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

from perdure.core.errors import Cancelled, Evicted, Suspended, Unwinding
from perdure.core.match import LOCAL, Line, Op
from perdure.runtime.inside import body
from perdure.runtime.loop import arrives

log = logging.getLogger("perdure.runtime")


class BodyThreads:
    """Daemon threads for sync bodies: made when needed, kept for the next one. `limit` is what counts as short."""

    def __init__(self, limit: int = 32) -> None:
        self.limit = limit
        self.busy = 0
        self.lost = 0
        self._idle: list[_BodyThread] = []
        self._lock = threading.Lock()

    @property
    def short(self) -> bool:
        """Whether all threads are taken, so that waiting bodies should give theirs back."""
        return self.busy >= self.limit

    @property
    def at_rest(self) -> bool:
        """Whether no thread is at anything, not even one that was given up."""
        return self.busy == 0 and self.lost == 0

    def run(self, job: Callable[[], None]) -> _BodyThread:
        """Run the job in a thread at once: in this one. `NO_THREAD`: the system gives none now."""
        with self._lock:
            thread = self._idle.pop() if self._idle else None
        if thread is None:
            thread = _BodyThread(self)
        with self._lock:
            self.busy += 1
        thread.give(job)
        return thread

    def done(self, thread: _BodyThread) -> bool:
        """A thread is free again; False: more than enough are idle, or it was lost; it should end."""
        with self._lock:
            thread.job = None
            if thread.lost:
                self.lost -= 1
                return False
            self.busy -= 1
            if len(self._idle) >= self.limit:
                return False
            self._idle.append(thread)
            return True

    def lose(self, thread: _BodyThread, job: Callable[[], None]) -> None:
        """A thread that may never come back from this job no longer counts. Twice is once."""
        with self._lock:
            if thread.job is job and not thread.lost:
                thread.lost = True
                self.lost += 1
                self.busy -= 1

    def regain(self, thread: _BodyThread, job: Callable[[], None]) -> None:
        """It has come back all the same, and goes on with its job."""
        with self._lock:
            if thread.job is job and thread.lost:
                thread.lost = False
                self.lost -= 1
                self.busy += 1


class _BodyThread:
    def __init__(self, pool: BodyThreads) -> None:
        self._pool = pool
        self.job: Callable[[], None] | None = None
        self.lost = False
        self._ready = threading.Lock()
        self._ready.acquire()
        threading.Thread(target=self._serve, name="perdure-body", daemon=True).start()

    def give(self, job: Callable[[], None]) -> None:
        self.job = job
        self._ready.release()

    def _serve(self) -> None:
        while True:
            self._ready.acquire()
            if self.job is not None:
                # Each body in a context of its own: nothing leaks from one run into the next.
                contextvars.Context().run(self.job)
            if not self._pool.done(self):
                return


class SyncDriver:
    """One sync run's code in its thread. `functions` it executes for the worker are the body's own."""

    def __init__(self, line: Line, threads: BodyThreads) -> None:
        self.line = line
        self.threads = threads
        self.suspended = False
        self.executing: Op | None = None
        # What the body gets: a function to execute, or None: look at what has changed.
        self._to_body: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._to_driver = threading.Lock()
        self._to_driver.acquire()
        self._body: Callable[[], Any] | None = None
        self._started = False
        self._thread: _BodyThread | None = None
        self._job: Callable[[], None] = self._main
        self._inside = 0
        self._waits = 0  # the thread that waits while the body runs
        self._ready: Callable[[], bool] | None = None
        self._ops: Sequence[Op] = ()
        self._own: Op | None = None
        self._cancel = False
        self.stopped: Unwinding | None = None
        self._value: Any = None
        self._error: BaseException | None = None
        self._over = False

    # --- the driver's side ---

    def hold(self) -> None:
        self.leave()
        threading.Event().wait()

    def start(self, body: Callable[[], Any], *, generator: bool = False) -> None:
        self._body = body

    def run(self) -> bool:
        """Let the body go on until it rests: it waits, and is not to be cancelled. Whether it is over."""
        if self._over or self.suspended:
            return self._over
        self._waits = threading.get_ident()
        if not self._started:
            if self._body is None:
                return False
            self._started = True
            self._thread = self.threads.run(self._job)
            self._to_driver.acquire()
        while self._can_go_on():
            self._to_body.put(None)
            self._to_driver.acquire()
        return self._over

    def _can_go_on(self) -> bool:
        return not self._over and self.executing is None and self._resolved()

    def _resolved(self) -> bool:
        return self._cancel or (self._ready is not None and self._ready())

    @property
    def wants_body(self) -> bool:
        """Whether the wait is resolved but its thread is elsewhere: unwound, or inside a function."""
        return not self._over and (self.suspended or self.executing is not None) and self._resolved()

    @property
    def over(self) -> bool:
        return self._over

    def outcome(self) -> tuple[Any, BaseException | None]:
        return self._value, self._error

    def cancel(self) -> None:
        self._cancel = True

    def stuck(self) -> bool:
        return False

    def may_execute(self, op: Op) -> bool:
        """Whether this operation's function belongs on the body's thread: the body waits for it alone."""
        return not self.suspended and not self._over and self.executing is None and self._own is op

    def execute(self, op: Op, job: Callable[[], None]) -> None:
        """Run the function of the `run` the body waits for on the body's thread; `job` reports by itself."""
        self.executing = op
        self._to_body.put(job)

    def waits_local_only(self) -> bool:
        """Whether everything the body waits for runs here."""
        return all(op.kind in LOCAL for op in self._ops)

    def finished(self, op: Op) -> None:
        """The function has returned: the body's thread is the body's again."""
        if self.executing is op:
            self.executing = None
        if self._thread is not None:
            self.threads.regain(self._thread, self._job)

    def leave(self) -> None:
        """Nobody waits any more for the function that executes: its thread is replaced until it returns."""
        if self._thread is not None:
            self.threads.lose(self._thread, self._job)

    @property
    def inside(self) -> int:
        """The thread in which the body runs now, or 0."""
        return self._inside

    def unwind(self) -> bool:
        """Give the thread back while the body waits; False if it is not waiting."""
        if self._over or self.suspended or not self._started or self.executing is not None:
            return False
        self.suspended = True
        self._let_go(Suspended)
        return True

    def close(self) -> None:
        """The run leaves memory: the body is unwound, now or when its function returns."""
        self.line.dead = True
        if self._started and not self._over and self.stopped is None:
            self._let_go(Evicted)

    def _let_go(self, kind: type[Unwinding]) -> None:
        # The body may linger in its `finally` blocks; it holds no baton, and every call of ctx raises again.
        self.stopped = kind(f"run {self.line.run_id} gave its thread back")
        self._to_body.put(None)

    # --- the body's side ---

    def wait_for(self, ready: Callable[[], bool], ops: Sequence[Op], own: Op | None = None) -> None:
        """Give the baton back until `ready()`; meanwhile execute the function of the `run` waited for, `own`."""
        self._ready = ready
        self._ops = ops
        self._own = own
        self._rest()
        while True:
            job = self._to_body.get()
            if job is not None:
                job()
                del job
            elif self.stopped is not None:
                raise self.stopped
            else:
                break
        self._enter()
        self._ready = None
        self._ops = ()
        self._own = None
        if self._cancel:
            self._cancel = False
            raise Cancelled(self.line.cancel_reason)

    def _enter(self) -> None:
        self._inside = threading.get_ident()
        body.waited_for_by, body.line = self._waits, self.line

    def _rest(self) -> None:
        self._inside = 0
        body.waited_for_by, body.line = 0, None
        self._to_driver.release()

    def _main(self) -> None:
        value: Any = None
        error: BaseException | None = None
        assert self._body is not None
        try:
            self._enter()
            value = self._body()
            # An interruption that comes when the body has just returned is the body's still.
            self._inside = 0
            arrives()
        except BaseException as caught:
            error = caught
        if self.stopped is not None:
            body.waited_for_by, body.line = 0, None
            if not isinstance(error, Unwinding):
                where = traceback.extract_tb(error.__traceback__)[-1:] if error is not None else []
                log.warning(
                    "run %s: the workflow body swallowed %s%s; that changes nothing",
                    self.line.run_id,
                    type(self.stopped).__name__,
                    f" near {where[0].filename}:{where[0].lineno}" if where else "",
                )
            return
        self._value, self._error, self._over = value, error, True
        self._body = None
        self._rest()
