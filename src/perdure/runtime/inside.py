"""Open transactions that this thread is in, as far as they are known: that of a step, and those shown to us.

Whoever writes to the same SQLite file from inside one of them, by another connection, waits for a commit that waits for
it. So such a call is refused at once.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from typing import Any, Final

step: Final[ContextVar[str]] = ContextVar("perdure_transaction", default="")
"""The id of the transaction step whose function is running."""


class _Shown(threading.local):
    connections: tuple[Any, ...] = ()


_shown: Final = _Shown()


def note(connection: Any) -> None:
    """The caller has shown a connection of its own; it is remembered while it has a transaction open."""
    others = [known for known in _shown.connections if known is not connection and _is_open(known)]
    _shown.connections = (*others, connection) if _is_open(connection) else tuple(others)


def refuse(what: str) -> None:
    """Raise if the caller would wait for itself."""
    inside = step.get()
    if inside:
        raise RuntimeError(
            f'{what} was called inside the transaction of step "{inside}". It would wait for a commit that waits for '
            "it, and would not be undone with the step. Do it in the workflow, behind the step, or in the step's own "
            "transaction: engine.sync.options(connection=connection)."
        )
    if not _shown.connections:
        return
    _shown.connections = tuple(known for known in _shown.connections if _is_open(known))
    if _shown.connections:
        raise RuntimeError(
            f"{what} was called inside an open transaction of the store's own database. SQLite has one writer, and "
            "this call would wait for the commit that comes after it. Commit first, or do both in one transaction: "
            "options(connection=connection)."
        )


def _is_open(connection: Any) -> bool:
    """Whether it holds, or may hold, the only writer of a SQLite file; other databases do not make anybody wait."""
    try:
        return bool(getattr(connection, "in_transaction", False))
    except Exception:
        return False  # it is closed
