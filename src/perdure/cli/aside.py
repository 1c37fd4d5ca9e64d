"""A coroutine on a loop in a thread of its own, while the main thread keeps the signals.

So that nothing a user's step does can keep the process from ending: not a call that blocks the loop, nor a thread
that ignores every request. The first signal asks, the second ends the process; so does patience that ran out.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

LEAVING: Final = 2.0
"""Seconds that threads left behind get to end once everything is done."""
_LOOK: Final = 0.2


class Aside(Generic[T]):
    """One such coroutine.

    main: makes it, given the event that the first signal sets. patience: seconds after that until the process ends
    with `impatient`, whatever the coroutine does.
    """

    def __init__(
        self, main: Callable[[asyncio.Event], Coroutine[Any, Any, T]], *, patience: float, impatient: int
    ) -> None:
        self._main = main
        self._patience = patience
        self._impatient = impatient
        self._asked: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._over = threading.Event()
        self._until: float | None = None
        self._value: T
        self._error: BaseException | None = None

    def run(self) -> T:
        """Run it to its end; its value or its error."""
        thread = threading.Thread(target=self._serve, name="perdure-loop", daemon=True)
        with _signals(self._signalled):
            thread.start()
            while not self._over.wait(_LOOK):
                if self._until is not None and time.monotonic() >= self._until:
                    end_now(self._impatient)
        if self._error is not None:
            raise self._error
        return self._value

    def ask_to_stop(self) -> None:
        """As the first signal does. Twice is once; from any thread."""
        if self._until is not None:
            return
        self._until = time.monotonic() + self._patience
        if self._asked is not None:
            loop, event = self._asked
            loop.call_soon_threadsafe(event.set)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._until is not None:
            end_now(130)
        self.ask_to_stop()

    def _serve(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:  # what comes after the coroutine's own end
            self._error = self._error or error
        finally:
            self._over.set()

    async def _run(self) -> None:
        event = asyncio.Event()
        self._asked = asyncio.get_running_loop(), event
        if self._until is not None:
            event.set()  # asked before there was an event
        try:
            self._value = await self._main(event)
        except BaseException as error:
            self._error = error
        # Not after the loop's own clean-up: that waits for threads which nobody can stop.
        self._over.set()


@contextmanager
def _signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def end_now(code: int) -> None:
    """End the process without waiting for anything but what was already printed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass  # nobody reads it any more
    os._exit(code)


def end_soon(code: int) -> int:
    """`code`, for `return`: the process ends with it even if a thread left behind does not."""

    def wait() -> None:
        time.sleep(LEAVING)
        end_now(code)

    threading.Thread(target=wait, name="perdure-leaving", daemon=True).start()
    return code
