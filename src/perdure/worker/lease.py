"""The right to take turns, as this process knows it: confirmed by heartbeats, judged by its own clock.

The store's clock decides when a lease has run out; the fence decides whether a commit counts. This is only the
worker's own caution: no step is begun unless a heartbeat was confirmed within the TTL minus a margin.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from perdure.core.errors import StoreError
from perdure.stores.contract import Store

log = logging.getLogger("perdure.worker")

MARGIN: Final = 0.2
"""The part of the TTL that is kept as a margin."""


def clock_with_suspend() -> float:
    """A monotonic clock that goes on while the machine sleeps, where there is one."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


HANGS: Final = 2
"""Times the TTL for which a loop may not answer before its worker counts as hung."""


class Heartbeat:
    """Says again and again that an incarnation lives. `step` is one beat; a thread of its own calls it.

    ask_loop: has the worker's loop call something soon; while it owes that for too long, there is no beat.
    """

    def __init__(
        self,
        store: Store,
        incarnation: str,
        *,
        ttl: float,
        dead: Callable[[], None],
        clock: Callable[[], float] = clock_with_suspend,
        ask_loop: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self.store = store
        self.incarnation = incarnation
        self.ttl = ttl
        self.is_dead = False
        self._dead = dead
        self._clock = clock
        self._confirmed = clock()
        self._ask_loop = ask_loop
        self._asked_at: float | None = None  # since when the loop owes an answer
        self._stepped_at = clock()
        self._stepping = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def valid(self) -> bool:
        """Whether a step may be begun: the lease was confirmed recently enough."""
        return not self.is_dead and self._clock() - self._confirmed < self.ttl * (1 - MARGIN)

    @property
    def hangs(self) -> bool:
        """Whether the loop, without which nothing of this worker moves, has not answered for so long."""
        return self._asked_at is not None and self._clock() - self._asked_at > HANGS * self.ttl

    def step(self) -> None:
        """One beat; tells `dead` if the incarnation has been reaped. From any thread, one after the other.

        Nothing once it was stopped.
        """
        with self._stepping:
            if not self._stop.is_set():
                self._step()

    def _step(self) -> None:
        now = self._clock()
        if self._asked_at is not None and now - self._stepped_at > self.ttl:
            # This process was stopped, or its machine slept: not only the loop has not answered.
            self._asked_at = now
        self._stepped_at = now
        if self.hangs:
            # A heart that goes on beating would keep this worker's runs from those who could go on with them.
            log.error(
                "this worker's loop has not answered for %.0f s: something on it does not return, perhaps a blocking "
                "call in an async step. Its runs go to others until it does. Make that function a plain one.",
                self._clock() - (self._asked_at or 0.0),
            )
            return
        if self._ask_loop is not None and self._asked_at is None:
            self._asked_at = self._clock()
            self._ask_loop(self._answered)
        asked = self._clock()
        try:
            lease = self.store.heartbeat(self.incarnation)
        except StoreError as error:
            log.warning("a heartbeat failed: %s", error)
            return
        except Exception:
            # Without a heart this worker would be taken for dead, and never know.
            log.exception("a heartbeat failed")
            return
        if lease is None:
            if not self.is_dead:
                self.is_dead = True
                self._dead()
        else:
            # Counted from before the question: the answer may have been slow.
            self._confirmed = asked

    def _answered(self) -> None:
        """Called by the loop."""
        self._asked_at = None

    def start(self) -> None:
        """Beat from a thread, three times in a TTL."""
        self._thread = threading.Thread(target=self._serve, name="perdure-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop beating. Twice is once."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5)

    def _serve(self) -> None:
        while not self._stop.wait(self.ttl / 3):
            if self.is_dead:
                return
            self.step()
