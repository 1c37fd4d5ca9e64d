"""Starts runs and asks about them. One code path: the async face does it, the sync face waits for the async one.

A `Client` has a `Core`: the store, the committer that writes for it, the loop it lives on. An `Engine` is a
client whose core also has a shift (a worker); everything else is the same.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, Generic, ParamSpec, Protocol, TypeVar, overload

import msgspec

from perdure.core import codec, stored
from perdure.core import events as ev
from perdure.core import why as why_
from perdure.core.codec import Plan, plan
from perdure.core.errors import (
    IdempotencyConflict,
    LimitExceeded,
    PerdureError,
    RunCancelled,
    RunExists,
    RunFailed,
    RunFinished,
    RunNotFound,
    RunTerminated,
    RunTimedOut,
    StoreError,
    StoreLocked,
    UnknownWorkflow,
    timed_out,
)
from perdure.core.failure import RecordedError
from perdure.core.ids import sortable_id
from perdure.core.limits import Limits, check_id, check_message_id, check_name, check_reason, limits_of
from perdure.core.retry import duration, instant, micros
from perdure.core.signature import announced_signature, announced_timeout
from perdure.core.status import ENDED, Status
from perdure.core.turn import (
    Address,
    Announced,
    Batch,
    Begun,
    Busy,
    Committed,
    Conflict,
    Existing,
    Finished,
    Key,
    Mail,
    MailboxFull,
    NotFound,
    Query,
    Row,
    Send,
    Start,
    Taken,
    Turn,
    Verdict,
)
from perdure.info import Event, RunInfo, RunPage, events_of, info_of
from perdure.runtime import entropy
from perdure.runtime.registry import Registry, Workflow
from perdure.stores.contract import Store
from perdure.stores.opening import check_store, open_store
from perdure.worker.committer import Committer, CommitterThread
from perdure.worker.ending import end_without_code
from perdure.worker.executing import soon
from perdure.worker.remote_end import CANCEL
from perdure.worker.shift import LANGUAGE, Shift

if TYPE_CHECKING:
    from perdure import sync as sync_

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
C = TypeVar("C", bound="Client")

log = logging.getLogger("perdure.client")

REMEMBERED: Final = 10_000
"""Ends of runs kept in memory, so that `result()` right after an end needs no read."""
KNOWN_FOR: Final = 10.0
"""Seconds for which an announcement is believed: a deploy may have changed the signature."""
FIRST_POLL: Final = 0.002
LAST_POLL: Final = 0.05
LOOK_FOR_BLOCKED: Final = 5.0
"""Seconds between two looks for a blocked one among the runs that are waited for."""
OVER: Final = ENDED | {Status.QUARANTINED}
"""What `result()` does not wait beyond."""
_FAILURES: Final = {
    "failed": RunFailed,
    "cancelled": RunCancelled,
    "terminated": RunTerminated,
    "timed_out": RunTimedOut,
    "quarantined": RunFailed,
}


class _Default(str):
    """A default that can be told from the same word where it is given."""


_USE: Final = _Default("use")
_WEEK: Final = timedelta(days=7)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOptions:
    """What `client.options(...)` sets for the next start."""

    id: str | None = None
    idempotency_key: str | None = None
    idempotency_ttl: timedelta = _WEEK
    if_exists: str = _USE
    at: datetime | None = None
    delay: timedelta | None = None
    queue: str | None = None
    timeout: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ended, as far as `result()` needs it."""

    status: str
    result: str | None
    error: str | None


class _Starting:
    """A start on its way into the store. shift: of the worker that owns the run from its start, if it is this one."""

    __slots__ = ("event", "future", "shift", "start")

    def __init__(self, shift: Shift | None, start: Start, event: ev.Started, future: asyncio.Future[Any]) -> None:
        self.shift = shift
        self.start = start
        self.event = event
        self.future = future

    def answered(self, verdict: Any) -> None:
        """The verdict, or what went wrong: the run begins before its starter goes on."""
        if not self.future.done():
            self.future.set_result(verdict)
        if self.shift is not None and isinstance(verdict, Begun):
            self.shift.begun(self.start, self.event, verdict.run, id=verdict.id, version=verdict.version, at=verdict.at)


class CallersTransaction(Protocol):
    """A transaction that the caller of the sync face has open, in a thread of its own."""

    async def write(self, store: Store, batch: Batch) -> list[Verdict]:
        """Have the batch written there."""


