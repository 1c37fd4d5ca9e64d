"""Drives an async or generator workflow on its own deterministic loop."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Generator, Sequence
from typing import Any, Final

from perdure.core.errors import NeverRests
from perdure.core.match import Line, Op
from perdure.runtime.context import Operation
from perdure.runtime.loop import RunLoop, RunTask

survivors: Final[list[Any]] = []
"""Code that would not be closed, kept for ever: dropped, the collector would run it in the middle of another run."""


class AsyncDriver:
    """One async run's code: started once, run to rest after each input, closed at the end."""

    def __init__(self, line: Line, started_at: int) -> None:
        self.line = line
        self.loop = RunLoop(line, started_at)  # type: ignore[abstract]  # what it cannot do is set from a list
        self.main: RunTask | None = None
        self._generator: Generator[Any, Any, Any] | None = None

    stopped: BaseException | None = None
    suspended = False
    wants_body = False

    def wait_for(self, ready: Callable[[], bool], ops: Sequence[Op], own: Op | None = None) -> None:
        raise AssertionError("an async run does not block")

    def hold(self) -> None:
        self.loop.held = True

    @property
    def inside(self) -> int:
        """The thread in which the run's code is active, or 0."""
        return self.loop.inside

    def start(self, body: Callable[[], Any], *, generator: bool) -> None:
        """Begin the main code; it runs with the next `run`."""
        if generator:
            self._generator = body()
            coroutine = _driven(self._generator)
        else:
            coroutine = body()
        # From an empty context: what the caller's context holds would be there in the first life only.
        self.main = contextvars.Context().run(_main_task, coroutine, self.loop)

    def run(self) -> bool:
        """Let the code go on until it rests or has returned; whether it has."""
        if self.loop.ready:
            try:
                self.loop.run_to_rest(self.main)
            except NeverRests:
                # It may have come when the loop was being left.
                self.loop.leave()
                raise
        return self.main is not None and self.main.done()

    @property
    def over(self) -> bool:
        return self.main is not None and self.main.done()

    def outcome(self) -> tuple[Any, BaseException | None]:
        """How the main code ended: its value, or what left it."""
        assert self.main is not None
        if self.main.cancelled():
            return None, asyncio.CancelledError()
        try:
            # Not `exception()`: after that the task would go on keeping the traceback, and all that its frames hold.
            return self.main.result(), None
        except BaseException as error:
            return None, error.with_traceback(getattr(error.__traceback__, "tb_next", None))

    def cancel(self) -> None:
        """Throw the cancellation into the main code at its current wait."""
        main = self.main
        if main is None or main.done():
            return
        main.cancel()
        if hasattr(main, "uncancel"):
            # So that all interpreters count alike: the request was delivered, it is no longer pending.
            self.loop.call_soon(main.uncancel)

    def stuck(self) -> bool:
        """Whether nothing recorded can wake the code: it waits for an asyncio object nobody will set."""
        return not self.over and not self.line.pending and not self.line.deferred and self.line.next_timer() is None

    def close(self) -> None:
        """Close what still runs; the context is dead, so it can begin nothing."""
        if self.loop.closed:
            return
        if self.over and not self.line.replaying and not self.line.difference:
            self.line.dead = False
            self.loop.tell_unretrieved()
        self.line.dead = True
        survivors.extend(self.loop.close_all())
        if self._generator is not None and not _generator_closed(self._generator):
            survivors.append(self._generator)


def _main_task(coroutine: Any, loop: RunLoop) -> RunTask:
    return RunTask(coroutine, loop=loop, name="main")


def _generator_closed(generator: Generator[Any, Any, Any]) -> bool:
    for _ in range(10):
        try:
            generator.close()
            return True
        except BaseException:
            # Whatever dying code raises has no one left to tell.
            continue
    return False


async def _driven(generator: Generator[Any, Any, Any]) -> Any:
    """A generator workflow as a coroutine: each yielded operation is awaited, a yielded list is gathered."""
    try:
        try:
            wanted = generator.send(None)
            while True:
                try:
                    value = await _awaitable(wanted)
                except GeneratorExit:
                    raise
                except BaseException as error:
                    wanted = generator.throw(error)
                else:
                    wanted = generator.send(value)
        except StopIteration as stop:
            return stop.value
    finally:
        generator.close()


def _awaitable(wanted: Any) -> Any:
    if isinstance(wanted, Operation) or asyncio.iscoroutine(wanted):
        return wanted
    if isinstance(wanted, list):
        return asyncio.gather(*(_awaitable(each) for each in wanted))
    return _refused(wanted)


async def _refused(wanted: Any) -> Any:
    raise TypeError(
        f"A generator workflow yielded {wanted!r}. It yields operations of ctx.step, or a list of them to wait for "
        "all. Of what start returned, yield its .result()."
    )
