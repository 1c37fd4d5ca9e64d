"""The process's one writer: gathers starts, sends and turns while a batch is in flight, and writes them together.

A plain object with `flush()`; who calls it is decided elsewhere (a thread in a process, a choice in a
simulation). Group commit costs nothing when idle: a batch goes out as soon as there is something to write and
nothing in flight.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Final

from perdure.core.errors import PerdureError, StoreError, StoreLocked
from perdure.core.turn import Batch, Kept, Mail, Send, Start, Turn, Verdict
from perdure.stores.contract import Store

log = logging.getLogger("perdure.worker")

Answer = Callable[[Any], None]
"""Called with the verdict, or with the `StoreError` that the write raised."""

MOST: Final = 1000
"""Items in one batch: enough to share an fsync, few enough that the first does not wait for the last."""


FEW: Final = 4
QUICKLY: Final = 0.001
"""Seconds: what the loop of a process may be held up by a batch that it writes itself."""


class Committer:
    """See the module. `answer` hands a list of (callback, verdict) and new mail to the loop that waits for them.

    incarnation: whose mail is read after a batch that kept messages for runs it may own; None: nobody's.
    One thread adds and one flushes; they may be two, and need no lock between them.
    """

    def __init__(
        self,
        store: Store,
        answer: Callable[[list[tuple[Answer, Any]], Sequence[Mail]], None],
        *,
        incarnation: Callable[[], str | None] = lambda: None,
        owns: Callable[[int], bool] = lambda run: False,
    ) -> None:
        self.store = store
        self._answer = answer
        self._incarnation = incarnation
        self._owns = owns
        self._starts: deque[tuple[Start, Answer]] = deque()
        self._sends: deque[tuple[Send, Answer]] = deque()
        self._turns: deque[tuple[Turn, Answer]] = deque()
        # Each is counted by one thread: what was added by the one, what was answered by the other.
        self._added = 0
        self._answered = 0
        self.took = QUICKLY
        """Seconds that small batches took lately."""
        self.trouble: StoreError | None = None
        self.tries = 0

    def start(self, start: Start, answer: Answer) -> None:
        """Write a new run with the next batch."""
        self._added += 1
        self._starts.append((start, answer))

    def send(self, send: Send, answer: Answer) -> None:
        """Write a message with the next batch."""
        self._added += 1
        self._sends.append((send, answer))

    def turn(self, turn: Turn, answer: Answer) -> None:
        """Write a turn with the next batch; one that meets trouble is kept and tried again."""
        self._added += 1
        self._turns.append((turn, answer))

    @property
    def unanswered(self) -> int:
        """How many items wait to be written, or for their answer."""
        return self._added - self._answered

    @property
    def waiting(self) -> bool:
        """Whether there is something to write."""
        return bool(self._turns or self._starts or self._sends)

    @property
    def few(self) -> bool:
        """Whether so little waits, and has been written so quickly, that handing it to a thread would take longer."""
        return self.took < QUICKLY and len(self._turns) + len(self._starts) + len(self._sends) <= FEW

    def flush(self, *, at_once: bool = False) -> bool:
        """Write one batch of what is waiting; False if it met trouble, and turns wait for another try.

        at_once: only if nobody else is writing just now; else False, and everything waits as before.
        """
        starts, sends, turns = self._gather()
        began = time.monotonic()
        batch = Batch(
            starts=[start for start, _ in starts],
            sends=[send for send, _ in sends],
            turns=[turn for turn, _ in turns],
            by=self._incarnation(),
        )
        items = [*(answer for _, answer in starts), *(a for _, a in sends), *(a for _, a in turns)]
        try:
            verdicts: list[Verdict] = self.store.write_at_once(batch) if at_once else self.store.write(batch)
        except StoreLocked as error:
            if at_once:
                self._starts.extendleft(reversed(starts))
                self._sends.extendleft(reversed(sends))
                self._turns.extendleft(reversed(turns))
                self.took = QUICKLY
            else:
                self._troubled(error, starts, sends, turns)
            return False
        except PerdureError as error:
            self._troubled(error, starts, sends, turns)
            return False
        except Exception as error:
            # Our bug or a store's: nobody else would tell those who wait, and this thread must go on.
            log.exception("a batch was not written")
            trouble = StoreError(f"The store {self.store.url} raised {type(error).__name__}: {error}. Report it.")
            self._troubled(trouble, starts, sends, turns)
            return False
        try:
            mail = self._mail_for(verdicts[len(starts) : len(starts) + len(sends)], batch)
        except PerdureError as error:
            # The batch is written; the safety poll brings the mail.
            log.warning("mail that was just written could not be read: %s", error)
            mail = ()
        self.trouble = None
        self.tries = 0
        if len(items) <= FEW:
            self.took += (time.monotonic() - began - self.took) / 4
        self._answered += len(items)
        self._answer(list(zip(items, verdicts, strict=True)), mail)
        return True

    def _gather(
        self,
    ) -> tuple[list[tuple[Start, Answer]], list[tuple[Send, Answer]], list[tuple[Turn, Answer]]]:
        starts: list[tuple[Start, Answer]] = []
        later: list[tuple[Start, Answer]] = []
        ids: set[tuple[str, ...]] = set()
        turns = [self._turns.popleft() for _ in range(min(len(self._turns), MOST))]
        sends = [self._sends.popleft() for _ in range(min(len(self._sends), MOST))]
        for _ in range(len(self._starts)):
            if len(starts) >= MOST:
                break
            item = self._starts.popleft()
            start = item[0]
            names: list[tuple[str, ...]] = [(start.namespace, start.id)]
            if start.idempotency_key is not None:
                names.append((start.namespace, start.idempotency_scope, start.idempotency_key))
            if ids.isdisjoint(names):
                ids.update(names)
                starts.append(item)
            else:
                # Two of one id or key are settled one after the other.
                later.append(item)
        self._starts.extendleft(reversed(later))
        return starts, sends, turns

    def _mail_for(self, sent: Sequence[Verdict], batch: Batch) -> Sequence[Mail]:
        """Mail that this batch brought to runs of this very process: read at once, no poll in between."""
        incarnation = self._incarnation()
        if incarnation is None:
            return ()
        targets = [verdict.run for verdict in sent if isinstance(verdict, Kept)]
        named = False
        for turn in batch.turns:
            for send in turn.sends:
                if isinstance(send.to, int):
                    targets.append(send.to)
                else:
                    named = True
        here = [run for run in targets if self._owns(run)]
        if len(here) < len(targets):
            # Not ours, or claimed this moment and not here yet: the watcher looks.
            self.store.wake()
        return self.store.mail(incarnation) if here or named else ()

    def _troubled(
        self,
        error: PerdureError,
        starts: list[tuple[Start, Answer]],
        sends: list[tuple[Send, Answer]],
        turns: list[tuple[Turn, Answer]],
    ) -> None:
        self.trouble = error if isinstance(error, StoreError) else None
        self.tries += 1
        if self.tries == 1:
            log.error("the store refused a batch, turns are kept and tried again: %s", error)
        # A caller is told; a turn is kept, because its run's work would be lost with it.
        self._turns.extendleft(reversed(turns))
        self._answered += len(starts) + len(sends)
        self._answer([(answer, error) for _, answer in (*starts, *sends)], ())


class CommitterThread:
    """Calls `flush` when there is something to write; `kick` says so.

    Waking a thread and being woken by it takes as long as a commit on a quick disk. So where little waits, nobody
    else is writing, and the last such batches were quick, the one who kicks writes it himself.
    """

    def __init__(self, committer: Committer) -> None:
        self.committer = committer
        self._wanted: SimpleQueue[None] = SimpleQueue()
        self._stopping = False
        self._flushing = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="perdure-committer", daemon=True)
        self._thread.start()

    def kick(self) -> None:
        """Something was added; from the thread that adds, as often as you like."""
        committer = self.committer
        if committer.few and self._flushing.acquire(blocking=False):
            try:
                if committer.waiting and committer.flush(at_once=True):
                    return
            finally:
                self._flushing.release()
        self._wanted.put(None)

    def stop(self, timeout: float = 10) -> None:
        """Write what is waiting and end. Twice is once."""
        self._stopping = True
        self._wanted.put(None)
        self._thread.join(timeout)

    def _serve(self) -> None:
        while True:
            self._wanted.get()
            while self.committer.waiting:
                with self._flushing:
                    written = self.committer.flush()
                if not written:
                    # 50 ms doubling to 5 s: a store in trouble is not hammered.
                    pause = min(0.05 * 2 ** min(self.committer.tries, 10), 5.0)
                    deadline = time.monotonic() + pause
                    while not self._stopping and time.monotonic() < deadline:
                        time.sleep(0.02)
                    if self._stopping and self.committer.tries > 3:
                        return
            if self._stopping:
                return
