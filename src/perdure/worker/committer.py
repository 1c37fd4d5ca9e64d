"""The process's one writer: gathers starts, sends and turns while a batch is in flight, and writes them together.

A plain object with `flush()`; who calls it is decided elsewhere (a thread in a process, a choice in a
simulation). Group commit costs nothing when idle: a batch goes out as soon as there is something to write and
nothing in flight.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

from perdure.core.errors import PerdureError, StoreError, StoreLocked
from perdure.core.turn import Batch, Kept, Mail, Send, Start, Turn, Verdict
from perdure.stores.contract import Store

log = logging.getLogger("perdure.worker")

Answer = Callable[[Any], None]
"""Called with the verdict, or with the `StoreError` that the write raised."""

MOST: Final = 1000
"""Items in one batch: enough to share an fsync, few enough that the first does not wait for the last."""
MOST_TEXT: Final = 16_000_000
"""Characters after which a batch takes one more of each kind at most: writing them takes a while."""

FEW: Final = 4
EARLY: Final = 64
QUICKLY: Final = 0.001
"""Seconds: what the loop of a process may be held up by a batch that it writes itself."""


class Taken(NamedTuple):
    """A batch on its way, with those who wait for its verdicts."""

    starts: list[tuple[Start, Answer]]
    sends: list[tuple[Send, Answer]]
    turns: list[tuple[Turn, Answer]]
    batch: Batch

    @property
    def size(self) -> int:
        return len(self.starts) + len(self.sends) + len(self.turns)


class Stuck(NamedTuple):
    """Turns wait because the store refuses them. since: by `time.monotonic`, when it first did."""

    error: PerdureError
    since: float


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
        self.early = sys.maxsize
        """Items that are worth a batch of their own, and need not wait for the rest of what the loop does now."""
        self.stuck: Stuck | None = None
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
    def gathered(self) -> int:
        """How many items wait to be written."""
        return len(self._turns) + len(self._starts) + len(self._sends)

    @property
    def waiting(self) -> bool:
        """Whether there is something to write."""
        return bool(self._turns or self._starts or self._sends)

    @property
    def few(self) -> bool:
        """Whether so little waits, and has been written so quickly, that handing it to a thread would take longer."""
        return self.took < QUICKLY and self.gathered <= FEW

    def flush(self, *, at_once: bool = False) -> bool:
        """Write one batch of what is waiting; False if it met trouble, and turns wait for another try.

        at_once: only if nobody else is writing just now; else False, and everything waits as before.
        """
        taken = self.take()
        began = time.monotonic()
        try:
            try:
                verdicts = self.store.write_at_once(taken.batch) if at_once else self.store.write(taken.batch)
            except Exception as error:
                if at_once and isinstance(error, StoreLocked):
                    self.put_back(taken)
                    self.took = QUICKLY
                elif isinstance(error, StoreError) and error.of_one_item:
                    self._one_by_one(taken)
                    return True
                else:
                    self.failed(taken, error)
                return False
            if taken.size <= FEW:
                self.took += (time.monotonic() - began - self.took) / 4
            self.written(taken, verdicts, self.mail(taken, verdicts))
        except BaseException:
            # Nobody was answered. Asked again, the store answers the same.
            self.put_back(taken)
            raise
        return True

    def take(self) -> Taken:
        """What is waiting, as the next batch; to be told of with `written`, `failed` or `put_back`.

        Where it raises, for want of memory, everything waits as before.
        """
        starts: list[tuple[Start, Answer]] = []
        later: list[tuple[Start, Answer]] = []
        sends: list[tuple[Send, Answer]] = []
        turns: list[tuple[Turn, Answer]] = []
        try:
            room = MOST_TEXT
            if self._turns:
                room = _move_turns(self._turns, turns, room)
            if self._sends:
                room = _move_sends(self._sends, sends, room)
            if self._starts:
                self._move_starts(starts, later, room)
            batch = Batch(
                starts=[start for start, _ in starts],
                sends=[send for send, _ in sends],
                turns=[turn for turn, _ in turns],
                by=self._incarnation(),
            )
            taken = Taken(starts, sends, turns, batch)
        except BaseException:
            self._starts.extendleft(reversed(later))
            self._put_back(starts, sends, turns)
            raise
        self._starts.extendleft(reversed(later))
        return taken

    def put_back(self, taken: Taken) -> None:
        """As if it had not been taken."""
        self._put_back(taken.starts, taken.sends, taken.turns)

    def _put_back(self, starts: Sequence[Any], sends: Sequence[Any], turns: Sequence[Any]) -> None:
        self._starts.extendleft(reversed(starts))
        self._sends.extendleft(reversed(sends))
        self._turns.extendleft(reversed(turns))

    def written(self, taken: Taken, verdicts: Sequence[Verdict], mail: Sequence[Mail] = ()) -> None:
        """Hand on the verdicts, and mail that was read after them."""
        items = [*(a for _, a in taken.starts), *(a for _, a in taken.sends), *(a for _, a in taken.turns)]
        self._tell(list(zip(items, verdicts, strict=True)), mail)
        self.stuck = None
        self.tries = 0

    def failed(self, taken: Taken, error: Exception) -> None:
        """The batch was not written, as far as anybody knows: callers are told, runs' turns are kept."""
        error = self._as_told(error)
        # A turn is kept, because its run's work would be lost with it; but not one that ends a run for a caller.
        kept = [each for each in taken.turns if each[0].owner is not None]
        callers = [each for each in taken.turns if each[0].owner is None]
        if kept:
            self.stuck = Stuck(error, time.monotonic() if self.stuck is None else self.stuck.since)
        self.tries += 1
        if kept and self.tries == 1:
            # Nobody waits for these; callers are told below.
            log.error("the store refused what has come of runs, which is kept and tried again: %s", error)
        self._tell([(answer, error) for _, answer in (*taken.starts, *taken.sends, *callers)], ())
        self._turns.extendleft(reversed(kept))

    def _as_told(self, error: Exception) -> PerdureError:
        """What those who wait are told of an error."""
        if isinstance(error, PerdureError):
            return error
        # Our bug or a store's: nobody else would tell them, and this thread must go on.
        log.error("a batch was not written", exc_info=error)
        return StoreError(f"The store {self.store.url} raised {type(error).__name__}: {error}. Report it.")

    def _one_by_one(self, taken: Taken) -> None:
        """Something in it cannot be stored: only whoever wants that is told so."""
        answers: list[tuple[Answer, Any]] = []
        batches = [(Batch(starts=[start], by=taken.batch.by), answer) for start, answer in taken.starts]
        batches += [(Batch(sends=[send], by=taken.batch.by), answer) for send, answer in taken.sends]
        for batch, answer in batches:
            try:
                answers += [(answer, verdict) for verdict in self.store.write(batch)]
            except Exception as error:
                answers.append((answer, self._as_told(error)))
        self._tell(answers, ())
        self._turns.extendleft(reversed(taken.turns))
        self.stuck = None
        self.tries = 0
        self.store.wake()

    def _tell(self, answers: list[tuple[Answer, Any]], mail: Sequence[Mail]) -> None:
        """Hand answers on; where that raises, nobody was answered."""
        self._answered += len(answers)
        try:
            self._answer(answers, mail)
        except BaseException:
            self._answered -= len(answers)
            raise

    def _move_starts(self, starts: list[tuple[Start, Answer]], later: list[tuple[Start, Answer]], room: int) -> None:
        """Take starts whose ids and keys differ; those that come too early for that go to `later`."""
        ids: set[tuple[str, ...]] = set()
        for _ in range(len(self._starts)):
            if len(starts) >= MOST or (room <= 0 and starts):
                break
            item = self._starts[0]
            start = item[0]
            room -= len(start.input)
            names: list[tuple[str, ...]] = [(start.namespace, start.id)]
            if start.idempotency_key is not None:
                names.append((start.namespace, start.idempotency_scope, start.idempotency_key))
            if ids.isdisjoint(names):
                ids.update(names)
                starts.append(item)
            else:
                # Two of one id or key are settled one after the other.
                later.append(item)
            self._starts.popleft()

    def mail(self, taken: Taken, verdicts: Sequence[Verdict]) -> Sequence[Mail]:
        """Mail that a batch brought to runs of this very process: read at once, no poll in between."""
        if not self.brings_mail(taken, verdicts):
            return ()
        incarnation = self._incarnation()
        assert incarnation is not None
        try:
            return self.store.mail(incarnation)
        except Exception as error:
            # The batch is written; the safety poll brings the mail.
            log.warning("mail that was just written could not be read: %s", error)
            return ()

    def arrived(self, mail: Sequence[Mail]) -> None:
        """Hand on mail that was read after its batch had been answered."""
        self._answer([], mail)

    def brings_mail(self, taken: Taken, verdicts: Sequence[Verdict]) -> bool:
        """Whether a written batch may have brought mail to runs of this process."""
        batch = taken.batch
        if batch.by is None or not (batch.sends or any(turn.sends for turn in batch.turns)):
            return False
        sent = verdicts[len(batch.starts) : len(batch.starts) + len(batch.sends)]
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
        return bool(here) or named


