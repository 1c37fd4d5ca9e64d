"""Who lives, told by the kernel: `<db>-workers`, a file in which each incarnation has a slot.

An incarnation locks the first byte of its slot and writes there when it last lived, without a transaction, so that
nobody's write lock can keep it from that. The kernel frees the lock at any death; a stopped process keeps it and is
judged by the time of its last beat.

POSIX locks belong to the process: a second lock on the same byte always succeeds, and closing any descriptor of the
file frees them all. So one object per process and file has the only descriptor, knows which slots are the process's
own, and never closes the file while it has one. A forked child has none of its parent's locks and forgets them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import threading
from typing import Final

try:
    import fcntl
except ImportError:  # refused with a sentence when a store is opened
    fcntl = None  # type: ignore[assignment]  # an import cannot be declared optional

SLOT: Final = 32
BEAT: Final = struct.Struct("<q8s")
BEAT_AT: Final = 8  # in the slot, behind the byte that is locked


class Beats:
    """This process's side of one file of beats."""

    def __init__(self, path: str) -> None:
        self.path: Final = path
        self._lock = threading.Lock()
        self._file: int | None = None
        self._own: dict[str, int] = {}  # incarnation -> slot locked by this process

    def lock(self, incarnation: str, taken: set[int]) -> int:
        """A slot that is not `taken`, locked for this incarnation until `unlock` or death."""
        with self._lock:
            if self._file is not None and not self._is_there():
                self._drop()  # somebody removed the file: locks in it are seen by nobody
            slot = 0
            while slot in taken or slot in self._own.values() or not self._try(slot):
                slot += 1
            self._own[incarnation] = slot
            return slot

    def unlock(self, incarnation: str) -> None:
        """Give the slot's lock back. Twice is once."""
        with self._lock:
            slot = self._own.pop(incarnation, None)
            if slot is not None:
                fcntl.lockf(self._opened(), fcntl.LOCK_UN, 1, slot * SLOT)

    def write(self, slot: int, incarnation: str, at: int) -> None:
        """The incarnation lived at this time."""
        with self._lock:
            os.pwrite(self._opened(), BEAT.pack(at, _mark(incarnation)), slot * SLOT + BEAT_AT)

    def read(self, slot: int, incarnation: str) -> int | None:
        """When the incarnation last lived; None if somebody else, or nobody, has written into this slot."""
        with self._lock:
            stored = os.pread(self._opened(), BEAT.size, slot * SLOT + BEAT_AT)
        if len(stored) < BEAT.size:
            return None
        at, mark = BEAT.unpack(stored)
        return int(at) if mark == _mark(incarnation) else None

    def is_free(self, slot: int, incarnation: str) -> bool:
        """Whether the process that locked this slot for the incarnation is gone."""
        with self._lock:
            if incarnation in self._own or slot in self._own.values():
                return False  # ours; trying it would succeed, and giving it back would free it
            if not self._try(slot):
                return False
            fcntl.lockf(self._opened(), fcntl.LOCK_UN, 1, slot * SLOT)
            return True

    def close(self) -> bool:
        """Give the file back, unless an incarnation of this process is in it."""
        with self._lock:
            if not self._own:
                self._drop()
            return self._file is None

    def forget(self) -> None:
        """In a forked child: none of the parent's locks is ours."""
        self._lock = threading.Lock()
        self._drop()

    def _opened(self) -> int:
        if self._file is None:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        return self._file

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._opened()), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _drop(self) -> None:
        file, self._file = self._file, None
        self._own.clear()
        if file is not None:
            os.close(file)

    def _try(self, slot: int) -> bool:
        try:
            fcntl.lockf(self._opened(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot * SLOT)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return False
        return True


def _mark(incarnation: str) -> bytes:
    return hashlib.sha256(incarnation.encode()).digest()[:8]
