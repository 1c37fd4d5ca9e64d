"""Client and worker in one process: the embedded default. And the `Worker`, which only serves."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from perdure.client import Client, Core, _no_codec
from perdure.core.errors import StoreError
from perdure.core.limits import Limits, check_name
from perdure.core.retry import duration
from perdure.runtime.registry import Activity, Registry, Workflow, several
from perdure.stores.contract import Store
from perdure.worker.claiming import Housekeeper, Serving, Watcher
from perdure.worker.committer import CommitterThread
from perdure.worker.shift import Settings, Shift
from perdure.worker.suspects import Suspects, Unimportable, instructions
from perdure.worker.watchdog import Watchdog

if TYPE_CHECKING:
    from perdure import sync as sync_

log = logging.getLogger("perdure.worker")

GRACE = 30.0
"""Seconds that steps in flight get to end when a worker stops."""


class _Serves(Core):
    """A core with a shift: what it starts and is asked for, it also executes.

    told: what a child process needs to serve the same, if there shall be one for runs that killed two workers.
    importing: whether modules are being imported for what they serve, and nothing may begin to serve.
    """

    importing: ClassVar[bool] = False

    def __init__(self, store: str | Store | None, registry: Registry, settings: Settings) -> None:
        super().__init__(store, settings.namespace, settings.limits)
        self.registry = registry
        self.settings = settings
        self.make_shift: Callable[..., Shift] = Shift
        self.told: dict[str, Any] | Unimportable | None = None
        self._suspects: Suspects | None = None
        self._threads: list[Serving] = []
        self._watchdog: Watchdog | None = None
        self.left = ""
        """What was left behind by the last drain that ran out of its grace, and what becomes of it: a sentence."""

    async def serve(self) -> None:
        if _Serves.importing:
            raise RuntimeError(
                "A module that is imported for what it serves begins to serve by itself. A process that is given to "
                'one run would take others too. Put what starts the worker under `if __name__ == "__main__":`.'
            )
        assert self.loop is not None
        assert self.shift is not None
        shift = self.shift
        announcement = shift.announcement()
        await self.loop.run_in_executor(self.readers, self.store.announce, announcement)
        shift.begin(announcement)
        assert shift.heartbeat is not None
        shift.heartbeat.start()
        watcher = Watcher(self.store, shift)
        keeper = Housekeeper(self.store, shift)
        self._watchdog = Watchdog(shift.watched, self.limits.busy)
        self._threads = [
            Serving("perdure-watcher", watcher.step),
            Serving("perdure-housekeeper", keeper.step, pause=keeper.pause),
        ]
        if self.told is not None:
            self._suspects = Suspects(self.store, shift, self.told)
            self._threads.append(Serving("perdure-suspects", self._suspects.step, pause=self._suspects.pause))
        served = ", ".join(self.registry.workflows) or "no workflow"
        log.info("worker %s serves %s on %s (%s)", shift.settings.name, served, self.store.url, self.store.durability)

    def begin(self) -> None:
        assert self.loop is not None
        self.shift = self.make_shift(
            self.store,
            self.registry,
            self.settings,
            self.loop,
            kick=lambda: self.thread.kick() if self.thread is not None else None,
            ended_run=self.run_ended,
        )
        self.committer = self.shift.committer
        self.thread = CommitterThread(self.committer, self.loop, self.shift._read)

    async def drain(self, grace: float) -> bool:
        """Begin nothing new and wait until what is in flight has ended; False, and `left`, if the grace ran out."""
        shift = self.shift
        if shift is None:
            return True
        shift.drain()
        suspects = self._suspects
        deadline = time.monotonic() + grace
        while not shift.idle or (suspects is not None and not suspects.drained):
            if suspects is not None:
                suspects.ask_to_stop()
            if time.monotonic() >= deadline:
                self.left = _left(shift, grace)
                return False
            await asyncio.sleep(0.005)
        return True

    async def close(self) -> None:
        if self.closed or self.shift is None or not self.opened:
            await super().close()
            return
        assert self.loop is not None
        shift = self.shift
        for thread in self._threads:
            thread.stop()
        if self._watchdog is not None:
            self._watchdog.stop()
        shift.close()
        await shift.executor.leave_behind(0.5)
        if shift.heartbeat is not None:
            await self.loop.run_in_executor(self.readers, shift.heartbeat.stop)
        if self.thread is not None:
            await self.loop.run_in_executor(self.readers, self.thread.stop)
        self.store.wake()
        for thread in self._threads:
            await self.loop.run_in_executor(self.readers, thread.join, 5.0)
        if self._suspects is not None:
            await self.loop.run_in_executor(self.readers, self._suspects.close)
        # After the last turn: what is still ours goes back to others at once.
        try:
            await self.loop.run_in_executor(self.readers, self.store.retire, shift.incarnation)
        except StoreError as error:
            log.warning(
                "the runs of this worker could not be given back; others take them when its lease ends: %s", error
            )
        await super().close()


def _left(shift: Shift, grace: float) -> str:
    stuck = shift.committer.stuck
    if stuck is not None:
        return (
            f"The store could not be written within {grace:g} s: {stuck.error} What has come of its runs since is "
            "done again by whoever takes them."
        )
    return f"Not all steps ended within {grace:g} s. They are left to themselves, and repeated by others."


class Engine(Client):
    """A client and a worker in one process: `async with Engine("sqlite:///orders.db", workflows=[...]) as engine`.

    store: URL or store object; default `PERDURE_STORE`, else `sqlite:///perdure.db`.
    workflows, activities: decorated functions, or modules that hold some; it serves what it is given.
    namespace: whose runs it starts, sees and takes; default "default". queues: whose work it takes; default the one
        called "default".
    concurrency: steps and activities executing at once; default 256. threads: for sync ones; default 32.
    resident: runs kept in memory; default 10,000, 0 keeps none between their turns.
    lease: a timedelta or seconds after which a worker that is not heard of is taken for dead; default 15.
    limits: default `Limits()`. name: what logs and `why` call this worker; default the machine's. codec: later.
    Closing drains: steps in flight get 30 seconds to end, then the runs go back to other workers at once.
    ValueError or TypeError for a setting that is none; StoreError where the store cannot be opened.
    """

    def __init__(
        self,
        store: str | Store | None = None,
        *,
        workflows: Iterable[Workflow[Any, Any] | ModuleType] = (),
        activities: Iterable[Activity[Any, Any] | ModuleType] = (),
        namespace: str = "default",
        queues: Sequence[str] = ("default",),
        concurrency: int = 256,
        threads: int = 32,
        resident: int = 10_000,
        lease: timedelta | float = 15,
        limits: Limits | None = None,
        codec: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(store, namespace=namespace, limits=limits, codec=codec)
        self._core = _serving(
            store, workflows, activities, namespace, queues, concurrency, threads, resident, lease, limits, name
        )

    @property
    def sync(self) -> sync_.Engine:
        """The blocking face of the same open engine, for threads that are not its loop's."""
        face: Any = super().sync
        engine: sync_.Engine = face
        return engine

    async def close(self) -> None:
        """Drain, hand the runs back, give the store back. Twice is once."""
        core = self._core
        assert isinstance(core, _Serves)
        if not core.closed and core.loop is not None and not await core.drain(GRACE):
            log.warning("closing: %s", core.left)
        await core.close()


