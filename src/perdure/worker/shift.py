"""One life of a worker: announces itself, claims, keeps runs in memory, executes their steps, and goes in peace.

Everything that changes state happens on one thread, that of `loop`. Around it stand small objects with a `step`
or `flush` (committer, watcher, heartbeat, housekeeper), which threads call in a process and choices call in a
simulation; they hand what they found to `received` and `answered` here.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import platform
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final, NamedTuple

from perdure.core import codec, failure, stored
from perdure.core import events as ev
from perdure.core.errors import NO_THREAD, PerdureError, StoreError
from perdure.core.limits import Limits, limits_of
from perdure.core.match import Op
from perdure.core.retry import micros
from perdure.core.signature import ANY_CALL, Signature, announced_signature, announced_timeout
from perdure.core.turn import (
    Announced,
    Announcement,
    Head,
    Mail,
    ParentLink,
    Row,
    Start,
    Turn,
)
from perdure.runtime.context import ThisRun
from perdure.runtime.drive_sync import BodyThreads, SyncDriver
from perdure.runtime.registry import Registry
from perdure.stores.contract import Store
from perdure.stores.refused import taken
from perdure.worker import transacting
from perdure.worker.activities import ActivityRun
from perdure.worker.committer import Committer
from perdure.worker.executing import ASK_AGAIN, OURS, Execution, Executor, soon
from perdure.worker.lease import Heartbeat
from perdure.worker.remote_end import NO_POLICY, StartPolicy, policy_of, policy_text
from perdure.worker.residents import Fence, Outcome, Resident, fence_of, put_aside
from perdure.worker.watchdog import Watched

log = logging.getLogger("perdure.worker")

LANGUAGE: Final = "python" + ".".join(platform.python_version_tuple()[:2])
KEY_LASTS: Final = 7 * 86_400_000_000
"""Microseconds for which the idempotency key of a child is taken, as long as that of a start."""
KNOWN_FOR: Final = 10.0
"""Seconds for which an announcement is believed: a deploy may have changed it."""
LOOK_AGAIN: Final = 5.0
"""Seconds after which the store's clock is asked again whether a timer has come: ours does not count what it slept."""
FEW_TIMERS: Final = 1000
"""So many timers of runs that have gone are no burden."""
UNWIND_AFTER: Final = 1.0
"""Seconds after which a sync body that waits gives its thread back."""


class Elsewhere(NamedTuple):
    """A workflow whose code is in other workers."""

    queue: str
    timeout: timedelta | None
    signature: Signature


class Settings:
    """How a worker works; the names and defaults of `Engine`.

    suspects: who executes a run that killed two workers. "here": this process, when nothing else of its executes;
    "apart": a child process of its own; "only": this process is that child, and takes nothing else.
    """

    def __init__(
        self,
        *,
        namespace: str = "default",
        queues: Sequence[str] = ("default",),
        concurrency: int = 256,
        threads: int = 32,
        resident: int = 10_000,
        lease: float = 15,
        limits: Limits | None = None,
        name: str | None = None,
    ) -> None:
        self.namespace = namespace
        self.queues = tuple(queues)
        self.concurrency = concurrency
        self.threads = threads
        self.resident = resident
        self.lease = lease
        self.limits = limits_of(limits)
        self.name = name or f"{platform.node() or 'worker'}"
        self.suspects = "here"


