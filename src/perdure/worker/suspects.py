"""Gives runs that killed two workers a child process of their own, so that the others go on beside them.

`Suspects` is the worker's half: its `step` asks the store whether such a run waits, starts a child for it, and looks
after the children. The other half, what a child does, is `perdure/solitary.py`. They are joined by a socket, which
is the child's stdin: down it goes one line that says what to serve and where; up come `took` with the child's
incarnation when it has a run, and `free` when that has left in peace; and its end tells the child that the worker is
gone.

A child can only serve what it can import, by the names of modules and of variables in them. Where that cannot be
(a workflow made inside a function, a store in memory), or children that were tried came to nothing, the worker goes
on as an embedded engine does: it takes the run when nothing else of its is executing.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from types import ModuleType
from typing import Any, Final

from perdure.core.errors import PerdureError
from perdure.core.turn import Claim
from perdure.stores.contract import Store
from perdure.worker.shift import Settings, Shift

log = logging.getLogger("perdure.worker")

SIDE_BY_SIDE: Final = 4
"""Children at once: one whose run loops for ever must not keep the other suspects waiting."""
LOOK_SOON, LOOK_SELDOM = 0.25, 15.0
"""Seconds between two looks whether a run that killed two workers waits."""
NEAR: Final = 10.0
"""Seconds for which it is looked for often when a worker has begun or has died."""
MOST_FAILURES: Final = 3
"""So many children in a row that ended without taking a run: then this process takes suspects itself."""
FIRST_BACK_OFF: Final = 1.0
TAKES_WITHIN: Final = 60.0
"""Seconds after which a child that has no run is ended: nobody can say what it waits for."""
TOOK: Final = "took"
"""The first word of what a child says once it has a run; the second is its incarnation."""
FREE: Final = "free"
"""What it says when it has none any more, and looks for another."""
UNFIT: Final = 75
"""Exit code of a child that cannot serve what it was told to."""


class Unimportable(Exception):
    """Another process would not find what is served here; why, as the end of a sentence."""


def instructions(
    settings: Settings, workflows: Sequence[Any], activities: Sequence[Any], *, grace: float
) -> dict[str, Any]:
    """Everything a child has to know but the store, as plain JSON; `Unimportable` if there can be no child.

    workflows, activities: what the worker was given, decorated functions and whole modules. grace:
    seconds that what executes gets to end when the worker is gone.
    """
    root = logging.getLogger()
    return {
        "python": _preparation(),
        "workflows": _named(workflows),
        "activities": _named(activities),
        "namespace": settings.namespace,
        "queues": list(settings.queues),
        "concurrency": settings.concurrency,
        "threads": settings.threads,
        "resident": settings.resident,
        "lease": settings.lease,
        "grace": grace,
        "limits": asdict(settings.limits),
        "name": settings.name,
        "log": root.level if root.handlers else None,
    }


def _preparation() -> dict[str, Any]:
    """How the child becomes like this process: what `multiprocessing.spawn.prepare` takes.

    Not made by its `get_preparation_data`, which decides the program's start method for it.
    """
    here = os.getcwd()
    python: dict[str, Any] = {
        "sys_path": [place or here for place in sys.path],
        "sys_argv": list(sys.argv),
        "dir": here,
    }
    main: Any = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        python["init_main_from_name"] = spec.name
    elif getattr(main, "__file__", None) is not None:
        python["init_main_from_path"] = os.path.abspath(main.__file__)
    return python


def _named(given: Iterable[Any]) -> list[dict[str, Any]]:
    """Where another process finds these: a module, its file, a variable in it (None: everything in it)."""
    found = []
    for each in given:
        module = each if isinstance(each, ModuleType) else sys.modules.get(each.__module__)
        variable = None
        if module is not each:
            variable = next((name for name, value in vars(module).items() if value is each), None)
            if module is None or variable is None:
                raise Unimportable(f"{each!r} is no variable of a module")
        found.append({"module": module.__name__, "file": getattr(module, "__file__", None), "variable": variable})
    return found


class Child:
    """One process for one suspect at a time. line: its instructions."""

    def __init__(self, line: bytes) -> None:
        self.asked = False
        self.incarnation: str | None = None
        self.since = time.monotonic()
        self._heard = b""
        self.socket, theirs = socket.socketpair()
        try:
            # A session of its own: Ctrl-C in a terminal reaches the worker alone, which passes it on.
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                [sys.executable, "-m", "perdure.solitary"], stdin=theirs.fileno(), start_new_session=True
            )
        except BaseException:
            self.socket.close()
            raise
        finally:
            theirs.close()
        try:
            self.socket.settimeout(5)
            self.socket.sendall(line)
        except OSError:
            log.debug("process %d was gone before it was told what to do", self.process.pid)
        self.socket.setblocking(False)

    @property
    def has_one(self) -> bool:
        """Whether it has a run, as far as it has said; `incarnation` is then under which."""
        try:
            while more := self.socket.recv(4096):
                self._heard += more
        except OSError:
            pass  # nothing more now, or it is gone
        said = self._heard.decode().split("\n")[:-1]
        for line in said:
            if line.startswith(TOOK):
                self.incarnation = line.split(" ")[1]
        return bool(said) and said[-1] != FREE

    @property
    def code(self) -> int | None:
        """How it ended: its exit code, negative for a signal; None as long as it lives."""
        return self.process.poll()

    def ask_to_stop(self) -> None:
        """What executes may end, then its run goes back. Twice is once."""
        if not self.asked and self.code is None:
            self.asked = True
            self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End it at once, if it lives. Twice is once."""
        if self.code is None:
            self.process.kill()
        self.process.wait()
        self.socket.close()