def _serving(
    store: str | Store | None,
    workflows: Iterable[Workflow[Any, Any] | ModuleType],
    activities: Iterable[Activity[Any, Any] | ModuleType],
    namespace: str,
    queues: Sequence[str],
    concurrency: int,
    threads: int,
    resident: int,
    lease: timedelta | float,
    limits: Limits | None,
    name: str | None,
) -> _Serves:
    for what, value, least in (("concurrency", concurrency, 1), ("threads", threads, 1), ("resident", resident, 0)):
        whole: Any = value  # Callers are not all type-checked.
        if not isinstance(whole, int) or isinstance(whole, bool) or whole < least:
            raise ValueError(
                f"{what}={value!r} is not a whole number of at least {least}. It says how many of them there may be. "
                "Leave it out for the default, or give a number."
            )
    return _Serves(
        store,
        Registry(workflows, activities),
        Settings(
            namespace=namespace,
            queues=[check_name(queue, "queues=") for queue in several(queues, "queues=")],
            concurrency=concurrency,
            threads=threads,
            resident=resident,
            lease=duration(lease, "lease=", zero=False).total_seconds(),
            limits=limits,
            name=None if name is None else check_name(name, "name="),
        ),
    )


class Worker:
    """Serves workflows and activities: `await run()` until SIGTERM or `stop()`; once, another needs a new Worker.

    Takes what `Engine` takes, with the same defaults. `drained`: after `run`, whether all steps in flight ended.
    """

    def __init__(
        self,
        store: str | Store | None = None,
        *,
        workflows: Iterable[Workflow[Any, Any] | ModuleType] = (),
        activities: Iterable[Activity[Any, Any] | ModuleType] = (),
        namespace: str = "default",
        queues: Sequence[str] = ("default",),
        concurrency: int = 256,
        threads: int = 32,
        resident: int = 10_000,
        lease: timedelta | float = 15,
        limits: Limits | None = None,
        codec: Any = None,
        name: str | None = None,
    ) -> None:
        _no_codec(codec)
        self._given = several(workflows, "workflows="), several(activities, "activities=")
        self._core = _serving(
            store, *self._given, namespace, queues, concurrency, threads, resident, lease, limits, name
        )
        self._core.settings.suspects = "apart"
        self._stopping: asyncio.Event | None = None
        self._stopped = False
        self._grace = GRACE
        self.drained = True

    async def run(self) -> None:
        """Serve until `stop()`, SIGTERM or SIGINT; then drain and hand the runs back. `drained` says if all ended.

        Steps in flight get 30 seconds, or what `stop` says. A second signal ends the process at once. A second call is
        a RuntimeError. StoreError where the store cannot be opened.
        """
        self._stopping = asyncio.Event()
        if self._stopped:
            self._stopping.set()
        if self._core.settings.suspects == "apart":
            self._core.told = self._instructions()
        loop = asyncio.get_running_loop()
        installed = []
        # Before anything is taken: from then on a signal must not end the process in the middle of it.
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                loop.add_signal_handler(number, self._stopping.set)
                installed.append(number)
            except (NotImplementedError, RuntimeError, ValueError):
                continue  # Not the main thread: whoever runs us calls stop().
        try:
            await self._core.open()
            await self._stopping.wait()
            for number in installed:
                # A second signal ends the process at once.
                loop.remove_signal_handler(number)
            installed.clear()
            log.info("worker %s is draining", self._core.settings.name)
            self.drained = await self._core.drain(self._grace)
            if not self.drained:
                log.warning("worker %s leaves: %s", self._core.settings.name, self._core.left)
        finally:
            for number in installed:
                loop.remove_signal_handler(number)
            await self._core.close()

    async def stop(self, grace: timedelta | float = GRACE) -> None:
        """Ask `run()` to end, and return at once. Twice is once; before `run()`, that ends as soon as it has begun.

        grace: a timedelta or seconds that steps in flight get; default 30. Then the runs go back to others.
        """
        self._grace = duration(grace, "grace=").total_seconds()
        self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        self._stopped = True
        if self._stopping is not None:
            self._stopping.set()

    def _instructions(self) -> dict[str, Any] | Unimportable:
        """For the child process of a run that killed two workers: taken now, as files and folders are named here."""
        try:
            return instructions(self._core.settings, *self._given, grace=GRACE)
        except Unimportable as reason:
            return reason