def _move_turns(waiting: deque[tuple[Turn, Answer]], taken: list[tuple[Turn, Answer]], room: int) -> int:
    """As many as fit into a batch, none of which is ever in neither; the characters that there is still room for."""
    for _ in range(min(len(waiting), MOST)):
        if room <= 0 and taken:
            break
        item = waiting[0]
        turn = item[0]
        for event in turn.events:
            room -= len(event)
        if turn.starts or turn.sends:
            room -= sum(len(start.input) for start in turn.starts) + sum(len(send.data) for send in turn.sends)
        taken.append(item)
        waiting.popleft()
    return room


def _move_sends(waiting: deque[tuple[Send, Answer]], taken: list[tuple[Send, Answer]], room: int) -> int:
    """The same for messages."""
    for _ in range(min(len(waiting), MOST)):
        if room <= 0 and taken:
            break
        item = waiting[0]
        room -= len(item[0].data)
        taken.append(item)
        waiting.popleft()
    return room


class CommitterThread:
    """Has what waits written; `kick` says that there is something.

    Waking a thread and being woken by it takes as long as a commit on a quick disk. So where little waits, nobody
    else is writing, and the last such batches were quick, the one who kicks writes it himself. And a store behind a
    connection needs no thread at all to wait for it: the loop sends the batch, goes on, and is told of the answer.

    loop: of the one who kicks. read: has something done in a thread, and the loop told of what came of it.
    """

    def __init__(
        self,
        committer: Committer,
        loop: asyncio.AbstractEventLoop | None = None,
        read: Callable[[Callable[[], Any], Callable[[Any], None]], None] | None = None,
    ) -> None:
        self.committer = committer
        self._wire = None
        if loop is not None and read is not None and hasattr(committer.store, "begin_at_once"):
            self._wire = Wire(committer, loop, read, freed=self._freed)
            committer.early = EARLY
        self._wanted: SimpleQueue[None] = SimpleQueue()
        self._stopping = False
        self._flushing = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="perdure-committer", daemon=True)
        self._thread.start()

    def kick(self) -> None:
        """Something was added; from the thread that adds, as often as you like."""
        if not self._flushing.acquire(blocking=False):
            # Written as soon as what is being written is.
            if self._wire is None or not self._wire.busy:
                self._wanted.put(None)
            return
        sent = False
        try:
            if not self.committer.waiting:
                return
            try:
                if self._wire is not None:
                    # After trouble it is the thread's, which waits between tries.
                    sent = self.committer.tries == 0 and self._wire.send()
                    if sent:
                        return
                elif self.committer.few and self.committer.flush(at_once=True) and not self.committer.waiting:
                    return  # else two of one id or key wait for each other, and the rest is the thread's
            except Exception:
                log.exception("what waits could not be written by the loop, and is the thread's")
            self._wanted.put(None)
        finally:
            if not sent:
                self._flushing.release()

    def _freed(self) -> None:
        """What the wire carried has its answers."""
        self._flushing.release()
        if self.committer.waiting:
            self.kick()

    def stop(self, timeout: float = 10) -> None:
        """Write what is waiting and end. Twice is once."""
        self._stopping = True
        self._wanted.put(None)
        self._thread.join(timeout)

    def _serve(self) -> None:
        while True:
            self._wanted.get()
            while self.committer.waiting:
                try:
                    written = self._flush()
                except Exception:
                    log.exception("the committer failed and goes on")
                    written = False
                if not written:
                    # 50 ms doubling to 5 s: a store in trouble is not hammered.
                    pause = min(0.05 * 2 ** min(self.committer.tries, 10), 5.0)
                    deadline = time.monotonic() + pause
                    while not self._stopping and time.monotonic() < deadline:
                        time.sleep(0.02)
                    if self._stopping and self.committer.tries > 3:
                        return
            if self._stopping:
                with self._flushing:
                    return

    def _flush(self) -> bool:
        with self._flushing:
            # The wire may have taken it meanwhile.
            return self.committer.flush() if self.committer.waiting else True


