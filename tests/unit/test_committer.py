"""The committer: what is written by whom, and what an answer is worth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from perdure.core.errors import StoreLocked
from perdure.core.turn import Address, Batch, Begun, Existing, Finished, Send, Verdict
from perdure.stores.memory import MemoryStore
from perdure.testing.conformance.story import start
from perdure.worker.committer import FEW, QUICKLY, Committer, CommitterThread


class Slow(MemoryStore):
    """A store that is being written by somebody else as long as `busy`; it notes who wrote what."""

    def __init__(self) -> None:
        super().__init__()
        self.busy = False
        self.calls: list[str] = []

    def write_at_once(self, batch: Batch) -> list[Verdict]:
        self.calls.append("at once")
        if self.busy:
            raise StoreLocked("Somebody else is writing.", store=self.url)
        return super().write(batch)

    def write(self, batch: Batch) -> list[Verdict]:
        self.calls.append("thread")
        return super().write(batch)


def committer(store: Slow) -> tuple[Committer, list[Any]]:
    answers: list[Any] = []

    def answer(given: Sequence[tuple[Any, Any]], mail: Sequence[Any]) -> None:
        answers.extend(verdict for _, verdict in given)

    return Committer(store, answer), answers


def letter(number: int) -> Send:
    return Send(to=Address(namespace="default", id="nobody"), id=str(number), kind="signal")


def nothing(verdict: Any) -> None:
    """Who sent it does not care."""


def test_little_is_written_by_who_adds_it_if_writing_is_quick() -> None:
    store = Slow()
    it, answers = committer(store)
    it.took = QUICKLY / 2
    thread = CommitterThread(it)
    it.send(letter(1), nothing)
    thread.kick()
    thread.stop()
    assert store.calls == ["at once"]
    assert len(answers) == 1


def test_much_goes_to_the_thread() -> None:
    store = Slow()
    it, answers = committer(store)
    it.took = QUICKLY / 2
    thread = CommitterThread(it)
    for number in range(FEW + 1):
        it.send(letter(number), nothing)
    thread.kick()
    thread.stop()
    assert store.calls == ["thread"]
    assert len(answers) == FEW + 1


def test_a_store_that_was_slow_is_left_to_the_thread() -> None:
    store = Slow()
    it, answers = committer(store)
    it.took = QUICKLY * 2
    thread = CommitterThread(it)
    it.send(letter(1), nothing)
    thread.kick()
    thread.stop()
    assert store.calls == ["thread"]
    assert len(answers) == 1


def test_what_would_have_to_wait_goes_to_the_thread_and_keeps_its_order() -> None:
    store = Slow()
    store.busy = True
    it, answers = committer(store)
    it.took = QUICKLY / 2
    assert not it.flush(at_once=True)
    assert not it.few, "one that had to wait is not asked again before a quick one was seen"
    it.took = QUICKLY / 2
    for number in range(3):
        it.send(letter(number), nothing)
    assert not it.flush(at_once=True)
    assert (it.unanswered, it.waiting, answers) == (3, True, [])
    assert it.flush()
    assert (it.unanswered, it.waiting, len(answers)) == (0, False, 3)
    assert not any(isinstance(verdict, Finished) for verdict in answers)


def test_what_is_settled_one_after_the_other_is_written_to_the_last() -> None:
    """Starts of one id or key do not share a batch: what a quick writer leaves is the thread's."""
    store = Slow()
    it, answers = committer(store)
    it.took = QUICKLY / 2
    thread = CommitterThread(it)
    for number in range(FEW):
        it.start(start("same", seed=f"{number:032x}"), nothing)
    thread.kick()
    # Not stopped yet: that would have it written, too.
    deadline = time.monotonic() + 10
    while it.unanswered and time.monotonic() < deadline:
        time.sleep(0.001)
    assert [type(answer) for answer in answers] == [Begun] + [Existing] * (FEW - 1)
    thread.stop()
    assert store.calls[0] == "at once"
