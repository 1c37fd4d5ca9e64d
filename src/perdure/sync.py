"""The same names without `await`: `Engine`, `Client`, `Worker`, `Context`, `RunHandle`.

Each waits for its async twin, which lives on a loop in a thread of its own (or, for `.sync` of an open engine or
client, on that one's loop). There is no second implementation.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Future
from datetime import datetime, timedelta
from queue import SimpleQueue
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypedDict, TypeVar, overload

from perdure.client import Client as AsyncClient
from perdure.client import RunHandle as AsyncHandle
from perdure.client import callers_transaction
from perdure.core.limits import Limits
from perdure.core.status import Status
from perdure.core.turn import Batch, Verdict
from perdure.engine import GRACE
from perdure.engine import Engine as AsyncEngine
from perdure.engine import Worker as AsyncWorker
from perdure.info import Event, RunInfo, RunPage
from perdure.runtime import inside
from perdure.runtime.context import SyncContext as Context
from perdure.runtime.context import SyncPending as Pending
from perdure.runtime.registry import Activity, Workflow
from perdure.stores.contract import Store

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Client", "Context", "Engine", "Pending", "RunHandle", "Worker"]

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound="Client")
T = TypeVar("T")


class _Options(TypedDict, total=False):
    """What `Client.options` takes besides `connection`."""

    id: str | None
    idempotency_key: str | None
    idempotency_ttl: timedelta | float
    if_exists: str
    at: datetime | None
    delay: timedelta | float | None
    queue: str | None
    timeout: timedelta | float | None


class _ClientSettings(TypedDict, total=False):
    """What `Client` takes besides the store."""

    namespace: str
    limits: Limits | None
    codec: Any


class _EngineSettings(_ClientSettings, total=False):
    """What `Engine` and `Worker` take besides the store."""

    workflows: Iterable[Workflow[Any, Any] | ModuleType]
    activities: Iterable[Activity[Any, Any] | ModuleType]
    queues: Sequence[str]
    concurrency: int
    threads: int
    resident: int
    lease: timedelta | float
    name: str | None


class _Filters(TypedDict, total=False):
    """What `Client.list_runs` takes."""

    workflow: str | None
    status: Status | str | None
    parent: str | None
    created_after: datetime | None
    created_before: datetime | None
    limit: int
    cursor: str | None


class _Callers:
    """The caller's own transaction, for one call: what is to be written comes back to the thread that has it open."""

    def __init__(self, connection: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._connection = connection
        self._loop = loop
        self._asked: SimpleQueue[tuple[Store, Batch, asyncio.Future[list[Verdict]]] | None] = SimpleQueue()

    async def write(self, store: Store, batch: Batch) -> list[Verdict]:
        answer: asyncio.Future[list[Verdict]] = self._loop.create_future()
        self._asked.put((store, batch, answer))
        return await answer

    def serve(self, call: Future[T]) -> T:
        """Write what the call asks for until it has ended; its result."""
        call.add_done_callback(lambda done: self._asked.put(None))
        try:
            while (asked := self._asked.get()) is not None:
                self._write(*asked)
        except KeyboardInterrupt:
            call.cancel()
            raise
        return call.result()

    def _write(self, store: Store, batch: Batch, answer: asyncio.Future[list[Verdict]]) -> None:
        try:
            verdicts = store.write_on(self._connection, batch)
        except Exception as error:
            self._loop.call_soon_threadsafe(answer.set_exception, error)
        else:
            inside.note(self._connection)
            self._loop.call_soon_threadsafe(answer.set_result, verdicts)


class _Loop:
    """Where the async twin lives: somebody else's running loop, or one in a thread of ours."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None, *, pid: int = 0) -> None:
        self._loop = loop
        self._pid = pid
        self._thread: threading.Thread | None = None
        self.over = False
        self._lock = threading.Lock()

    def wait(self, coroutine: Coroutine[Any, Any, T], connection: Any = None) -> T:
        """Run the coroutine there and wait for it here. connection: what it writes is written here, on this one."""
        try:
            loop = self._running()
            inside.refuse_in_body(getattr(loop, "_thread_id", None))
        except RuntimeError:
            coroutine.close()
            raise
        try:
            here: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        if here is loop:
            coroutine.close()
            raise RuntimeError(
                "A blocking call was made on the event loop's own thread. It would wait for itself for ever. "
                "Use the async name with await, or call it from another thread."
            )
        if connection is not None:
            callers = _Callers(connection, loop)
            # The coroutine runs in a copy of this context.
            token = callers_transaction.set(callers)
            try:
                future = asyncio.run_coroutine_threadsafe(coroutine, loop)
            finally:
                callers_transaction.reset(token)
            return callers.serve(future)
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def soon(self, callback: Any) -> None:
        """Have the loop call something, and do not wait for it."""
        self._running().call_soon_threadsafe(callback)

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is not None and self._pid != os.getpid():
            raise RuntimeError(
                "This client was opened in another process, before a fork. The loop that answers it did not come "
                "along. Make a new one in this process."
            )
        with self._lock:
            if self.over or (self._loop is not None and self._loop.is_closed()):
                raise RuntimeError("This client was closed. Nothing can be asked of it any more. Make a new one.")
            if self._loop is None:
                self._pid = os.getpid()
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="perdure-loop", daemon=True)
                self._thread.start()
            return self._loop

    def stop(self) -> None:
        """End our thread; somebody else's loop is left alone. Twice is once."""
        with self._lock:
            if self._thread is not None and self._loop is not None:
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()
                self._loop.close()
                self._thread = None
                self.over = True


class Client:
    """As `perdure.Client`, without `await`; from any thread."""

    _async: AsyncClient
    _connection: Any = None

    def __init__(self, store: str | Store | None = None, **settings: Unpack[_ClientSettings]) -> None:
        self._loop = _Loop()
        self._async = AsyncClient(store, **settings)

    @classmethod
    def _over(cls: type[C], twin: AsyncClient, loop: _Loop) -> C:
        face = object.__new__(cls)
        face._loop = loop
        face._async = twin
        return face

    def __enter__(self: C) -> C:
        self._loop.wait(self._async.__aenter__())
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """As `Client.close`."""
        if self._loop.over:
            return
        self._loop.wait(self._async.close())
        self._loop.stop()

    def options(self: C, *, connection: Any = None, **options: Unpack[_Options]) -> C:
        """As `Client.options`. connection: of the store's own database, with a transaction of yours.

        Starts, and `signal` and `cancel` of the handles, are then part of that transaction: workers see them after
        your commit, and what you roll back never happened. A `sqlite3.Connection` as Python makes it begins a
        transaction by itself; one with `isolation_level=None` must have begun one.
        """
        view = self._over(self._async.options(**options), self._loop)
        view._connection = self._connection if connection is None else connection
        return view

    @overload
    def start(self, workflow: Workflow[P, R], /, *args: P.args, **kwargs: P.kwargs) -> RunHandle[R]: ...
    @overload
    def start(self, workflow: str, /, *args: Any, **kwargs: Any) -> RunHandle[Any]: ...
    def start(self, workflow: Any, /, *args: Any, **kwargs: Any) -> RunHandle[Any]:
        """As `Client.start`."""
        connection = self._connection
        if connection is None:
            inside.refuse("start()")
        run = self._loop.wait(self._async.start(workflow, *args, **kwargs), connection)
        return RunHandle(run, self._loop, connection)

    @overload
    def handle(self, run_id: str, /, *, returns: type[T]) -> RunHandle[T]: ...
    @overload
    def handle(self, run_id: str, /, *, returns: Any = Any) -> RunHandle[Any]: ...
    def handle(self, run_id: str, /, *, returns: Any = Any) -> RunHandle[Any]:
        """As `Client.handle`."""
        return RunHandle(self._async.handle(run_id, returns=returns), self._loop, self._connection)

    def list_runs(self, **filters: Unpack[_Filters]) -> RunPage:
        """As `Client.list_runs`."""
        return self._loop.wait(self._async.list_runs(**filters))

    def counts(self, *, workflow: str | None = None, queue: str | None = None) -> dict[Status, int]:
        """As `Client.counts`."""
        return self._loop.wait(self._async.counts(workflow=workflow, queue=queue))


class Engine(Client):
    """As `perdure.Engine`, without `await`: `with Engine(...) as engine`."""

    def __init__(self, store: str | Store | None = None, **settings: Unpack[_EngineSettings]) -> None:
        self._loop = _Loop()
        self._async = AsyncEngine(store, **settings)


class Worker:
    """As `perdure.Worker`, without `await`: `run()` blocks until SIGTERM, or until another thread calls `stop()`."""

    def __init__(self, store: str | Store | None = None, **settings: Unpack[_EngineSettings]) -> None:
        self._loop = _Loop()
        self._async = AsyncWorker(store, **settings)

    def run(self) -> None:
        """As `Worker.run`. Signals reach the main thread only: in another, `stop()` is the only end."""
        before: dict[int, Any] = {}

        def asked(number: int, frame: Any) -> None:
            # A second signal ends the process at once.
            restore()
            self._loop.soon(self._async._ask_to_stop)

        def restore() -> None:
            while before:
                signal.signal(*before.popitem())

        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, asked) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._loop.wait(self._async.run())
        finally:
            restore()
            self._loop.stop()

    def stop(self, grace: timedelta | float = GRACE) -> None:
        """As `Worker.stop`."""
        if not self._loop.over:
            self._loop.wait(self._async.stop(grace))


