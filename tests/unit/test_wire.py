"""A store behind a connection is written from the loop, which waits for nothing; what is unusual goes to a thread."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

from perdure.core.errors import StoreUnavailable
from perdure.core.turn import Address, Batch, Send, Verdict
from perdure.stores.memory import MemoryStore
from perdure.worker.committer import Committer, CommitterThread


class Far(MemoryStore):
    """A store behind a pipe: an answer is there when the test says so. Notes which thread did what."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, str]] = []
        self.connected = True
        self.usual = True
        self.unsent = False
        self.broken = 0
        self._ears, self._mouth = (each.detach() for each in socket.socketpair())
        self._batch = Batch()

    def note(self, what: str) -> None:
        on_loop = threading.current_thread() is threading.main_thread()
        self.done.append((what, "loop" if on_loop else "thread"))

    def answer(self) -> None:
        os.write(self._mouth, b"!")

    def write(self, batch: Batch) -> list[Verdict]:
        self.note("write")
        return super().write(batch)

    def begin_at_once(self, batch: Batch) -> int | None:
        if not self.connected:
            return None
        self.note("begin")
        self._batch = batch
        return self._ears

    def arrived(self) -> bool:
        if self.unsent:
            self.note("send on")
            self.unsent = False
            return False
        os.read(self._ears, 1)
        return True

    def finish_at_once(self) -> list[Verdict] | None:
        if not self.usual:
            return None
        self.note("finish")
        return super().write(self._batch)

    def finish(self) -> list[Verdict]:
        self.note("find out")
        if self.broken:
            self.broken -= 1
            raise StoreUnavailable("It is away.", store=self.url)
        return super().write(self._batch)


class Site:
    """A committer with its thread and wire, on the running loop."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.store = Far()
        self.answers: list[Any] = []
        self.told = asyncio.Event()
        self.committer = Committer(self.store, self.answered)
        self.thread = CommitterThread(self.committer, self.loop, self.read)

    def answered(self, answers: Sequence[tuple[Any, Any]], mail: Sequence[Any]) -> None:
        self.loop.call_soon_threadsafe(self.tell, [verdict for _, verdict in answers])

    def tell(self, verdicts: list[Any]) -> None:
        self.answers += verdicts
        self.told.set()

    def read(self, ask: Callable[[], Any], done: Callable[[Any], None]) -> None:
        threading.Thread(target=lambda: self.loop.call_soon_threadsafe(done, ask())).start()

    def sends(self, number: int) -> None:
        to = Address(namespace="default", id="nobody")
        self.committer.send(Send(to=to, id=str(number), kind="signal"), lambda verdict: None)
        self.thread.kick()

    async def hears(self, count: int) -> None:
        while len(self.answers) < count:
            self.told.clear()
            await asyncio.wait_for(self.told.wait(), 10)


async def test_the_loop_sends_and_is_told_of_the_answer() -> None:
    site = Site()
    site.sends(1)
    site.sends(2)  # while the first is under way: the next batch
    site.sends(3)
    await asyncio.sleep(0)
    assert site.store.done == [("begin", "loop")]
    site.store.answer()
    await site.hears(1)
    site.store.answer()
    await site.hears(3)
    assert site.store.done == [("begin", "loop"), ("finish", "loop")] * 2
    site.thread.stop()


async def test_what_the_connection_does_not_take_at_once_is_sent_when_it_does() -> None:
    site = Site()
    site.store.unsent = True
    site.sends(1)
    while len(site.store.done) < 2:
        await asyncio.sleep(0.001)
    assert site.store.done == [("begin", "loop"), ("send on", "loop")]
    await asyncio.sleep(0.01)
    assert len(site.store.done) == 2, "it is not asked again without a reason"
    site.store.answer()
    await site.hears(1)
    site.thread.stop()


async def test_what_is_not_as_usual_is_found_out_in_a_thread() -> None:
    site = Site()
    site.store.usual = False
    site.sends(1)
    site.store.answer()
    await site.hears(1)
    assert site.store.done == [("begin", "loop"), ("find out", "thread")]
    site.store.usual = True
    site.sends(2)
    site.store.answer()
    await site.hears(2)
    assert site.store.done[2:] == [("begin", "loop"), ("finish", "loop")]
    site.thread.stop()


async def test_without_a_connection_the_thread_writes() -> None:
    site = Site()
    site.store.connected = False
    site.sends(1)
    await site.hears(1)
    assert site.store.done == [("write", "thread")]
    site.thread.stop()


async def test_after_trouble_the_thread_tries_again_before_the_loop_does() -> None:
    site = Site()
    site.store.usual = False
    site.store.broken = 1
    site.sends(1)
    site.sends(2)
    site.store.answer()
    await site.hears(2)
    assert isinstance(site.answers[0], StoreUnavailable), "who sent it is told"
    assert site.store.done == [("begin", "loop"), ("find out", "thread"), ("write", "thread")]
    assert site.committer.tries == 0
    site.store.usual = True
    site.sends(3)
    site.store.answer()
    await site.hears(3)
    assert site.store.done[-1] == ("finish", "loop")
    site.thread.stop()


async def test_answers_that_cannot_be_handed_on_are_asked_for_again() -> None:
    site = Site()
    hand_on, left = site.committer._answer, [1]

    def failing(answers: Any, mail: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise MemoryError("no memory")
        hand_on(answers, mail)

    site.committer._answer = failing
    site.sends(1)
    site.store.answer()
    while left[0]:
        await asyncio.sleep(0)
    site.store.answer()
    await site.hears(1)
    assert (len(site.answers), site.committer.unanswered) == (1, 0)
    site.thread.stop()
