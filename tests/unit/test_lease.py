"""A heart beats while its worker's loop answers; a worker that hangs lets its lease run out."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest

from perdure.core.turn import Lease
from perdure.stores.memory import MemoryStore
from perdure.worker.lease import HANGS, Heartbeat

TTL = 15.0


class Counting(MemoryStore):
    """Counts beats."""

    beats = 0

    def heartbeat(self, incarnation: str) -> Lease | None:
        self.beats += 1
        return Lease(now=0, until=0)


class Site:
    """A heart with a clock, and a loop that answers when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0
        self.store = Counting()
        self.owed: list[Callable[[], None]] = []
        self.heart = Heartbeat(
            self.store, "w", ttl=TTL, dead=lambda: None, clock=lambda: self.now, ask_loop=self.owed.append
        )

    def beats_after(self, seconds: float) -> bool:
        self.now += seconds
        before = self.store.beats
        self.heart.step()
        return self.store.beats > before

    def loop_runs(self) -> None:
        while self.owed:
            self.owed.pop()()


def test_a_loop_that_answers_keeps_its_worker_alive() -> None:
    site = Site()
    for _ in range(20):
        assert site.beats_after(TTL / 3)
        site.loop_runs()
    assert not site.heart.hangs


def test_a_process_that_was_stopped_gives_its_loop_time_again() -> None:
    site = Site()
    assert site.beats_after(0)
    assert site.beats_after(3 * HANGS * TTL), "nothing of it could answer"
    for _ in range(3 * HANGS):
        assert site.beats_after(TTL / 3)
    assert not site.beats_after(TTL / 3), "but this loop still does not"


def test_a_loop_that_does_not_answer_lets_the_lease_run_out(caplog: pytest.LogCaptureFixture) -> None:
    site = Site()
    assert site.beats_after(0)
    for _ in range(3 * HANGS):
        assert site.beats_after(TTL / 3), "a long call is no death"
    with caplog.at_level(logging.ERROR):
        assert not site.beats_after(TTL / 3)
    assert "blocking call in an async step" in caplog.text
    site.loop_runs()
    assert site.beats_after(TTL / 3), "it lives again, unless others have seen it die"
