"""The committer: what is written by whom, and what an answer is worth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from perdure.core.errors import StoreError, StoreLocked
from perdure.core.turn import Address, Batch, Begun, Existing, Finished, Send, Turn, Verdict
from perdure.stores.memory import MemoryStore
from perdure.testing.conformance.story import start
from perdure.worker import committer as module
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


# --- no memory: what waits is in a batch or waits on, and who waits is answered once


def failing(times: int, act: Any) -> Any:
    """`act`, for which there is no memory so many times."""
    left = [times]

    def tried(*args: Any, **named: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise MemoryError("no memory")
        return act(*args, **named)

    return tried


@pytest.mark.parametrize("number", [1, FEW + 1], ids=["by who adds", "by the thread"])
@pytest.mark.parametrize("where", ["the batch", "the answers", "the refusal"])
def test_what_there_was_no_memory_for_is_written_and_answered_once(
    where: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Slow()
    it, answers = committer(store)
    it.took = QUICKLY / 2
    if where == "the batch":
        monkeypatch.setattr(module, "Batch", failing(2, Batch))
    else:
        it._answer = failing(2, it._answer)
    if where == "the refusal":
        store.write = failing(1, store.write)  # type: ignore[method-assign]
        store.write_at_once = failing(1, store.write_at_once)  # type: ignore[method-assign]
    thread = CommitterThread(it)
    for each in range(number):
        it.start(start(f"run-{each}", seed=f"{each:032x}"), nothing)
    thread.kick()
    deadline = time.monotonic() + 10
    while it.unanswered and time.monotonic() < deadline:
        time.sleep(0.001)
    thread.stop()
    assert (it.unanswered, len(answers)) == (0, number)
    if where != "the refusal":
        assert {type(answer) for answer in answers} == {Begun}


def test_starts_that_were_not_taken_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    it, _ = committer(Slow())
    for name in ("a", "b", "a", "c", "b"):
        it.start(start(name), nothing)
    before = list(it._starts)
    monkeypatch.setattr(module, "Batch", failing(1, Batch))
    with pytest.raises(MemoryError):
        it.take()
    assert len(it._starts) == len(before)
    assert [one.id for one in it.take().batch.starts] == ["a", "b", "c"]
    assert list(it._starts) == [before[2], before[4]]


def test_a_batch_takes_no_more_than_a_few_large_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TEXT", 2500)
    it, _ = committer(Slow())
    for number in range(4):
        it.send(msgspec.structs.replace(letter(number), data="x" * 1000), nothing)
        it.start(start(f"run {number}", input="x" * 1000), nothing)
    fence: dict[str, Any] = {"run": 1, "owner": "w", "epoch": 1, "version": 1, "last": "", "id": "t", "first_seq": 1}
    it.turn(Turn(**fence, status="running", events=["x" * 1000]), nothing)
    sizes = []
    while it.waiting:
        taken = it.take()
        sizes.append((len(taken.turns), len(taken.sends), len(taken.starts)))
    # One of each kind in any case: nothing is too large to be written, or waits for ever behind what is.
    assert sizes == [(1, 2, 1), (0, 2, 1), (0, 0, 2)]


def test_one_that_cannot_be_stored_is_told_so_and_the_rest_is_written() -> None:
    class Narrow(Slow):
        def write(self, batch: Batch) -> list[Verdict]:
            ids = [each.id for each in batch.starts]
            if "bad" in ids:
                error = StoreError("It does not fit.", store=self.url)
                error.of_one_item = True
                raise error
            if "broken" in ids:
                raise ValueError("a bug")
            return super().write(batch)

    store = Narrow()
    it, answers = committer(store)
    for id in ("bad", "good"):
        it.start(start(id), answers.append)
    it.send(letter(1), nothing)
    fence: dict[str, Any] = {"run": 1, "owner": "w", "epoch": 1, "version": 1, "last": "", "id": "t", "first_seq": 1}
    it.turn(Turn(**fence, status="running"), nothing)
    assert it.flush()
    assert [type(each).__name__ for each in answers] == ["StoreError", "Begun", "NotFound"]
    assert it.gathered == 1, "the turn comes with the next batch"
    assert it.flush()
    assert type(answers[-1]).__name__ == "Fenced"
    # What fails otherwise while they are tried is told to those who wait for it as well.
    for id in ("bad", "broken"):
        it.start(start(id), answers.append)
    assert it.flush()
    assert [type(each).__name__ for each in answers[-2:]] == ["StoreError", "StoreError"]
    assert it.unanswered == 0