class Suspects:
    """See the module. `step` belongs to one thread; `ask_to_stop` and `drained` to the loop; `close` comes last.

    told: the instructions of a child, or why there can be none. start: a child for them.
    """

    def __init__(
        self,
        store: Store,
        shift: Shift,
        told: dict[str, Any] | Unimportable,
        *,
        start: Callable[[bytes], Child] = Child,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store
        self.shift = shift
        self.children: list[Child] = []
        self._told = told
        self._start = start
        self._monotonic = monotonic
        self._failures = 0
        self._not_before = 0.0

    def step(self) -> int:
        """One look; how many children were started."""
        self._mind()
        shift = self.shift
        if shift.draining or shift.closed or shift.settings.suspects != "apart":
            return 0
        if len(self.children) >= SIDE_BY_SIDE or self._monotonic() < self._not_before:
            return 0
        if not all(child.has_one for child in self.children):
            return 0  # The suspect that is seen now may be the one that it is about to take.
        if not self.store.suspects(self._wanted()):
            return 0
        try:
            if isinstance(self._told, Unimportable):
                raise self._told
            url = self.store.elsewhere()
            if url is None:
                raise Unimportable("nobody else can open its store")
            child = self._start(json.dumps({**self._told, "store": url}).encode() + b"\n")
        except (Unimportable, OSError) as error:
            self._give_up(str(error))
            return 0
        self.children.append(child)
        if shift.draining:
            child.ask_to_stop()
        log.warning("a run that killed two workers is to be executed alone, in process %d", child.process.pid)
        return 1

    def pause(self) -> float:
        """Seconds until the next look: often while one may be near, because somebody has died or a child is at work."""
        near = self.children or self.shift.monotonic() - self.shift.reaped_at < NEAR
        return LOOK_SOON if near else LOOK_SELDOM

    def ask_to_stop(self) -> None:
        """The worker drains, and so do its children. Twice is once."""
        for child in list(self.children):
            child.ask_to_stop()

    @property
    def drained(self) -> bool:
        """Whether every child has ended."""
        return all(child.code is not None for child in list(self.children))

    def close(self) -> None:
        """End the children that are left, at once: their runs go back first, so that this is no strike."""
        while self.children:
            child = self.children.pop()
            if child.code is None and child.has_one and child.incarnation is not None:
                try:
                    self.store.retire(child.incarnation)
                except PerdureError as error:
                    log.warning("the run of process %d was not handed back: %s", child.process.pid, error)
            child.close()

    def _mind(self) -> None:
        """Take leave of children that have ended, and end those that came to nothing."""
        for child in self.children:
            never = not child.has_one and child.incarnation is None
            if never and child.code is None and self._monotonic() - child.since > TAKES_WITHIN:
                log.warning("process %d has no run after %g s, and is ended", child.process.pid, TAKES_WITHIN)
                child.process.kill()
                child.process.wait()
        for child in [child for child in self.children if child.code is not None]:
            code, had_one = child.code, child.has_one
            assert code is not None
            self.children.remove(child)
            child.close()
            if child.incarnation is None and code != 0:
                self._failed(child, code)
                continue
            self._failures = 0
            if code != 0 and had_one:
                log.error("the run that was executed alone ended process %d (%s)", child.process.pid, _how(code))
                # Its strike is counted now, and not only when somebody looks for the dead.
                self.store.reap()

    def _failed(self, child: Child, code: int) -> None:
        self._failures += 1
        self._not_before = self._monotonic() + FIRST_BACK_OFF * 2.0 ** (self._failures - 1)
        log.warning("process %d ended (%s) before it had a run", child.process.pid, _how(code))
        if code == UNFIT or self._failures >= MOST_FAILURES:
            self._give_up("a process of its own could not serve it")

    def _give_up(self, reason: str) -> None:
        self.shift.settings.suspects = "here"
        log.warning(
            "Runs that killed two workers cannot have a process of their own: %s. This worker executes them itself, "
            "when nothing else of its is executing. Serve importable modules from a store that others can open.",
            reason,
        )

    def _wanted(self) -> Claim:
        shift = self.shift
        return Claim(
            incarnation=shift.incarnation,
            namespace=shift.settings.namespace,
            queues=shift.settings.queues,
            workflows=list(shift.registry.workflows),
            activities=list(shift.registry.activities),
        )


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
