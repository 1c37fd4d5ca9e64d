"""The process that a worker gives to a run that killed two workers: `python -m perdure.solitary`, started by it alone.

It reads one line of instructions from its stdin, imports what it is to serve, and takes one run with two strikes and
nothing else. The suspicion is settled when the run has made progress, has ended, waits, or has killed this process.
Whatever the run does, it does to this process: a crash, an endless loop, memory that runs out. If it has left in peace
and left nothing behind, the process takes the next suspect; it ends when there is none.

It does not outlive its worker: stdin is a socket whose end means that the worker is gone, and an alarm ends a process
whose interpreter has not come back for twice the lease. Until then its lease has run out, and others have its run.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from multiprocessing import spawn
from types import ModuleType
from typing import Any, Final

from perdure.core import events as ev
from perdure.core.errors import StoreError
from perdure.core.limits import Limits
from perdure.core.turn import Announcement, Head
from perdure.engine import Worker, _Serves
from perdure.worker.shift import Shift
from perdure.worker.suspects import FREE, TOOK, UNFIT

log = logging.getLogger("perdure.worker")

LOOKS_FOR: Final = 5.0
"""Seconds after which it ends if there is no suspect."""
LEAVES_WITHIN: Final = 0.01
"""Seconds between two looks whether a run has left."""
UNTIL_KILLED: Final = 86_400.0
"""Seconds that what executes gets after SIGTERM: the worker knows how many, and ends this process after them."""


class Alone(Shift):
    """A shift for one run."""

    def __init__(self, worker: Worker, link: socket.socket, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._worker = worker
        self._link = link
        self._has_one = False
        self._leaving: asyncio.TimerHandle | None = None

    def _take_up(self, head: Head, events: Sequence[ev.Event]) -> None:
        if not self._has_one:
            self._has_one = True
            # Before its code is touched, which may be the end.
            self._say(f"{TOOK} {self.incarnation}")
        super()._take_up(head, events)

    def no_longer_alone(self) -> None:
        super().no_longer_alone()
        # Later: this is called in the middle of a turn whose steps have not begun yet.
        self.loop.call_soon(self._settled)

    def begin(self, announcement: Announcement) -> None:
        super().begin(announcement)
        self.wait_for_one()

    def wait_for_one(self) -> None:
        """End soon, unless there is a suspect to take."""
        self._leaving = self.loop.call_later(LOOKS_FOR, self._leave)

    def _settled(self) -> None:
        """The suspicion is settled: what executes may end, then the run is any worker's."""
        if self._leaving is not None:
            self._leaving.cancel()
        self.drain()
        self._next()

    def _next(self) -> None:
        if self._worker._stopped or self.closed:
            return
        if self.residents or self.activities or not self.idle:
            self.loop.call_later(LEAVES_WITHIN, self._next)
        elif self.threads.at_rest:
            self._has_one = False
            self._say(FREE)
            self.draining = False
            self.store.wake()
            self.wait_for_one()
        else:
            # A function that it left behind still runs, and could harm the next.
            self._leave()

    def _leave(self) -> None:
        if not self._has_one or self.draining:
            self.drain()
            self._worker._ask_to_stop()

    def _say(self, text: str) -> None:
        try:
            self._link.sendall(f"{text}\n".encode())
        except OSError:
            log.debug("the worker is gone")


def found(named: dict[str, Any]) -> Any:
    """The module, or the variable of it, that the worker serves."""
    module = _module(named["module"], named["file"])
    return module if named["variable"] is None else getattr(module, named["variable"])


def _module(name: str, file: str | None) -> ModuleType:
    there = sys.modules.get(name)
    if there is None:
        try:
            there = importlib.import_module(name)
        except ModuleNotFoundError as missing:
            if missing.name != name or file is None:
                raise
    if there is not None and (file is None or name == "__main__" or getattr(there, "__file__", None) == file):
        return there
    # The worker loaded it from a file that no import would find.
    assert file is not None
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def worker_of(told: dict[str, Any], link: socket.socket) -> Worker:
    """The worker that serves what the instructions say."""
    worker = Worker(
        told["store"],
        workflows=[found(each) for each in told["workflows"]],
        activities=[found(each) for each in told["activities"]],
        namespace=told["namespace"],
        queues=told["queues"],
        concurrency=told["concurrency"],
        threads=told["threads"],
        resident=told["resident"],
        lease=told["lease"],
        limits=Limits(**told["limits"]),
        name=f"{told['name'][:200]} (alone, process {os.getpid()})",
    )
    worker._core.settings.suspects = "only"
    worker._core.make_shift = functools.partial(Alone, worker, link)
    worker._grace = UNTIL_KILLED
    return worker


async def serve(worker: Worker, link: socket.socket, *, lease: float, grace: float) -> None:
    """Serve one suspect, then end the process: threads that it left behind are not waited for."""
    minding = (worker, asyncio.get_running_loop(), link, lease, grace)
    threading.Thread(target=_mind_the_worker, args=minding, name="perdure-parent", daemon=True).start()
    await worker.run()
    end(0)


def _mind_the_worker(
    worker: Worker, loop: asyncio.AbstractEventLoop, link: socket.socket, lease: float, grace: float
) -> None:
    """Put the alarm off as long as this interpreter lives, until the worker's end of the link is closed."""
    while True:
        signal.setitimer(signal.ITIMER_REAL, 2 * lease)
        readable, _, _ = select.select([link], [], [], lease / 4)
        if readable and _at_its_end(link):
            break
    if worker._stopped or (worker._stopping is not None and worker._stopping.is_set()):
        # It was asked to stop, and has gone without waiting for us: a second signal.
        shift = worker._core.shift
        try:
            if shift is not None:
                worker._core.store.retire(shift.incarnation)
        except StoreError as error:
            log.warning("the run was not handed back: %s", error)
        end(1)
    asyncio.run_coroutine_threadsafe(worker.stop(grace), loop)
    while True:
        signal.setitimer(signal.ITIMER_REAL, 2 * lease)
        threading.Event().wait(lease / 4)


def _at_its_end(link: socket.socket) -> bool:
    try:
        return not link.recv(64)
    except OSError:
        # It was killed before it had read all we said.
        return True


def end(code: int) -> None:
    """End the process, with what was printed and nothing else."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass  # nobody reads it any more
    os._exit(code)


def main() -> None:
    """See the module."""
    link = socket.socket(fileno=os.dup(0))
    # Code that reads from its stdin must not read what is meant for us.
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    try:
        # When memory runs out, the kernel is to end this process before any other.
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:
            score.write("1000")
    except OSError:
        log.debug("this system does not let a process offer itself")
    try:
        with link.makefile("rb") as lines:
            line = lines.readline()
    except OSError:
        line = b""
    if not line.endswith(b"\n"):
        end(0)  # the worker was gone before it had said what to do
    told = json.loads(line)
    try:
        _Serves.importing = True
        spawn.prepare(told["python"])
        worker = worker_of(told, link)
        _Serves.importing = False
    except BaseException:
        logging.basicConfig()
        log.exception("a process of its own cannot serve what its worker serves")
        end(UNFIT)
        raise
    if told["log"] is not None and not logging.getLogger().handlers:
        logging.basicConfig(level=told["log"], format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(serve(worker, link, lease=told["lease"], grace=told["grace"]))


if __name__ == "__main__":
    main()