class Wire:
    """Carries one batch at a time to a store behind a connection, from the loop and without waiting for it.

    freed: called when the batch has its answers. What is out of the ordinary (a lost connection, a fence that does
    not hold) takes questions to find out, and is left to a thread.
    """

    def __init__(
        self,
        committer: Committer,
        loop: asyncio.AbstractEventLoop,
        read: Callable[[Callable[[], Any], Callable[[Any], None]], None],
        *,
        freed: Callable[[], None],
    ) -> None:
        self.committer = committer
        self._store: Any = committer.store
        self._loop = loop
        self._read = read
        self._freed = freed
        self._taken: Taken | None = None
        self._file = -1

    @property
    def busy(self) -> bool:
        """Whether a batch is under way."""
        return self._taken is not None

    def send(self) -> bool:
        """Send what waits; False if that would mean to wait."""
        taken = self.committer.take()
        try:
            file = self._store.begin_at_once(taken.batch)
        except Exception:
            log.exception("a batch could not be sent by the loop")
            file = None
        if file is None:
            self.committer.put_back(taken)
            return False
        self._taken = taken
        self._file = file
        if file < 0:
            self._loop.call_soon(self._arriving)
        else:
            self._loop.add_reader(file, self._arriving)
            if self._store.unsent:
                self._loop.add_writer(file, self._arriving)
        return True

    def _arriving(self) -> None:
        arrived = self._store.arrived()
        if self._file >= 0 and (arrived or not self._store.unsent):
            self._loop.remove_writer(self._file)
        if not arrived:
            return
        if self._file >= 0:
            self._loop.remove_reader(self._file)
        try:
            verdicts = self._store.finish_at_once()
        except Exception:
            log.exception("the answers to a batch could not be read")
            verdicts = None
        if verdicts is None:
            self._read(self._finish, self._finished)
        else:
            self._finished(verdicts)

    def _finish(self) -> Any:
        """In a thread."""
        try:
            return self._store.finish()
        except Exception as error:
            return error

    def _finished(self, verdicts: Any) -> None:
        taken, self._taken = self._taken, None
        assert taken is not None
        committer = self.committer
        try:
            if isinstance(verdicts, StoreError) and verdicts.of_one_item:
                # It takes several writes to find out which one: the thread does that.
                committer.put_back(taken)
                committer.tries += 1
            elif isinstance(verdicts, Exception):
                committer.failed(taken, verdicts)
            else:
                committer.written(taken, verdicts)
        except Exception:
            # Asked again, the store answers the same.
            log.exception("the answers to a batch could not be handed on")
            committer.put_back(taken)
            verdicts = ()
        finally:
            self._freed()
        if verdicts and not isinstance(verdicts, Exception) and committer.brings_mail(taken, verdicts):
            self._read(lambda: committer.mail(taken, verdicts), committer.arrived)