callers_transaction: Final[ContextVar[CallersTransaction | None]] = ContextVar("perdure_callers", default=None)
"""Where this call writes, if not through the committer."""


class Core:
    """What a client and all its option views share."""

    def __init__(self, store: str | Store | None, namespace: str, limits: Limits) -> None:
        self.given = check_store(store)
        self.namespace = check_name(namespace, "namespace=")
        self.limits = limits
        self.store: Store = None  # type: ignore[assignment]  # opened at first use
        self.registry = Registry()
        self.shift: Shift | None = None
        self.committer: Committer | None = None
        self.thread: CommitterThread | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.pid = 0  # of the process in which it was opened
        self.readers: ThreadPoolExecutor | None = None
        self.announced: dict[str, Announced] = {}
        self.asked_at = 0.0
        self.waiting: dict[Key, list[asyncio.Future[Ending]]] = {}
        self.recent: dict[Key, Ending] = {}
        self.warned: set[Key] = set()  # blocked runs that somebody waits for, and was told so
        self.poller: asyncio.Task[None] | None = None
        self.opening: asyncio.Task[None] | None = None
        self.opened = False
        self.closed = False
        self._kicked = False

    # --- opening and closing ---

    async def open(self) -> None:
        """Open the store and begin to write; at first use, once for all who ask. Twice is once."""
        loop = asyncio.get_running_loop()
        if self.closed:
            raise RuntimeError("This client was closed. Nothing can be asked of it any more. Make a new one.")
        if self.loop is not loop:
            if self.loop is not None:
                raise RuntimeError(
                    "This client belongs to another event loop. Its answers arrive there. Use its .sync face from "
                    "other threads, or make a client for this loop."
                )
            self.loop = loop
            self.pid = os.getpid()
            self.opening = loop.create_task(self._open())
        if not self.opened:
            assert self.opening is not None
            await asyncio.shield(self.opening)

    @property
    def ready(self) -> bool:
        """Whether it is open, and asked on its own loop: what `open` would find out with more ceremony."""
        return self.opened and not self.closed and self.loop is _get_running_loop()

    async def _open(self) -> None:
        assert self.loop is not None
        self.readers = ThreadPoolExecutor(max_workers=4, thread_name_prefix="perdure-reader")
        try:
            self.store = await self.loop.run_in_executor(self.readers, functools.partial(open_store, self.given))
            self.begin()
            await self.serve()
        except BaseException:
            # As if nobody had asked: the next who does tries again.
            self.loop = self.opening = None
            if self.thread is not None:
                self.thread.stop()
            if self.store is not None and self.store is not self.given:  # type: ignore[redundant-expr]  # it is None until it is opened
                self.store.close()
            self.readers.shutdown(wait=False)
            raise
        self.opened = True

    async def serve(self) -> None:
        """Begin to serve; an engine does."""

    def begin(self) -> None:
        """Begin to write: a committer of its own; an engine brings its shift's."""
        self.committer = Committer(self.store, self._answer)
        self.thread = CommitterThread(self.committer)

    def _answer(self, answers: list[tuple[Callable[[Any], None], Any]], mail: Sequence[Mail]) -> None:
        assert self.loop is not None
        if _get_running_loop() is self.loop:
            # The loop itself has written it.
            self._answered(answers)
            return
        soon(self.loop, self._answered, answers)

    def _answered(self, answers: list[tuple[Callable[[Any], None], Any]]) -> None:
        for answer, verdict in answers:
            try:
                answer(verdict)
            except Exception:
                log.exception("an answer could not be taken")

    async def close(self) -> None:
        """Write what waits, stop, give the store back. Twice is once."""
        if self.closed:
            return
        self.closed = True
        if self.poller is not None:
            self.poller.cancel()
        thread, readers, store = self.thread, self.readers, self.store
        if self.loop is not None:
            if thread is not None:
                await self.loop.run_in_executor(readers, thread.stop)
            if store is not None and store is not self.given:  # type: ignore[redundant-expr]  # it is None until it is opened
                await self.loop.run_in_executor(readers, store.close)
        if readers is not None:
            readers.shutdown(wait=False)
        for futures in self.waiting.values():
            for future in futures:
                if not future.done():
                    # Not a cancellation: whoever waits was not cancelled, and a task group would swallow it.
                    future.set_exception(
                        RuntimeError(
                            "The client was closed while a result was awaited. The run goes on without it. Ask again "
                            "with another client."
                        )
                    )

    # --- reading and writing ---

    async def read(self, ask: Callable[[], R]) -> R:
        """Ask the store in a thread of ours."""
        await self.open()
        assert self.loop is not None
        return await self.loop.run_in_executor(self.readers, ask)

    def kick(self) -> None:
        """There is something to write."""
        if self.shift is not None:
            self.shift.kick()
        elif not self._kicked:
            self._kicked = True
            assert self.loop is not None
            self.loop.call_soon(self._kick_now)

    def _kick_now(self) -> None:
        self._kicked = False
        if self.thread is not None:
            self.thread.kick()

    async def write(self, add: Callable[[Committer, Callable[[Any], None]], None]) -> Any:
        """Add something to the next batch and wait for its verdict; store errors are raised."""
        if not self.ready:
            await self.open()
        assert self.loop is not None
        assert self.committer is not None
        future: asyncio.Future[Any] = self.loop.create_future()

        def answer(verdict: Any) -> None:
            if not future.done():
                future.set_result(verdict)

        add(self.committer, answer)
        self.kick()
        verdict = await future
        if isinstance(verdict, PerdureError):
            raise verdict
        return verdict

    async def started(self, start: Start, event: ev.Started) -> Any:
        """Write a start with the next batch and wait for its verdict; what this process owns begins at once."""
        assert self.loop is not None
        assert self.committer is not None
        shift = self.shift if start.owner is not None else None
        until = self.loop.time() + PATIENCE
        while True:
            starting = _Starting(shift, start, event, self.loop.create_future())
            self.committer.start(start, starting.answered)
            self.kick()
            verdict = await starting.future
            if isinstance(verdict, PerdureError):
                raise verdict
            if not isinstance(verdict, Busy):
                return verdict
            await self._wait_for_others(
                until, f"The start of run {start.id}", "started a run with its id or idempotency key"
            )

    async def sent(self, send: Send) -> Any:
        """Write a message with the next batch and wait for its verdict."""
        await self.open()
        assert self.loop is not None
        until = self.loop.time() + PATIENCE
        while True:
            verdict = await self.write(lambda committer, answer: committer.send(send, answer))
            if not isinstance(verdict, Busy):
                return verdict
            await self._wait_for_others(until, f"The message {send.id}", "sent one with its id")

    async def _wait_for_others(self, until: float, what: str, why: str) -> None:
        """Wait a moment for an open transaction that has written the same; StoreLocked once it is too late."""
        assert self.loop is not None
        if self.loop.time() >= until:
            raise StoreLocked(
                f"{what} was not written within {PATIENCE:g} s. An open transaction has {why}, and nobody knows yet "
                "whether it will be there. Try again when that has ended.",
                store=self.store.url,
            )
        await asyncio.sleep(0.05)

    async def row(self, run_id: str) -> Row:
        """The newest generation of a run; RunNotFound."""
        await self.open()
        row = await self.read(lambda: self.store.run(self.namespace, run_id))
        if row is None:
            raise RunNotFound(run_id, namespace=self.namespace)
        return row

    def held_up(self, row: Row) -> str:
        """Why a run that is executed here does not go on, if that is because its store cannot be written."""
        stuck = None if self.committer is None else self.committer.stuck
        if stuck is None or self.shift is None or row.key not in self.shift.residents:
            return ""
        seconds = time.monotonic() - stuck.since
        return (
            f"Run {row.id} is held up here, for {seconds:.0f} s, because its store cannot be written: {stuck.error} "
            "It goes on by itself when the store can be written again."
        )

    # --- ends ---

    def run_ended(self, key: Key, end: Turn | Row) -> None:
        """A run ended in this process: whoever waits for it knows at once."""
        self.resolve(key, Ending(end.status, end.result, end.error))

    def resolve(self, key: Key, ending: Ending) -> None:
        """Tell everybody who waits for this run, and keep it for those who ask in a moment."""
        self.recent[key] = ending
        self.warned.discard(key)
        if len(self.recent) > REMEMBERED:
            del self.recent[next(iter(self.recent))]
        for future in self.waiting.pop(key, ()):
            if not future.done():
                future.set_result(ending)

    def warn_of(self, row: Row) -> None:
        """Somebody waits for the end of a blocked run: the log says so once."""
        if row.key not in self.warned:
            self.warned.add(row.key)
            log.warning("waiting for the result of a blocked run: %s", info_of(row).waits.blocked)

    async def end_of(self, key: Key) -> Ending:
        """Wait until a run has ended."""
        known = self.recent.get(key)
        if known is not None:
            return known
        assert self.loop is not None
        future: asyncio.Future[Ending] = self.loop.create_future()
        self.waiting.setdefault(key, []).append(future)
        if self.poller is None or self.poller.done():
            self.poller = self.loop.create_task(self._poll())
        try:
            return await future
        finally:
            left = self.waiting.get(key)
            if left is not None and future in left:
                left.remove(future)
                if not left:
                    del self.waiting[key]

    async def _poll(self) -> None:
        """One poller for all awaited runs that are not in this process's memory."""
        pause = FIRST_POLL
        failed = False
        look_at = asyncio.get_running_loop().time() + LOOK_FOR_BLOCKED
        while self.waiting:
            elsewhere = [key for key in self.waiting if self.shift is None or key not in self.shift.residents]
            found: list[Key] = []
            if elsewhere:
                try:
                    found = await self.read(functools.partial(self.store.ended, elsewhere))
                    for row in await self.read(functools.partial(self.store.rows, found)) if found else ():
                        if row.status in OVER:
                            self.resolve(row.key, Ending(row.status, row.result, row.error))
                    if (now := asyncio.get_running_loop().time()) >= look_at:
                        look_at = now + LOOK_FOR_BLOCKED
                        unwarned = [key for key in elsewhere if key in self.waiting and key not in self.warned]
                        for row in await self.read(functools.partial(self.store.rows, unwarned)):
                            if row.status == "blocked":
                                self.warn_of(row)
                except Exception as error:
                    # Also what is a bug: nobody else would ever tell those who wait.
                    if not failed:
                        trace = None if isinstance(error, StoreError) else error
                        log.warning("looking for ended runs failed, and is tried again: %s", error, exc_info=trace)
                    failed = True
                    await asyncio.sleep(1.0)
                    continue
            failed = False
            pause = FIRST_POLL if found else min(pause * 1.5, LAST_POLL)
            await asyncio.sleep(pause)

    # --- names ---

    async def served(self, name: str) -> Announced | None:
        """What workers announced under a name; read again if it is unknown, or was read a while ago."""
        assert self.loop is not None
        if name not in self.announced or self.loop.time() - self.asked_at > KNOWN_FOR:
            self.asked_at = self.loop.time()
            for each in await self.read(lambda: self.store.announced(self.namespace)):
                if each.kind == "workflow":
                    self.announced[each.name] = each
        return self.announced.get(name)


