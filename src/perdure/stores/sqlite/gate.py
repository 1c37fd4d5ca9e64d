"""The gate that every write transaction and checkpoint of ours passes, in all processes: who came first, writes first.

SQLite's own lock is not fair: of four processes at full load some commit thousands of times and some hardly ever. So
they queue before it, at a turnstile of two locks: take TURN, take WRITE, drop TURN, work, drop WRITE. Whoever has
TURN is the only one that tries WRITE, so the one that has just left cannot take it again before the next.

Both are byte-range locks in `<db>-gate`, which the kernel frees at any death. They only make it fair: what makes it
safe is SQLite's lock, so a lost gate harms nobody. They belong to the process, so a lock for its threads stands before.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import Final

try:
    import fcntl as fcntl
except ImportError:  # refused with a sentence when a store is opened
    fcntl = None  # type: ignore[assignment]  # an import cannot be declared optional

TURN: Final = 0
WRITE: Final = 1

FIRST_PAUSE: Final = 0.00005
LAST_PAUSE: Final = 0.002


class Gate:
    """One process's side of the gate; `enter` and `leave` around each write."""

    def __init__(self, path: str) -> None:
        self.path: Final = path
        self.threads = threading.Lock()
        self._file: int | None = None

    def enter(self, until: float) -> bool:
        """Take the gate; False if it did not open before `until` on the monotonic clock."""
        if not self.threads.acquire(timeout=max(0.0, until - time.monotonic())):
            return False
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if _take(self._file, TURN, until):
                try:
                    if _take(self._file, WRITE, until):
                        return True
                finally:
                    fcntl.lockf(self._file, fcntl.LOCK_UN, 1, TURN)
        except BaseException:
            self.threads.release()
            raise
        self.threads.release()
        return False

    def leave(self) -> None:
        """Let the next one in."""
        if self._file is not None:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, WRITE)
        self.threads.release()

    def close(self) -> None:
        """Give the file back; the next `enter` opens it again. Only while nobody of this process is inside."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def forget(self) -> None:
        """In a forked child: the parent's locks and threads are not ours."""
        self.close()
        self.threads = threading.Lock()


def _take(file: int, byte: int, until: float) -> bool:
    # The kernel could let us sleep until the lock is free, but not with an end: a stopped holder would stop us too.
    pause = FIRST_PAUSE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            return True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() >= until:
            return False
        time.sleep(pause)
        pause = min(pause * 1.25, LAST_PAUSE)
