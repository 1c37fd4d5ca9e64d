"""Being told: one connection of a process that LISTENs, a thread that waits on it, and a bell for those who wait.

What is written is announced after its transaction, never in it: NOTIFY makes committing transactions wait for each
other. One notification says only that something may have changed, and one goes out for all that was written while the
last one was on its way. Losing every one costs latency only.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import psycopg
from psycopg import sql

log = logging.getLogger(__name__)

SPACING: Final = 0.005
"""Seconds between two notifications of one process."""


class Bell:
    """Counts what somebody of this process may wait for."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = 0

    def ring(self) -> None:
        with self.changed:
            self.count += 1
            self.changed.notify_all()


class Listener:
    """A thread that rings `bell` when another process has written, and tells others when we have.

    connect: makes a direct connection. channel: the schema's. changed: called after each new connection, and when one
    that was lost could not be made again at once, in the listener's thread; the connection is also what others know
    this process to live by, so its loss is seen at once.
    """

    def __init__(
        self,
        connect: Callable[[], psycopg.Connection[Any]],
        channel: str,
        bell: Bell,
        *,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._connect = connect
        self._changed = changed
        self._channel = channel
        self._bell = bell
        self._told = False
        self._heard = False
        self._own = 0
        self._stopping = False
        self.backend: int | None = None
        """The server's process that serves this connection, while there is one: others' notifications arrive then."""
        self.lost_at: float | None = None
        """When the connection was lost last, by `time.monotonic`."""
        self.first = threading.Event()
        """Set when it has been connected once."""
        self._wake_in, self._wake_out = os.pipe()
        os.set_blocking(self._wake_out, False)
        os.set_blocking(self._wake_in, False)
        self._thread = threading.Thread(target=self._serve, name="perdure-listener", daemon=True)
        self._thread.start()

    def tell(self) -> None:
        """Something was written that others may wait for. Cheap, from any thread, as often as you like."""
        if not self._told:
            self._told = True
            self._poke()

    def stop(self) -> None:
        """End, and give the connection back. Twice is once."""
        if not self._stopping:
            self._stopping = True
            self._poke()
            self._thread.join(5)
            os.close(self._wake_in)
            os.close(self._wake_out)

    def _poke(self) -> None:
        try:
            os.write(self._wake_out, b"!")
        except OSError:
            pass  # full: it is awake anyway

    def _serve(self) -> None:
        pause = 0.05
        missed = False
        while not self._stopping:
            try:
                with self._connect() as db:
                    db.add_notify_handler(self._notified)
                    db.execute("SELECT set_config('synchronous_commit', 'off', false)")
                    db.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._channel)))
                    self._own = self.backend = db.info.backend_pid
                    self._changed()
                    self.first.set()
                    pause = 0.05
                    # What came while nobody listened.
                    self._bell.ring()
                    self._listen(db)
            except Exception as error:
                if self.backend is not None:
                    log.warning("notifications are lost for a while, and polling serves instead: %s", error)
                    self.lost_at = time.monotonic()
                    missed = True
                elif missed:
                    missed = False
                    # The other connections may be there: the lease says that this process lives.
                    with contextlib.suppress(Exception):
                        self._changed()
                self.backend = None
                self._pause(pause)
                # 50 ms doubling to 1 s: a server in trouble is not hammered.
                pause = min(pause * 2, 1.0)
        self.backend = None

    def _listen(self, db: psycopg.Connection[Any]) -> None:
        poll = select.poll()
        poll.register(db.fileno(), select.POLLIN)
        poll.register(self._wake_in, select.POLLIN)
        while not self._stopping:
            self._take(db)
            # What was to be told when the last connection was lost waits for no one to say so again.
            if not (self._told or self._heard):
                poll.poll()
            self._drain()
            db.pgconn.consume_input()
            self._take(db)
            if self._told:
                self._told = False
                try:
                    db.execute("SELECT pg_notify(%s, '')", [self._channel])
                except BaseException:
                    self._told = True
                    raise
                self._pause(SPACING)
            if self._heard:
                self._heard = False
                self._bell.ring()

    def _take(self, db: psycopg.Connection[Any]) -> None:
        """Those that have been read."""
        while (notice := db.pgconn.notifies()) is not None:
            self._heard = self._heard or notice.be_pid != self._own

    def _notified(self, notice: psycopg.Notify) -> None:
        """One that came while we were telling."""
        self._heard = self._heard or notice.pid != self._own

    def _pause(self, seconds: float) -> None:
        if not self._stopping:
            threading.Event().wait(seconds)

    def _drain(self) -> None:
        try:
            while os.read(self._wake_in, 4096):
                pass
        except BlockingIOError:
            pass
