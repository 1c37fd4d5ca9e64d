"""Finds work for a shift, and keeps house: two small objects with `step`, called by threads or by a simulation."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from msgspec.structs import replace

from perdure.core import events as ev
from perdure.core import stored
from perdure.core.errors import PerdureError, StoreError
from perdure.core.status import Status
from perdure.core.turn import Batch, Claim, Head, Key, Turn
from perdure.stores.contract import Store
from perdure.worker.ending import STRIKES, end_without_code, what_it_did
from perdure.worker.residents import fence_of, put_aside
from perdure.worker.shift import Shift

log = logging.getLogger("perdure.worker")

SAFETY_POLL: Final = 1.0
"""Seconds between two looks when no hint comes."""
MOST_CLAIMED: Final = 200
"""Runs in one claim: a batch that shares a transaction, and leaves some for others."""
PATIENCE: Final = 5.0
"""Seconds of steady load after which a run that may only be executed alone is made way for."""
MOST_LOOKED_AT: Final = 1000
"""Runs in memory of which one round asks whether they have ended elsewhere."""


class Watcher:
    """Waits for a hint, then claims when there is room and reads mail for the runs owned here."""

    def __init__(self, store: Store, shift: Shift) -> None:
        self.store = store
        self.shift = shift
        self._more = False
        self._busy_since: float | None = None
        self._unreadable: list[tuple[Head, Exception]] = []

    def step(self, timeout: float = SAFETY_POLL) -> int:
        """Wait at most `timeout`, then look once; how much was found."""
        shift = self.shift
        self.store.wait(shift.incarnation, shift.settings.queues, 0 if self._more else timeout)
        if shift.closed:
            return 0
        heads = self._claim()
        if heads:
            # At once: a look for mail that fails must not lose them.
            shift._soon(shift.received, heads, ())
        owns = shift.residents or shift.activities
        mail = self.store.mail(shift.incarnation) if owns and self.store.mail_is_likely(shift.incarnation) else []
        if mail:
            shift._soon(shift.received, (), mail)
        while self._unreadable:
            head, error = self._unreadable[-1]
            log.error("run %s cannot be read: %s", head.row.id, error)
            row = head.row
            aside = put_aside(fence_of(row), row.waits, str(error), now=self.store.now(), turn_id=shift.turn_id())
            self.store.write(Batch(turns=[aside]))
            self._unreadable.pop()
        return len(heads) + len(mail)

    def _claim(self) -> list[tuple[Head, Sequence[ev.Event]]]:
        shift = self.shift
        self._more = False
        # Said before it is looked at: what is freed from now on wakes us.
        shift.wants_room = True
        # What was claimed and is not received yet executes in a moment.
        busy = bool(shift.executing or len(shift.residents) > len(shift.parked) or shift.claiming > shift.taken)
        # A run under suspicion is executed with nothing beside it.
        suspects = shift.settings.suspects
        claim = Claim(
            incarnation=shift.incarnation,
            namespace=shift.settings.namespace,
            queues=shift.settings.queues,
            workflows=list(shift.registry.workflows),
            activities=list(shift.registry.activities),
            alone=suspects == "only" or (suspects == "here" and not busy),
            only_suspects=suspects == "only",
        )
        if suspects == "here":
            self._make_way(busy, claim)
        room = min(shift.room, MOST_CLAIMED)
        if room <= 0:
            return []
        shift.claiming += room
        found: list[tuple[Head, Sequence[ev.Event]]] = []
        try:
            heads = self.store.claim(replace(claim, limit=room))
            texts = self._histories([head.row.key for head in heads if head.row.kind == "workflow"])
            for head in heads:
                key = head.row.key
                events: Sequence[ev.Event] = ()
                try:
                    if head.row.kind == "workflow":
                        events = [stored.decode(text) for text in texts.get(key) or self.store.history(key)]
                except Exception as error:
                    self._unreadable.append((head, error))
                else:
                    found.append((head, events))
                    if head.row.strikes >= 2:
                        # At once: the next claim may come before this one is received.
                        shift.alone_with = head.row.key
            # All that there was room for: there may be more.
            shift.wants_room = len(heads) == room
            self._more = shift.wants_room and room == MOST_CLAIMED
            return found
        finally:
            # What was claimed counts until it is received.
            shift.claiming -= room - len(found)

    def _histories(self, keys: Sequence[Key]) -> Mapping[Key, Sequence[str]]:
        """Those of claimed runs, so within the budget of bytes; what cannot be read together is missing."""
        try:
            return self.store.histories(keys) if len(keys) > 1 else {}
        except PerdureError as error:
            log.debug("%d histories could not be read together: %s", len(keys), error)
            return {}

    def _make_way(self, busy: bool, claim: Claim) -> None:
        """Under steady load a worker is never idle by itself: after a while it looks who may only be executed alone."""
        shift = self.shift
        now = shift.monotonic()
        if not busy:
            self._busy_since = None
            shift.makes_way = False
        elif self._busy_since is None:
            self._busy_since = now
        elif not shift.makes_way and now - self._busy_since > PATIENCE:
            self._busy_since = now
            shift.makes_way = self.store.suspects(claim)


LISTEN: Final = 0.25
"""Seconds after which a thread that rests asks again how long."""
AT_WORK: Final = 0.5
"""Seconds between two rounds at most, while runs are at work here: so others may be at work too, and may die."""


class Housekeeper:
    """Hands dead workers' runs back, ends runs that are out of time, names steps that run long."""

    def __init__(self, store: Store, shift: Shift) -> None:
        self.store = store
        self.shift = shift
        self._place = 0
        self._account_at = shift.monotonic() + shift.settings.lease
        self._strays: dict[int, tuple[int, int]] = {}

    def pause(self) -> float:
        """Seconds until the next round."""
        shift = self.shift
        if shift.overdue_at is not None and shift.overdue_at <= self.store.now():
            return 0
        at_work = shift.executing or len(shift.residents) > len(shift.parked)
        return min(shift.settings.lease / 3, self.store.rounds, AT_WORK if at_work else math.inf)

    def step(self) -> int:
        """One round; how many runs it moved."""
        self.shift.overdue_at = None  # what it leaves is left to the ordinary rounds
        heart = self.shift.heartbeat
        if heart is not None and not heart.valid:
            # Who was stopped for a while lives again, and says so before it looks for the dead.
            heart.step()
        reaped = self.store.reap()
        if reaped.workers or reaped.runs:
            self.shift.reaped_at = self.shift.monotonic()
        if reaped.runs:
            log.info("%d runs of %d dead workers were handed back", reaped.runs, reaped.workers)
            self.store.wake()
        moved = reaped.runs
        for row in self.store.overdue():
            # It is here by the store's clock, of which ours is a lower bound: without three strikes, or with them
            # written down already, it is here for its timeout.
            late = row.deadline_at is not None and row.deadline_at <= self.store.now()
            if late or row.strikes < STRIKES or row.status == Status.QUARANTINED:
                status, reason = "timed_out", "It did not end before its timeout."
            else:
                status, reason = "quarantined", what_it_did(row)
            try:
                turn = end_without_code(self.store, row, status, reason=reason, turn_id=self.shift.turn_id())
                self.store.write(Batch(turns=[turn]))
                moved += 1
            except StoreError as error:
                if error.retryable:
                    raise
                log.error("run %s cannot be ended as %s: %s", row.id, status, error)
        self._look_for_ended()
        moved += self._hand_strays_back()
        self.shift._soon(self._look_around)
        return moved

    def _look_for_ended(self) -> None:
        """Find runs in memory here that somebody ended from outside: nothing else would tell us of them."""
        keys = [*self.shift.residents, *self.shift.activities]
        self._place = self._place if self._place < len(keys) else 0
        looked = keys[self._place : self._place + MOST_LOOKED_AT]
        self._place += MOST_LOOKED_AT
        ended = self.store.ended(looked) if looked else []
        if ended:
            self.shift._soon(self.shift.ended_outside, self.store.rows(ended))

    def _hand_strays_back(self) -> int:
        """Find runs that are ours and not in memory, once in a lease: the answer to a claim or start was lost.

        Nobody else would ever take them, because we live. One that is seen twice goes back, by a fenced turn: so a
        late answer does no harm.
        """
        shift = self.shift
        now = shift.monotonic()
        if now < self._account_at and not self._strays and not shift.has_strays:
            return 0
        self._account_at = now + shift.settings.lease
        shift.has_strays = False
        unknown = [
            key
            for key in self.store.owned(shift.incarnation)
            if key not in shift.residents and key not in shift.activities
        ]
        # One whose row is locked by a step's transaction comes later: it would hold up whatever is written.
        locked = shift.locked.intersection(unknown)
        if locked:
            shift.has_strays = True
        unknown = [key for key in unknown if key not in locked]
        rows = [row for row in self.store.rows(unknown[:MOST_LOOKED_AT]) if row.owner == shift.incarnation]
        seen, self._strays = self._strays, {row.key: (row.epoch, row.version) for row in rows}
        turns = [
            Turn(
                run=row.key,
                owner=row.owner,
                epoch=row.epoch,
                version=row.version,
                last=row.turn,
                id=shift.turn_id(),
                first_seq=row.history_events + 1,
                status="ready" if row.status == "running" else row.status,
                wake_at=row.wake_at,
                waits=row.waits,
                release=True,
            )
            for row in rows
            if seen.get(row.key) == (row.epoch, row.version)
        ]
        if turns:
            log.info("%d runs whose claim or start was not answered were handed back", len(turns))
            self.store.write(Batch(turns=turns))
        return len(turns)

    def _look_around(self) -> None:
        shift = self.shift
        shift.look_at_clock()
        now = shift.now()
        for resident in list(shift.residents.values()):
            if resident.deadline_at is not None and resident.deadline_at > now:
                shift.until(resident.deadline_at)
            if resident.executions:
                shift.safely(resident, resident.name_long_steps)