class Shift:
    """See the module.

    loop: the ordinary loop, or a simulated one. kick: called when the committer has something to write.
    ended_run: told of each run that ended here: (key, closing turn).
    """

    def __init__(
        self,
        store: Store,
        registry: Registry,
        settings: Settings,
        loop: Any,
        *,
        kick: Callable[[], None],
        monotonic: Callable[[], float] = time.monotonic,
        random_hex: Callable[[int], str] = secrets.token_hex,
        spread: Callable[[], float] | None = None,
        ended_run: Callable[[int, Turn | Row], None] = lambda key, end: None,
        read: Callable[[Callable[[], Any], Callable[[Any], None]], None] | None = None,
    ) -> None:
        self.store = store
        self.registry = registry
        self.settings = settings
        self.limits = settings.limits
        self.loop = loop
        self.monotonic = monotonic
        self.random_hex = random_hex
        self.spread = spread if spread is not None else _system_random.random
        self.now = store.now
        self.threads = BodyThreads(settings.threads)
        self.executor = Executor(
            loop, self.threads, self.failed, may_begin=lambda: self.heartbeat is None or self.heartbeat.valid
        )
        self.residents: dict[int, Resident] = {}
        self.parked: set[int] = set()
        self.activities: dict[int, ActivityRun] = {}
        self.executing = 0
        self.draining = False
        self.reaped_at = self.monotonic()  # when a dead worker was found here, or this one began
        self.closed = False
        self.incarnation = ""
        self.heartbeat: Heartbeat | None = None
        self.committer = Committer(
            store, self._answer, incarnation=lambda: self.incarnation, owns=self.residents.__contains__
        )
        self.ended_run = ended_run
        self.lease_sure = False
        self.answered_at = 0
        self.watched = Watched()
        # Each is counted by one thread: what was claimed by the watcher, what was received of it by the loop.
        self.claiming = 0
        self.taken = 0
        self.alone_with: int | None = None
        # Nothing is taken until nothing executes: a run that may only be executed alone has waited long enough.
        self.makes_way = False
        # Whether runs were dropped here that may still be ours.
        self.has_strays = False
        # When the first of the runs here will have taken too long.
        self.overdue_at: int | None = None
        # The attempts of transaction steps whose transactions are open, or about to be: they lock their runs' rows.
        self.transacting: set[transacting.Attempt] = set()
        self._announced: dict[str, Announced] = {}
        self._announced_at = 0.0
        self.wants_room = False
        self._kick = kick
        self._kicked = False
        self._read = read if read is not None else self._read_in_thread
        # Counted by `next`, which several threads may call.
        self._turns = itertools.count(1)
        self._queue: deque[Callable[[], None]] = deque()
        self._held: list[Callable[[], None]] = []
        self._timers: list[tuple[int, int]] = []  # when, and whose: only that counts which the run still knows
        self._timer: Any = None
        self._timer_for: int | None = None

    # --- life ------------------------------------------------------------------------------------------

    def announcement(self) -> Announcement:
        """A new incarnation with everything it serves."""
        served = [
            Announced(name=w.name, kind="workflow", queue=w.queue, signature=_announced(w.signature, w.timeout))
            for w in self.registry.workflows.values()
        ] + [
            Announced(
                name=a.name, kind="activity", queue=a.queue or "default", signature=_announced(a.signature, a.timeout)
            )
            for a in self.registry.activities.values()
        ]
        return Announcement(
            incarnation=self.random_hex(16),
            name=self.settings.name,
            namespace=self.settings.namespace,
            queues=self.settings.queues,
            serves=served,
            ttl=int(self.settings.lease * 1_000_000),
        )

    def begin(self, announcement: Announcement) -> None:
        """Live as this incarnation, once the store knows it."""
        self.incarnation = announcement.incarnation
        self.heartbeat = Heartbeat(
            self.store,
            announcement.incarnation,
            ttl=self.settings.lease,
            dead=lambda: self._soon(self.died),
            clock=self.monotonic if self.monotonic is not time.monotonic else _default_clock,
            ask_loop=self._soon,
        )

    def died(self) -> None:
        """This incarnation was reaped: drop everything, its runs are others' now, and begin anew."""
        log.warning("this worker was taken for dead, its runs went to others; it goes on as a new incarnation")
        for resident in list(self.residents.values()):
            self.dropped(resident)
        for activity in list(self.activities.values()):
            activity.leave()
        if not self.closed and not self.draining:
            announcement = self.announcement()
            self._read(lambda: self.store.announce(announcement), lambda lease: self._reborn(announcement, lease))

    def _reborn(self, announcement: Announcement, lease: Any) -> None:
        if isinstance(lease, StoreError):
            self.loop.call_later(1.0, self.died)
            return
        threaded = self.heartbeat is not None and self.heartbeat._thread is not None
        self.begin(announcement)
        if threaded and self.heartbeat is not None:
            self.heartbeat.start()

    @property
    def room(self) -> int:
        """How many runs may be claimed now."""
        if self.draining or self.closed or self.alone_with is not None or self.makes_way:
            return 0
        most = self.settings.concurrency * 4
        active = len(self.residents) - len(self.parked) + len(self.activities) + self.claiming - self.taken
        return max(most - active, 0)

    @property
    def idle(self) -> bool:
        """Whether nothing executes and nothing waits to be written: also not for a lock, or to be read again."""
        return (
            self.executing == 0
            and self.committer.unanswered == 0
            and not any(resident.owes for resident in self.residents.values())
            and not any(activity.flight is not None for activity in self.activities.values())
        )

    def drain(self) -> None:
        """Begin nothing new: no claim, no step. What is in flight may end; what only waits goes to others at once."""
        if self.draining:
            return
        self.draining = True
        everything: list[Resident | ActivityRun] = [*self.residents.values(), *self.activities.values()]
        for one in everything:
            self.safely(one, one.settle)

    def close(self) -> None:
        """Leave: all runs leave memory. Twice is once."""
        if self.closed:
            return
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        for resident in list(self.residents.values()):
            resident.leave()
        self.residents.clear()
        self.parked.clear()
        for activity in list(self.activities.values()):
            activity.leave()

    # --- what others bring -----------------------------------------------------------------------------

    def received(self, heads: Sequence[tuple[Head, Sequence[ev.Event]]], mail: Sequence[Mail]) -> None:
        """Claimed runs with their histories, and unread mail of runs owned here."""
        self.taken += len(heads)
        for head, events in heads:
            if self.closed:
                break
            if head.row.owner == self.incarnation:
                self._take_up(head, events)
            elif self.alone_with == head.row.key:
                self.no_longer_alone()
        for message in mail:
            owned = self.residents.get(message.run) or self.activities.get(message.run)
            if owned is not None:
                self.safely(owned, owned.post, message)

    def _take_up(self, head: Head, events: Sequence[ev.Event]) -> None:
        """Bring a claimed run into memory; one that cannot be is put aside, and costs its neighbours nothing."""
        row = head.row
        # Claimed again while an earlier claim of it is still here: that one's right is gone.
        self._let_go(row.key)
        if row.strikes >= 2:
            self.alone_with = row.key
        try:
            if row.kind == "activity":
                ActivityRun(self, row, head.mail).begin()
                return
            resident = Resident.of_row(self, row)
            self.residents[row.key] = resident
            self.until(row.deadline_at)
            resident.begin(events, head.mail)
        except Exception as error:
            log.exception("run %s cannot be taken up", row.id)
            self._let_go(row.key)
            if self.alone_with == row.key:
                self.no_longer_alone()
            self._put_aside(fence_of(row), row.waits, row.id, error)

    def _put_aside(self, fence: Fence, waits: str, id: str, error: BaseException) -> None:
        reason = str(error)
        if not isinstance(error, PerdureError):
            what = f"{type(error).__name__}: {error}".rstrip(": ")
            reason = (
                f"Run {id} was put aside because its worker failed at it, not its own code ({what}). It is tried again "
                "from its last commit, here or elsewhere."
            )
        turn = put_aside(fence, waits, reason, now=self.now(), turn_id=self.turn_id())
        self.committer.turn(turn, lambda verdict: None)
        self.kick()

    def _let_go(self, key: int) -> None:
        """Drop whatever is in memory of a run."""
        resident, activity = self.residents.get(key), self.activities.get(key)
        if resident is not None:
            self.dropped(resident)
        if activity is not None:
            activity.leave()

    def begun(self, start: Start, started: ev.Started, key: int, *, id: str, version: int, at: int) -> None:
        """A start of this process was written with this incarnation as its owner: no claim, no history to read."""
        if self.closed or start.owner != self.incarnation or key in self.residents:
            return
        this = ThisRun(
            id=id,
            generation=1,
            workflow=start.workflow,
            queue=start.queue,
            namespace=start.namespace,
            attempt=1,
            max_attempts=1,
            parent=None,
            root=id,
            created_micros=at,
        )
        resident = Resident(
            self,
            this,
            key=key,
            epoch=1,
            version=version,
            last="",
            seed=start.seed,
            input=start.input,
            deadline_at=start.deadline_at,
        )
        self.residents[key] = resident
        self.until(start.deadline_at)
        self.safely(resident, resident.live, started)

    def until(self, deadline_at: int | None) -> None:
        """A run here may take until then: a round of housekeeping is due as soon as it is over."""
        if deadline_at is not None and (self.overdue_at is None or deadline_at < self.overdue_at):
            self.overdue_at = deadline_at

    def _answer(self, answers: list[tuple[Callable[[Any], None], Any]], mail: Sequence[Mail]) -> None:
        if _get_running_loop() is self.loop:
            # The loop itself has written it.
            self._answered(answers, mail)
        else:
            self._soon(self._answered, answers, mail)

    def _answered(self, answers: list[tuple[Callable[[Any], None], Any]], mail: Sequence[Mail]) -> None:
        # Asked once for all steps that begin now: the margin is seconds, this is microseconds.
        self.lease_sure = self.heartbeat is not None and self.heartbeat.valid
        self.answered_at = self.now()
        try:
            for answer, verdict in answers:
                try:
                    answer(verdict)
                except OURS as error:
                    self.failed(getattr(answer, "__self__", None), error)
        finally:
            self.lease_sure = False
        if mail:
            self.received((), mail)

    def _soon(self, callback: Callable[..., Any], *args: Any) -> None:
        soon(self.loop, callback, *args)

    # --- what goes wrong here ---------------------------------------------------------------------------

    def safely(self, one: Resident | ActivityRun, act: Callable[..., None], *args: Any) -> None:
        """Have something done for one run; what goes wrong in it costs the others nothing."""
        try:
            act(*args)
        except OURS as error:
            self.failed(one, error)

    def failed(self, one: Any, error: BaseException) -> None:
        """Our own code failed at a run: a bug, or no memory. It is put aside, and tried again elsewhere or later.

        Nothing of it is lost: what was not acknowledged is done again from its last commit.
        """
        if not isinstance(one, (Resident, ActivityRun)):
            log.error("an answer could not be taken", exc_info=error)
            return
        log.error("run %s failed in this worker, not by its own code, and is put aside", one.id, exc_info=error)
        if one.gone:
            return
        # It stays ours if a turn that is under way comes first, or if this fails too.
        self.has_strays = True
        try:
            fence, waits = one.fence, one.waits
            self._let_go(one.key)
            if one.key not in self.locked:
                # Else whatever is written with it would wait for the step's function.
                self._put_aside(fence, waits, one.id, error)
        except Exception:
            log.exception("run %s could not be put aside, and is handed back", one.id)

    @property
    def locked(self) -> set[int]:
        """The runs whose rows are locked by a step's transaction."""
        return {attempt.resident.key for attempt in self.transacting.copy()}

    # --- what residents ask ----------------------------------------------------------------------------

    def kick(self) -> None:
        """There is something to write: tell the committer once, at the end of what the loop does now."""
        if not self._kicked:
            self._kicked = True
            self.loop.call_soon(self._kick_now)
        elif self.committer.gathered >= self.committer.early:
            # So many are worth a batch of their own: it is under way while the rest gathers.
            self._kick()

    def _kick_now(self) -> None:
        self._kicked = False
        self._kick()

    def turn_id(self) -> str:
        """Never repeated: the incarnation is random, the number counts."""
        return f"{self.incarnation}-{next(self._turns)}"

    def this_run(self, row: Row) -> ThisRun:
        """What a claimed run knows of itself."""
        return ThisRun(
            id=row.id,
            generation=row.generation,
            workflow=row.workflow,
            queue=row.queue,
            namespace=row.namespace,
            attempt=row.attempt,
            max_attempts=1,
            parent=row.parent_id,
            root=row.id if row.parent_id is None else policy_of(row.policy).root or row.id.split("/")[0],
            created_micros=row.created_at,
        )

    def start_facts(
        self,
        *,
        workflow: str,
        id: str,
        input: str,
        seed: str,
        kind: str = "workflow",
        queue: str = "default",
        timeout: timedelta | None = None,
        parent: ParentLink | None = None,
        parent_close: str = "cancel",
        policy: StartPolicy = NO_POLICY,
        idempotency_key: str | None = None,
    ) -> Start:
        """The start of a child or an activity, as the store takes it."""
        now = self.now()
        return Start(
            namespace=self.settings.namespace,
            id=id,
            workflow=workflow,
            input=input,
            digest=codec.digest128(input),
            seed=seed,
            event=stored.encode(ev.Started(at=now, seed=seed)) if kind == "workflow" else "",
            kind=kind,
            queue=queue,
            parent=parent,
            parent_close=parent_close,
            awaited=policy.awaited,
            deadline_at=None if timeout is None else now + micros(timeout),
            language=LANGUAGE,
            policy=policy_text(policy),
            idempotency_scope=workflow,
            idempotency_key=idempotency_key,
            idempotency_until=None if idempotency_key is None else now + KEY_LASTS,
        )

    def announced_of(self, workflow: str) -> Elsewhere:
        """What is known of a workflow whose code is elsewhere, as its workers announced it.

        Asked of the store on the loop, for the first of many and again after a while: a child whose start went to
        the wrong queue would wait there for ever.
        """
        now = self.monotonic()
        if workflow not in self._announced or now - self._announced_at > KNOWN_FOR:
            self._announced_at = now
            try:
                found = self.store.announced(self.settings.namespace)
                self._announced.update({each.name: each for each in found if each.kind == "workflow"})
            except StoreError as error:
                log.warning("what was announced could not be read, children by name use what is known: %s", error)
        known = self._announced.get(workflow)
        if known is None:
            return Elsewhere("default", None, ANY_CALL)
        return Elsewhere(
            known.queue, announced_timeout(known.signature), announced_signature(workflow, known.signature)
        )

    def should_release(self, resident: Resident) -> bool:
        """Whether a parking run is one too many to keep in memory."""
        # One that killed its worker twice, and waits, is taken up alone again.
        return len(self.residents) > self.settings.resident or self.draining or self.alone_with == resident.key

    def noted(self, resident: Resident) -> None:
        """A commit came back: count parked runs, let long-waiting sync bodies give their threads back."""
        if resident.status == "waiting":
            self.parked.add(resident.key)
            if self.wants_room:
                self.made_room()
            if resident.workflow.style == "sync":
                if self.threads.short:
                    resident.play.unwind()
                else:
                    self.loop.call_later(UNWIND_AFTER, self.safely, resident, self._unwind, resident, resident.version)
        else:
            self.parked.discard(resident.key)

    def _unwind(self, resident: Resident, version: int) -> None:
        if not resident.gone and resident.version == version and resident.parked:
            resident.play.unwind()

    def ended(self, resident: Resident, turn: Turn) -> None:
        """A run has ended, and its end is recorded."""
        self.dropped(resident)
        self.ended_run(resident.key, turn)

    def dropped(self, resident: Resident) -> None:
        """A run leaves memory."""
        if self.residents.get(resident.key) is resident:
            del self.residents[resident.key]
        self.parked.discard(resident.key)
        if self.alone_with == resident.key:
            self.no_longer_alone()
        if self.wants_room:
            self.made_room()
        resident.leave()

    def ended_outside(self, rows: Sequence[Row]) -> None:
        """Runs that somebody ended without their code (terminate, timeout): they leave memory, their steps end."""
        for row in rows:
            self.forget(row.key)
            self.ended_run(row.key, row)

    def forget(self, key: int) -> None:
        """What was here under this key has ended elsewhere."""
        if key in self.residents:
            self.dropped(self.residents[key])
        if key in self.activities:
            self.activities[key].leave()

    def made_room(self) -> None:
        """Work was left in the store for want of room: fetch it when a quarter is free, so that claims stay batches."""
        if self.room >= self.settings.concurrency:
            self.wants_room = False
            self.store.wake()

    def no_longer_alone(self) -> None:
        """The run under suspicion has made progress, or has left: there is room for others again."""
        self.alone_with = None
        self.store.wake()

    def lost(self, resident: Resident) -> None:
        """Somebody else has the run now: a normal day."""
        log.debug("run %s: its lease was lost, it is dropped", resident.this.id)
        self.dropped(resident)

    def read_again(self, resident: Resident, then: Callable[[Sequence[ev.Event], Sequence[Mail]], None]) -> None:
        """History and mailbox of a run, read outside the loop."""

        def read() -> Any:
            return [stored.decode(text) for text in self.store.history(resident.key)], self.store.mailbox(resident.key)

        def done(result: Any) -> None:
            if resident.gone:
                return
            if isinstance(result, StoreError):
                log.warning("run %s could not be read again: %s", resident.this.id, result)
                self.dropped(resident)
                self.has_strays = True
            else:
                self.safely(resident, then, *result)

        self._read(read, done)

    def see_that_it_began(self, parent: Resident, start: Start) -> None:
        """Nobody waits for this child, whose id or key was chosen: if another has it, at least the log says so."""

        def done(row: Row | StoreError | None) -> None:
            if not isinstance(row, StoreError) and (row is None or row.parent != parent.key):
                log.warning("run %s: its child was not started: %s", parent.id, taken(start))

        self._read(lambda: self.store.run(start.namespace, start.id), done)

    def _read_in_thread(self, read: Callable[[], Any], done: Callable[[Any], None]) -> None:
        def run() -> None:
            try:
                result = read()
            except StoreError as error:
                result = error
            except Exception as error:
                log.exception("a read failed")
                result = StoreError(f"A read of {self.store.url} failed with {type(error).__name__}: {error}.")
            self._soon(done, result)

        try:
            threading.Thread(target=run, name="perdure-reader", daemon=True).start()
        except NO_THREAD as error:
            log.warning("a read waits for a thread: %s", error)
            self.loop.call_later(ASK_AGAIN, self._read_in_thread, read, done)

    def watching(self, resident: Resident) -> Watched:
        """Arm the watchdog while a run's code is inside."""
        self.watched.resident = resident
        return self.watched

    # --- timers ----------------------------------------------------------------------------------------

    def wake_resident(self, resident: Resident, at: int) -> None:
        """Call its `tick` at that time."""
        heapq.heappush(self._timers, (at, resident.key))
        if len(self._timers) > 2 * len(self.residents) + FEW_TIMERS:
            self._timers = [(one.timer_at, key) for key, one in self.residents.items() if one.timer_at is not None]
            heapq.heapify(self._timers)
        if self._timer_for is None or at < self._timer_for:
            self._set_timer(at)

    def _set_timer(self, at: int) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_for = at
        # A few seconds at most: a clock that jumps meanwhile, or a machine that slept, is noticed then.
        delay = min(max(at - self.now(), 0) / 1_000_000, LOOK_AGAIN)
        self._timer = self.loop.call_later(delay, self.wake_due)

    def look_at_clock(self) -> None:
        """A clock that was wrong and is right again has brought timers due that ours still waits for."""
        if self._timer is not None and self._timers and self._timers[0][0] <= self.now():
            self._timer.cancel()
            self.wake_due()

    def wake_due(self) -> None:
        """Tick every resident whose time has come."""
        self._timer = None
        self._timer_for = None
        now = self.now()
        while self._timers and self._timers[0][0] <= now:
            at, key = heapq.heappop(self._timers)
            resident = self.residents.get(key)
            if resident is not None and resident.timer_at == at:
                self.safely(resident, resident.tick)
        if self._timers and not self.closed and self._timer_for is None:
            self._set_timer(self._timers[0][0])

    # --- steps -----------------------------------------------------------------------------------------

    def execute(self, resident: Resident, op: Op, execution: Execution) -> None:
        """Execute a step's function, when there is room and the lease is sure."""
        if self.lease_sure and not self.draining and self.executing < self.settings.concurrency:
            self.executing += 1
            execution.counted = True
            execution.began = self.answered_at
            policy = execution.call.policy
            if policy.on_loop and policy.timeout is None:
                self.executor.begin(execution)
            else:
                self._execute(resident, op, execution)
        else:
            self.admit(execution, lambda: self._execute(resident, op, execution))

    def admit(self, execution: Execution, begin: Callable[[], None]) -> None:
        """Begin an execution now, or when one ends, or when the lease is confirmed again."""
        if self.draining or self.closed:
            return
        if self.heartbeat is not None and not self.heartbeat.valid:
            if not self._held:
                self.loop.call_later(0.1, self._try_held)
            self._held.append(lambda: self.admit(execution, begin))
        elif self.executing >= self.settings.concurrency:
            self._queue.append(lambda: self.admit(execution, begin))
        elif not execution.abandoned:
            self.executing += 1
            execution.counted = True
            execution.began = self.now()
            self.safely(execution.of, begin)

    def _try_held(self) -> None:
        held, self._held = self._held, []
        for attempt in held:
            attempt()

    def _execute(self, resident: Resident, op: Op, execution: Execution) -> None:
        if op.kind == "transaction":
            transacting.wanted(resident, execution)
            return
        call = execution.call
        timeout = call.policy.timeout
        if timeout is not None:
            execution.limit = lambda: self.loop.call_later(
                timeout.total_seconds(), self.safely, resident, self._out_of_time, resident, execution
            )
        driver = resident.play.driver
        if not call.policy.on_loop and isinstance(driver, SyncDriver) and driver.may_execute(op):
            execution.leave = driver.leave
            execution.begins()
            driver.execute(op, self.executor.job(execution, lambda: driver.finished(op)))
        else:
            self.executor.begin(execution)

    def transact_next(self, resident: Resident) -> None:
        """A run has nothing in flight: the transaction step that waits for that may begin."""
        transacting.begin_next(resident)

    def _out_of_time(self, resident: Resident, execution: Execution) -> None:
        # It is cancelled when the record of this is acknowledged; what it returns until then is too late.
        execution.timer = None
        if not resident.gone and resident.executions.get(execution.step) is execution:
            error = failure.out_of_time(execution.too_long)
            resident.outcome(Outcome(execution.step, execution.attempt, error=error))

    def abandon(self, execution: Execution) -> None:
        """Nobody wants an execution's outcome any more."""
        execution.abandon()
        self.freed(execution)

    def freed(self, execution: Execution) -> None:
        """An execution no longer counts."""
        if execution.counted:
            execution.counted = False
            self.executing -= 1
            while self._queue and self.executing < self.settings.concurrency:
                self._queue.popleft()()


class _Random:
    def __init__(self) -> None:
        self._system = secrets.SystemRandom()

    def random(self) -> float:
        return self._system.random()


_get_running_loop = asyncio._get_running_loop
_system_random: Final = _Random()


def _default_clock() -> float:
    from perdure.worker.lease import clock_with_suspend

    return clock_with_suspend()


def _announced(signature: Signature, timeout: timedelta | None) -> dict[str, Any]:
    """What a client without the code needs for a start: the parameters, and how long a run may take (microseconds)."""
    return {
        "parameters": [{"name": p.name, "kind": p.kind, "required": p.required} for p in signature.parameters],
        "timeout": None if timeout is None else micros(timeout),
    }
