"""What all stores of one process on one file share: the gate, the file of beats, and a bell for waiting threads.

Before a fork every store closes its connections, since SQLite's locks and shared memory must not be carried over; both
sides open them again at their next use.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Final, Protocol

from perdure.stores.sqlite.beats import Beats
from perdure.stores.sqlite.gate import Gate


class Tenant(Protocol):
    """A store, as its place sees it."""

    def release_connections(self) -> None:
        """Close what is open; the next use opens it again."""

    def forget_connections(self) -> None:
        """Let go of what is open without touching it: it is the parent's."""


class Bell:
    """Counts what somebody of this process may wait for."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = 0

    def ring(self) -> None:
        with self.changed:
            self.count += 1
            self.changed.notify_all()


class Place:
    """One database file, as this process sees it."""

    def __init__(self, path: str, file: tuple[int, int]) -> None:
        self.path: Final = path
        self.file: Final = file
        self.gate: Final = Gate(f"{path}-gate")
        self.beats: Final = Beats(f"{path}-workers")
        self.bell = Bell()
        self.tenants: weakref.WeakSet[Tenant] = weakref.WeakSet()

    def is_there(self) -> bool:
        """Whether the file is still under its name. SQLite would go on writing into one that nobody will ever open."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self.file

    def leave(self, tenant: Tenant) -> None:
        """A store is closed."""
        with _lock:
            self.tenants.discard(tenant)
            if not self.tenants and self.gate.threads.acquire(blocking=False):
                self.gate.close()
                self.gate.threads.release()
                if self.beats.close():
                    _places.pop(self.file, None)


_lock = threading.Lock()
_places: dict[tuple[int, int], Place] = {}
_held: list[Gate] = []  # by a thread that forks


def enter(path: str, tenant: Tenant) -> Place:
    """The place of an existing file, by any of its names."""
    with _lock:
        status = os.stat(path)
        file = (status.st_dev, status.st_ino)
        place = _places.get(file)
        if place is None or (not place.tenants and place.path != path):
            # The number of a file that is gone may come back as another file's.
            place = _places[file] = Place(path, file)
        place.tenants.add(tenant)
        return place


def _before_fork() -> None:
    _lock.acquire()
    for place in _places.values():
        # Nobody writes while we fork. A thread that holds the gate for too long keeps its connection.
        if place.gate.threads.acquire(timeout=5):
            _held.append(place.gate)
        for tenant in list(place.tenants):
            tenant.release_connections()


def _after_fork_in_parent() -> None:
    while _held:
        _held.pop().threads.release()
    _lock.release()


def _after_fork_in_child() -> None:
    global _lock
    _held.clear()
    for place in _places.values():
        place.gate.forget()
        place.beats.forget()
        place.bell = Bell()
        for tenant in list(place.tenants):
            tenant.forget_connections()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