class Client:
    """Starts runs and asks about them; executes nothing.

    store: URL or store object; default `PERDURE_STORE`, else `sqlite:///perdure.db`. Works in `async with`, or
    without: opened at first use, ended by `close()`. From other threads use `.sync`.
    """

    def __init__(
        self,
        store: str | Store | None = None,
        *,
        namespace: str = "default",
        limits: Limits | None = None,
        codec: Any = None,
    ) -> None:
        _no_codec(codec)
        self._core = Core(store, namespace, limits_of(limits))
        self._options = StartOptions()

    async def __aenter__(self: C) -> C:
        try:
            await self._core.open()
        except BaseException:
            await self._core.close()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Write what waits and give the store back. Twice is once."""
        await self._core.close()

    @property
    def sync(self) -> sync_.Client:
        """The blocking face of the same open client, for threads that are not its loop's."""
        from perdure.sync import face_of  # It imports this module.

        return face_of(self)

    def options(
        self: C,
        *,
        id: str | None = None,
        idempotency_key: str | None = None,
        idempotency_ttl: timedelta | float = _WEEK,
        if_exists: str = _USE,
        at: datetime | None = None,
        delay: timedelta | float | None = None,
        queue: str | None = None,
        timeout: timedelta | float | None = None,
        connection: Any = None,
    ) -> C:
        """The same client with these options for the next `start`; a second call adds to them.

        id: 1 to 255 printable characters; default: a new one. idempotency_key: one run per key, workflow and
        `idempotency_ttl`. if_exists: "use" the run that has the id (also an ended one) or "fail". at, delay: start
        later. queue: instead of the workflow's own. timeout: the longest the run may take. connection: only on the
        sync face.
        """
        if connection is not None:
            raise TypeError(
                "options(connection=…) was given to the async face. A transaction belongs to the thread that has the "
                "connection, and this face writes in another. Use engine.sync.options(connection=…) in that thread."
            )
        if if_exists in ("restart", "terminate"):
            raise ValueError(f'if_exists="{if_exists}" comes with a later version. Use "use" or "fail".')
        if if_exists not in ("use", "fail"):
            raise ValueError(f'if_exists={if_exists!r} is not known. It is "use" or "fail".')
        if at is not None and delay is not None:
            raise ValueError("Both at= and delay= were given. They say the same thing twice. Pass one of them.")
        given: dict[str, Any] = {}
        if id is not None:
            given["id"] = check_id(id, "the run id")
        if idempotency_key is not None:
            given["idempotency_key"] = check_id(idempotency_key, "the idempotency key")
        if idempotency_ttl is not _WEEK:
            given["idempotency_ttl"] = duration(idempotency_ttl, "idempotency_ttl=", zero=False)
        if if_exists is not _USE:
            given["if_exists"] = if_exists
        if at is not None:
            instant(at, "at=")
            given.update(at=at, delay=None)
        if delay is not None:
            given.update(at=None, delay=duration(delay, "delay="))
        if queue is not None:
            given["queue"] = check_name(queue, "queue=")
        if timeout is not None:
            given["timeout"] = duration(timeout, "timeout=", zero=False)
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view._options = replace(self._options, **given)
        return view

    @overload
    async def start(self, workflow: Workflow[P, R], /, *args: P.args, **kwargs: P.kwargs) -> RunHandle[R]: ...
    @overload
    async def start(self, workflow: str, /, *args: Any, **kwargs: Any) -> RunHandle[Any]: ...
    async def start(self, workflow: Any, /, *args: Any, **kwargs: Any) -> RunHandle[Any]:
        """Start a run; durable when it returns. workflow: the object, or a name that some worker has announced.

        Arguments after it are the run's input, checked here if the object is given. Refused with nothing written:
        UnknownWorkflow (also an object that is not served here and that no worker ever announced), TypeError (arguments
        that do not fit), PayloadError, LimitExceeded, RunExists, IdempotencyConflict. Calling again with the same id or
        key gives the same run.
        """
        core = self._core
        if not core.ready:
            await core.open()
        target = core.registry.workflows.get(workflow.name) if isinstance(workflow, Workflow) else None
        if target is not None and target is workflow:
            # Served here: nothing to look up.
            name, queue, timeout = target.name, target.queue, target.timeout
            input = target.signature.encode(args, kwargs, limits=core.limits)
        else:
            target, name, input, queue, timeout = await self._prepared(workflow, args, kwargs)
        options = self._options
        store = core.store
        now = store.now()
        start_at: int | None = None
        if options.at is not None:
            start_at = instant(options.at, "at=")
        elif options.delay is not None:
            start_at = now + micros(options.delay)
        if start_at is not None and start_at <= now:
            start_at = None
        if options.timeout is not None:
            timeout = options.timeout
        begins = start_at if start_at is not None else now
        drawn = entropy.drawn(26)
        seed = drawn[:16].hex()
        queue = options.queue if options.queue is not None else queue
        shift = core.shift
        owner: str | None = None
        callers = callers_transaction.get()
        if (
            shift is not None
            and callers is None
            and start_at is None
            and target is not None
            and core.registry.workflows.get(name) is target
            and queue in shift.settings.queues
            and shift.room > 0
        ):
            owner = shift.incarnation
        text = input.decode()
        started = ev.Started(at=begins, seed=seed)
        key = options.idempotency_key
        start = Start(
            namespace=core.namespace,
            id=options.id if options.id is not None else sortable_id(now, int.from_bytes(drawn[16:], "big")),
            workflow=name,
            input=text,
            digest=codec.digest128(input),
            seed=seed,
            event=stored.encode(started),
            queue=queue,
            start_at=start_at,
            deadline_at=None if timeout is None else begins + micros(timeout),
            if_exists=options.if_exists,
            idempotency_scope=name if key is not None else "",
            idempotency_key=key,
            idempotency_until=None if key is None else now + micros(options.idempotency_ttl),
            owner=owner,
            language=LANGUAGE,
        )
        returns = target.returns if target is not None else _ANY
        if callers is not None:
            [verdict] = await callers.write(store, Batch(starts=[start]))
        else:
            verdict = await core.started(start, started)
        if isinstance(verdict, (Begun, Existing)):
            return RunHandle(core, verdict.id, returns, key=verdict.run)
        if isinstance(verdict, Taken):
            raise RunExists(verdict.id, key=None if verdict.id == start.id else key)
        assert isinstance(verdict, Conflict)
        there = await core.read(lambda: store.run(core.namespace, verdict.id))
        differs = "workflow" if there is not None and there.workflow != name else "input"
        raise IdempotencyConflict(verdict.key or verdict.id, run_id=verdict.id, differs=differs)

    async def _prepared(
        self, workflow: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Workflow[Any, Any] | None, str, bytes, str, timedelta | None]:
        core = self._core
        target: Workflow[Any, Any] | None
        if isinstance(workflow, str):
            target = core.registry.workflows.get(workflow)
        elif isinstance(workflow, Workflow):
            target = workflow
        else:
            raise TypeError(
                f"start() got {workflow!r}. It takes a function decorated with @workflow, or the name of one. "
                "Decorate the function first."
            )
        if target is not None:
            if not isinstance(workflow, str) and target.name not in core.registry.workflows:
                await self._announced(target.name)
            input = target.signature.encode(args, kwargs, limits=core.limits)
            return target, target.name, input, target.queue, target.timeout
        announced = await self._announced(workflow)
        signature = announced_signature(workflow, announced.signature)
        return (
            None,
            workflow,
            signature.encode(args, kwargs, limits=core.limits),
            announced.queue,
            announced_timeout(announced.signature),
        )

    async def _announced(self, name: str) -> Announced:
        announced = await self._core.served(name)
        if announced is None:
            raise UnknownWorkflow(name, sorted({*self._core.announced, *self._core.registry.workflows}))
        return announced

    @overload
    def handle(self, run_id: str, /, *, returns: type[T]) -> RunHandle[T]: ...
    @overload
    def handle(self, run_id: str, /, *, returns: Any = Any) -> RunHandle[Any]: ...
    def handle(self, run_id: str, /, *, returns: Any = Any) -> RunHandle[Any]:
        """A handle for a run by its id; no I/O, no check: the first verb may raise `RunNotFound`."""
        return RunHandle(self._core, check_id(run_id, "the run id"), plan(returns, what="returns="))

    async def list_runs(
        self,
        *,
        workflow: str | None = None,
        status: Status | str | None = None,
        parent: str | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> RunPage:
        """A page of runs, newest first; children and dispatched activities are runs too.

        workflow: by name, also an activity's. parent: the id of a run, whose children are wanted; RunNotFound.
        created_after, created_before: aware times, themselves left out. limit: 1 to 1,000. cursor: of the page before.
        ValueError for a limit, cursor, status, name or time that is none.
        """
        core = self._core
        if type(limit) is not int or not 1 <= limit <= 1000:
            raise ValueError(f"limit={limit!r} is not a page. A page has 1 to 1,000 runs. Use the cursor for more.")
        if cursor is not None and not re.fullmatch("[0-9]{1,18}", check_id(cursor, "cursor=")):
            raise ValueError(f"cursor={cursor!r} is none of ours. Pass the .cursor of the page before.")
        if parent is not None:
            check_id(parent, "parent=")
        query = Query(
            namespace=core.namespace,
            workflow=None if workflow is None else check_name(workflow, "workflow="),
            status=None if status is None else _status(status).value,
            parent=None if parent is None else (await core.row(parent)).key,
            created_after=None if created_after is None else instant(created_after, "created_after="),
            created_before=None if created_before is None else instant(created_before, "created_before="),
            limit=limit + 1,
            cursor=None if cursor is None else int(cursor),
        )
        await core.open()
        rows = await core.read(lambda: core.store.list(query))
        more = len(rows) > limit
        rows = rows[:limit]
        return RunPage(items=[info_of(row) for row in rows], cursor=str(rows[-1].key) if more else None)

    async def counts(self, *, workflow: str | None = None, queue: str | None = None) -> dict[Status, int]:
        """How many retained runs have each status; only those above zero.

        Children and dispatched activities count too. workflow, queue: only theirs, by name.
        """
        core = self._core
        for what, name in (("workflow=", workflow), ("queue=", queue)):
            if name is not None:
                check_name(name, what)
        await core.open()
        found = await core.read(lambda: core.store.counts(core.namespace, workflow=workflow, queue=queue))
        return {Status(status): count for status, count in found.items()}


def _status(given: Status | str) -> Status:
    try:
        return Status(given)
    except ValueError:
        names = ", ".join(each.value for each in Status)
        raise ValueError(
            f"status={given!r} is none. A run has one of: {names}. Give one of these, or leave it out."
        ) from None


TERMINATES_WITHIN: Final = 30.0
"""Seconds that `terminate` tries."""
PATIENCE: Final = 10.0
"""Seconds that a start or a message waits for an open transaction that has written the same."""


_ANY: Final = plan()
_get_running_loop = asyncio._get_running_loop


def _no_codec(codec: Any) -> None:
    if codec is not None:
        raise ValueError("codec= comes with a later version. Payloads are plain JSON text now. Leave it out.")


class RunHandle(Generic[R]):
    """A run from outside: the verbs. Made by `start` and `handle`."""

    def __init__(self, core: Core, run_id: str, returns: Plan, *, key: Key | None = None) -> None:
        self._core = core
        self._returns = returns
        self._key = key
        self.id = run_id

    def __repr__(self) -> str:
        return f"<run {self.id}>"

    async def result(self, timeout: timedelta | float | None = None) -> R:
        """Wait for the end: the value, or RunFailed, RunCancelled, RunTerminated, RunTimedOut.

        RunNotFound. timeout: a timedelta or seconds, default without end; waiting longer is a `TimeoutError`, whose
        text says what the run waits for; the run goes on. A blocked run is still waited for, with one warning in the
        log; a quarantined one is RunFailed. It can be asked again and again.
        """
        if timeout is None:
            return await self._result()
        seconds = duration(timeout, "timeout=").total_seconds()
        try:
            return await asyncio.wait_for(self._result(), seconds)
        except asyncio.TimeoutError:
            why = await self.why()
            if await self.status() in OVER:
                return await self._result()
            raise timed_out(f"The result did not come within {seconds:g} s. {why}") from None

    async def _result(self) -> R:
        core = self._core
        if not core.ready:
            await core.open()
        if self._key is None or (
            self._key not in core.recent and (core.shift is None or self._key not in core.shift.residents)
        ):
            row = await core.row(self.id)
            self._key = row.key
            if row.status in OVER:
                core.resolve(row.key, Ending(row.status, row.result, row.error))
            elif row.status == "blocked":
                core.warn_of(row)
        ending = await core.end_of(self._key)
        if ending.status == "completed":
            value: R = self._returns.decode(ending.result or "null", "the run's result")
            return value
        failure = _FAILURES[ending.status]
        error = None if not ending.error else msgspec.json.decode(ending.error, type=RecordedError)
        reason = error.message if error is not None and failure is not RunFailed else ""
        raise failure(self.id, info=await self.info(), cause=error, reason=reason)

    async def status(self) -> Status:
        """One word, as of now; RunNotFound."""
        return Status((await self._core.row(self.id)).status)

    async def info(self) -> RunInfo:
        """Everything known, as of now; RunNotFound."""
        return info_of(await self._core.row(self.id))

    async def history(self) -> list[Event]:
        """The events up to now, oldest first; RunNotFound. An activity has none."""
        core = self._core
        row = await core.row(self.id)
        return events_of([stored.decode(text) for text in await core.read(lambda: core.store.history(row.key))])

    async def why(self) -> str:
        """One sentence: what it waits for, since when, and who could move it; RunNotFound.

        Of a blocked run it is the whole report, of an ended one how and when.
        """
        core = self._core
        row = await core.row(self.id)

        def look() -> str:
            store = core.store
            held = row.status not in ENDED and store.held_open(row.key)
            if held:
                # A commit holds it too, for some milliseconds.
                time.sleep(0.05)
                held = store.held_open(row.key)
            around = why_.Surroundings(
                taken=why_.taken_from(store.announced(core.namespace)),
                worker=None if row.owner is None else store.worker(row.owner),
                mail=store.mailbox(row.key),
                children={child.id: child for child in store.children(row.key)},
                held=held,
            )
            return why_.why(row, store.now(), around)

        return core.held_up(row) or await core.read(look)

    async def signal(self, name: str, /, *args: Any, message_id: str | None = None) -> None:
        """Send a signal; kept when it returns. The same `message_id` twice is one signal.

        args: none, one, or several (the run then gets a list). message_id: default a new one. Refused with nothing
        written: RunNotFound, RunFinished after the end, PayloadError, LimitExceeded (a value too large or too deep, a
        mailbox that is full).
        """
        value = args[0] if len(args) == 1 else (list(args) if args else None)
        check_id(name, "the name of a signal")
        what = f'the value of signal "{name}"'
        # A dataclass and its like are written as their own type says, and read as `wait_signal(returns=…)` says.
        own = type(value) if hasattr(type(value), "__annotations__") else Any
        data = codec.encode(value, annotation=own, what=what, limits=self._core.limits)
        if message_id is None:
            message_id = entropy.drawn(12).hex()
        else:
            check_message_id(message_id)
        await self._send(
            Send(
                to=self._address(),
                id=message_id,
                kind="signal",
                name=name,
                data=data.decode(),
                limit=self._core.limits.mailbox,
            )
        )

    async def cancel(self, reason: str = "") -> None:
        """Ask the code to stop. Twice is once; nothing happens to an ended run. RunNotFound.

        It returns when the request is kept, before the run has stopped: its code may clean up, or go on. `result()`
        waits for the end. reason: any text, `ctx.cancel_reason`.
        """
        data = codec.encode({"reason": check_reason(reason)}, what="the reason", limits=self._core.limits)
        await self._send(Send(to=self._address(), id=CANCEL, kind="cancel", data=data.decode()), quiet=True)

    def _address(self) -> Address:
        return Address(namespace=self._core.namespace, id=self.id)

    async def _send(self, send: Send, *, quiet: bool = False) -> None:
        callers = callers_transaction.get()
        verdict: Any
        if callers is not None:
            await self._core.open()
            [verdict] = await callers.write(self._core.store, Batch(sends=[send]))
        else:
            verdict = await self._core.sent(send)
        if isinstance(verdict, NotFound):
            raise RunNotFound(self.id, namespace=self._core.namespace)
        if isinstance(verdict, Finished) and not quiet:
            raise RunFinished(self.id, status=verdict.status)
        if isinstance(verdict, MailboxFull):
            raise LimitExceeded(
                f"The mailbox of run {self.id} is full. It holds {verdict.limit} unread messages, which is the limit. "
                "Wait until the run has taken some.",
                what="the mailbox",
                limit=verdict.limit,
            )

    async def terminate(self, reason: str = "") -> None:
        """End the run without asking its code. Twice is once; nothing happens to an ended run. RunNotFound.

        It has ended when this returns; the children that end with it are asked to cancel. reason: any text, which
        RunTerminated tells.

        It waits for a transaction step of the run that is under way, and for a caller's open transaction that has
        signalled it: `StoreLocked` if that takes longer than 30 seconds.
        """
        core = self._core
        codec.encode(check_reason(reason), what="the reason", limits=core.limits)
        until = time.monotonic() + TERMINATES_WITHIN
        while True:
            row = await core.row(self.id)
            if row.status in ENDED:
                return
            turn = await core.read(
                functools.partial(
                    end_without_code,
                    core.store,
                    row,
                    "terminated",
                    reason=reason,
                    turn_id=f"{entropy.drawn(16).hex()}-1",
                )
            )
            verdict = await core.write(functools.partial(_add_turn, turn))
            if isinstance(verdict, Committed):
                if core.shift is not None:
                    core.shift.forget(row.key)
                core.resolve(row.key, Ending("terminated", None, turn.error))
                return
            busy = isinstance(verdict, Busy)
            if time.monotonic() >= until:
                break
            await asyncio.sleep(0.05 if busy else 0.005)
        what = f"Run {self.id} could not be terminated within {TERMINATES_WITHIN:g} s."
        if busy:
            raise StoreLocked(
                f"{what} An open transaction holds it: a transaction step of its own that still runs, or a caller's "
                "that has signalled it. Nothing was changed: try again when that has ended.",
                store=core.store.url,
            )
        raise PerdureError(f"{what} It changed each time between reading and writing. Try again.")


def _add_turn(turn: Turn, committer: Committer, answer: Callable[[Any], None]) -> None:
    committer.turn(turn, answer)
