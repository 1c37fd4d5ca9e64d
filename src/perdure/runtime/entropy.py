"""Random bytes of the operating system, read many at a time.

Each read is a system call that gives up the interpreter's lock, and getting it back from a busy thread takes up to
5 ms: too dear for every start of a run.
"""

from __future__ import annotations

import os
import secrets
import threading
from typing import Final

AT_ONCE: Final = 4096

_lock = threading.Lock()
_left = b""


def drawn(count: int) -> bytes:
    """So many random bytes that nobody was given before, this process's forked children included."""
    global _left
    with _lock:
        if len(_left) < count:
            _left = secrets.token_bytes(max(AT_ONCE, count))
        taken, _left = _left[:count], _left[count:]
    return taken


def _forget() -> None:
    """In a forked child: what the parent has read is the parent's."""
    global _left, _lock
    _lock = threading.Lock()  # another thread may have held it in the parent
    _left = b""


os.register_at_fork(after_in_child=_forget)
