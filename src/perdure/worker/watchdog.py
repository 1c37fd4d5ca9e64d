"""Notices workflow code that does not rest: logs its stack after a second, interrupts it at the limit.

`Watched` says which run's code is inside, since when; it costs two assignments. A thread looks at it twice a
second and, at the limit, raises `NeverRests` in the thread in which the code runs. It is armed only while a
run's code is inside, so that it can never hit the caller's own loop.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Final

from perdure.core.errors import NeverRests
from perdure.runtime.loop import arrives, is_theirs, line_of

log = logging.getLogger("perdure.worker")

_ENTRY: Final = str(Path(__file__).with_name("residents.py"))
"""From here the code of runs is called: what is further out is not theirs."""
FIRST_LOOK: Final = 1.0
"""Seconds of code without rest after which its stack is logged."""


class Watched:
    """Which run's code is inside, as a context manager made once and entered again and again."""

    __slots__ = ("lock", "resident", "since")

    def __init__(self) -> None:
        self.resident: Any = None
        self.since = 0.0
        self.lock = threading.Lock()  # the watchdog's

    def __enter__(self) -> None:
        self.since = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.leave()

    def leave(self) -> None:
        """No code is inside any more. What the watchdog has raised before arrives here at the latest."""
        # The watchdog raises under its lock, and only while `since` stands. It is waited for, but its lock never taken:
        # what it has raised could arrive between taking and giving back.
        self.since = 0.0
        while self.lock.locked():
            time.sleep(0)
        self.since = 0.0  # which it may have set anew
        arrives()


class Watchdog:
    """A thread over one `Watched`. busy: seconds at which the code is interrupted."""

    def __init__(self, watched: Watched, busy: float) -> None:
        self.watched = watched
        self.busy = busy
        self._logged = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="perdure-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop looking. Twice is once."""
        self._stop.set()

    def _serve(self) -> None:
        while not self._stop.wait(min(0.5, self.busy / 4)):
            try:
                self.look()
            except Exception:
                log.exception("a look at code that may not rest failed")

    def look(self) -> None:
        """One look at what is inside."""
        watched = self.watched
        since = watched.since
        if not since:
            return
        taken = time.monotonic() - since
        if taken < min(FIRST_LOOK, self.busy):
            return
        with watched.lock:
            if watched.since != since:
                return
            resident = watched.resident
            driver = resident.play.driver
            thread = driver.inside if driver is not None else 0
            frame = sys._current_frames().get(thread) if thread else None
            if frame is None:
                return
            if since != self._logged:
                self._logged = since
                stack = "".join(traceback.format_stack(frame, limit=12))
                log.warning("run %s: its code has not rested for %.1f s\n%s", resident.this.id, taken, stack)
            if taken < self.busy or sys.gettrace() is not None:
                return
            where = _line_of(frame, getattr(driver, "main", None))
            if driver.inside != thread:
                return
            resident.play.did_not_rest(where)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(NeverRests))
            # Once is enough: the next look starts counting anew.
            watched.since = time.monotonic()


def _line_of(frame: Any, main: Any) -> str:
    """The innermost line of the run's code. main: its task, which may be between two steps."""
    where = frame
    while where is not None and where.f_code.co_filename != _ENTRY:
        name = where.f_code.co_filename
        if is_theirs(name):
            return f"{name}:{where.f_lineno} in {where.f_code.co_name}"
        where = where.f_back
    return line_of(main)
