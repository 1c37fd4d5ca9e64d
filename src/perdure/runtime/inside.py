"""Open transactions that this thread is in, as far as they are known: that of a step, and those shown to us.

Whoever writes to the same SQLite file from inside one of them, by another connection, waits for a commit that waits for
it. So such a call is refused at once.
"""

from __future__ import annotations

import threading
from asyncio.events import _get_running_loop
from contextvars import ContextVar
from typing import Any, Final

from perdure.runtime.loop import RunLoop

step: Final[ContextVar[str]] = ContextVar("perdure_transaction", default="")
"""The id of the transaction step whose function is running."""


class _Shown(threading.local):
    connections: tuple[Any, ...] = ()


_shown: Final = _Shown()


class _Body(threading.local):
    waited_for_by = 0
    line: Any = None


body: Final = _Body()
"""Of this thread: the line of the `def` workflow whose code runs here, and `waited_for_by`, the thread that waits for
it; else None and 0."""


def other_body(line: Any) -> str:
    """The id of the run in whose own code this thread is, if it is another than that of `line`, and lives."""
    loop = _get_running_loop()
    here = loop.line if type(loop) is RunLoop else body.line
    return "" if here is None or here is line or here.dead else str(here.run_id)


def refuse_in_body(thread: int | None) -> None:
    """Raise if a workflow's own code is about to wait for a thread, its worker's loop, that waits for it.

    thread: that of the loop; None if it does not tell.
    """
    waiting = threading.get_ident() if type(_get_running_loop()) is RunLoop else body.waited_for_by
    if waiting and thread in (None, waiting):
        raise RuntimeError(
            "A blocking call of an engine was made in the code of a workflow that it executes. It would wait for a "
            "loop that waits for it, and a replay would do it again. Start children with ctx.step.run_workflow, and "
            "do all else in a step: ctx.step.run(id, function)."
        )


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