class RunHandle(Generic[R]):
    """As `perdure.RunHandle`, without `await`."""

    def __init__(self, twin: AsyncHandle[R], loop: _Loop, connection: Any = None) -> None:
        self._async = twin
        self._loop = loop
        self._connection = connection

    @property
    def id(self) -> str:
        """The run id."""
        return self._async.id

    def __repr__(self) -> str:
        return repr(self._async)

    def result(self, timeout: timedelta | float | None = None) -> R:
        """As `RunHandle.result`."""
        inside.refuse("result()")
        return self._loop.wait(self._async.result(timeout))

    def status(self) -> Status:
        """As `RunHandle.status`."""
        return self._loop.wait(self._async.status())

    def info(self) -> RunInfo:
        """As `RunHandle.info`."""
        return self._loop.wait(self._async.info())

    def history(self) -> list[Event]:
        """As `RunHandle.history`."""
        return self._loop.wait(self._async.history())

    def why(self) -> str:
        """As `RunHandle.why`."""
        return self._loop.wait(self._async.why())

    def signal(self, name: str, /, *args: Any, message_id: str | None = None) -> None:
        """As `RunHandle.signal`."""
        if self._connection is None:
            inside.refuse("signal()")
        self._loop.wait(self._async.signal(name, *args, message_id=message_id), self._connection)

    def cancel(self, reason: str = "") -> None:
        """As `RunHandle.cancel`."""
        if self._connection is None:
            inside.refuse("cancel()")
        self._loop.wait(self._async.cancel(reason), self._connection)

    def terminate(self, reason: str = "") -> None:
        """As `RunHandle.terminate`; RuntimeError on a handle of `options(connection=)`."""
        inside.refuse("terminate()")
        if self._connection is not None:
            raise RuntimeError(
                "terminate was called on a handle of options(connection=). It acts at once, and would not be undone by "
                "a rollback. Use a handle without that option, or cancel, which is part of the transaction."
            )
        self._loop.wait(self._async.terminate(reason))


def face_of(twin: AsyncClient) -> Client:
    """The blocking face of an open client or engine, for threads that are not its loop's."""
    loop = twin._core.loop
    if loop is None:
        raise RuntimeError(
            "The sync face was asked of a client that is not open. It needs the loop on which the client lives. "
            "Enter the client first, or use perdure.sync."
        )
    kind = Engine if isinstance(twin, AsyncEngine) else Client
    face: Client = kind._over(twin, _Loop(loop, pid=twin._core.pid))
    return face
