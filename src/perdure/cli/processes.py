"""Several worker processes under a parent that starts them again when they die, and passes signals on.

Each child is a session of its own, so that Ctrl-C in a terminal reaches the parent alone, and has a pipe from the
parent as its stdin: when the parent is killed, the pipe ends and the children stop in peace.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Final

from perdure.cli.aside import end_now
from perdure.cli.words import tell

log = logging.getLogger("perdure.worker")

FIRST_BACK_OFF: Final = 0.5
LAST_BACK_OFF: Final = 30.0
HEALTHY: Final = 60.0
"""Seconds a child has to live for its death to count as the first one again."""
_LOOK: Final = 0.1


class Child:
    """One place for a worker process, and the process that is in it."""

    def __init__(self, line: Sequence[str], environment: Mapping[str, str]) -> None:
        self._line = line
        self._environment = environment
        self._deaths = 0
        self.again_at: float | None = None
        self.start()

    def start(self) -> None:
        """Put a new process into the place."""
        self.again_at = None
        self._since = time.monotonic()
        self.process = subprocess.Popen(
            self._line, stdin=subprocess.PIPE, start_new_session=True, env={**os.environ, **self._environment}
        )

    def died(self, now: float) -> float:
        """It ended unasked: the seconds to wait before the next one."""
        self._deaths = 1 if now - self._since > HEALTHY else self._deaths + 1
        pause = min(FIRST_BACK_OFF * 2.0 ** (self._deaths - 1), LAST_BACK_OFF)
        self.again_at = now + pause
        self._close()
        return pause

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()


class Processes:
    """`count` children that run `line`, with this added to the environment.

    patience: seconds after a signal until those that are left are killed.
    """

    def __init__(self, line: Sequence[str], environment: Mapping[str, str], count: int, *, patience: float) -> None:
        self._line = line
        self._environment = environment
        self._count = count
        self._patience = patience
        self._stopping = threading.Event()
        self._children: list[Child] = []

    def run(self) -> int:
        """Until a signal; 0 if every child drained, else 1."""
        before = {number: signal.signal(number, self._signalled) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._children = [Child(self._line, self._environment) for _ in range(self._count)]
            while not self._stopping.wait(_LOOK):
                self._mind()
            tell("Stopping: steps in flight may end. The next signal ends all processes at once.")
            return self._stop()
        finally:
            for child in self._children:
                child.kill()
            for number, old in before.items():
                signal.signal(number, old)

    def _mind(self) -> None:
        now = time.monotonic()
        for child in self._children:
            if child.again_at is not None:
                if now >= child.again_at:
                    child.start()
            elif (code := child.process.poll()) is not None:
                how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
                pause = child.died(now)
                log.warning("worker process %d %s; another starts in %g s", child.process.pid, how, pause)

    def _stop(self) -> int:
        until = time.monotonic() + self._patience
        living = [child.process for child in self._children if child.again_at is None]
        for process in living:
            process.terminate()
        drained = True
        for process in living:
            try:
                # One that ends by the signal itself had not begun to serve.
                drained &= process.wait(max(until - time.monotonic(), 0)) in (0, -signal.SIGTERM)
            except subprocess.TimeoutExpired:
                drained = False
        return 0 if drained else 1

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        if self._stopping.is_set():
            for child in self._children:
                child.process.kill()
            end_now(130)
        self._stopping.set()
