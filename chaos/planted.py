"""Bugs planted on purpose into the processes of a scenario (`--planted NAME`): the audit has to name each of them."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable
from typing import Any, Final


def _same_epoch() -> None:
    """A claim does not raise the epoch."""
    from perdure.stores.sqlite.queries import SQL

    SQL["take"] = SQL["take"].replace("epoch = epoch + 1", "epoch = epoch")


def _not_handed_back() -> None:
    """The runs of the dead are not found."""
    from perdure.stores.sqlite.queries import SQL

    SQL["orphans"] = "SELECT '[]' WHERE ? > 0"


def _mail_stays_unread() -> None:
    """What was consumed is not marked so."""
    from perdure.stores.sqlite import writing

    for size, text in writing.consume_mail._text.items():
        writing.consume_mail._text[size] = text.replace("SET unread = 0", "SET unread = 1")


def _acknowledged_too_early() -> None:
    """One commit in twenty is answered for and rolled back."""
    from perdure.stores.sqlite.store import SQLiteStore

    opened: Callable[..., sqlite3.Connection] = SQLiteStore._opened_writer

    class Liar:
        def __init__(self, db: sqlite3.Connection) -> None:
            self._db = db

        def __getattr__(self, name: str) -> Any:
            return getattr(self._db, name)

        def execute(self, text: str, *parameters: Any) -> sqlite3.Cursor:
            lies = text == "COMMIT" and random.random() < 0.05
            return self._db.execute("ROLLBACK" if lies else text, *parameters)

    SQLiteStore._opened_writer = lambda self: Liar(opened(self))  # type: ignore[method-assign, assignment, return-value]


def _early_timers() -> None:
    """A worker takes its own clock, which is fast, for the store's."""
    from perdure.worker.shift import Shift

    init = Shift.__init__

    def fast(self: Shift, *args: Any, **named: Any) -> None:
        init(self, *args, **named)
        self.now = lambda: self.store.now() + 15_000

    Shift.__init__ = fast  # type: ignore[method-assign]


PLANTED: Final[dict[str, Callable[[], None]]] = {
    "same-epoch": _same_epoch,
    "not-handed-back": _not_handed_back,
    "mail-stays-unread": _mail_stays_unread,
    "acknowledged-too-early": _acknowledged_too_early,
    "early-timers": _early_timers,
}