class Serving:
    """A thread that calls a step again and again until it is stopped; trouble with the store slows it down.

    pause: how many seconds to wait after each; asked again while it waits.
    """

    def __init__(self, name: str, step: Callable[[], Any], *, pause: Callable[[], float] | None = None) -> None:
        self._step = step
        self._pause = pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the step that is running; does not wait. Twice is once."""
        self._stop.set()

    def join(self, timeout: float) -> None:
        """Wait for its end."""
        self._thread.join(timeout)

    def _rest(self, pause: Callable[[], float]) -> None:
        """Wait as long as `pause` says, and listen whether it says otherwise now."""
        began = time.monotonic()
        # Threads that began together do not wake together for ever.
        spread = random.uniform(0.9, 1.1)
        while not self._stop.is_set():
            left = began + pause() * spread - time.monotonic()
            if left <= 0:
                return
            self._stop.wait(min(left, LISTEN))

    def _serve(self) -> None:
        failures = 0
        while not self._stop.is_set():
            try:
                self._step()
                failures = 0
                if self._pause is not None:
                    self._rest(self._pause)
            except PerdureError as error:
                if self._stop.is_set():
                    return
                failures += 1
                if failures == 1:
                    log.warning("%s met trouble with the store and tries again: %s", self._thread.name, error)
                # 50 ms doubling to 5 s.
                self._stop.wait(min(0.05 * 2 ** min(failures, 10), 5.0))
            except Exception:
                if self._stop.is_set():
                    return
                log.exception("%s failed and goes on", self._thread.name)
                self._stop.wait(1.0)
