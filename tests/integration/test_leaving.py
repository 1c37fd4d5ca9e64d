"""A worker that leaves at a bad moment: while its store is away, or before it has quite come."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from typing import Any

import pytest
from msgspec.structs import replace

from perdure import Client, Context, Engine, MemoryStore, StoreLocked, StoreUnavailable, Worker, activity, workflow
from perdure.core.turn import Announcement, Batch, Busy, Lease, MoreMail, Turn, Verdict


class Away(MemoryStore):
    """A store that cannot be reached just when its worker leaves."""

    def retire(self, incarnation: str) -> int:
        raise StoreUnavailable("The store is away. It was switched off. Switch it on.")


@workflow
async def hello(ctx: Context) -> str:
    return "hello"


async def test_a_worker_leaves_also_when_its_store_is_away(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        async with Engine(Away(), workflows=[hello]) as engine:
            assert await (await engine.start(hello)).result() == "hello"
    assert "could not be given back" in caplog.text
    with pytest.raises(RuntimeError, match="was closed"):
        await engine.start(hello)


class Eager(MemoryStore):
    """A store that has the worker asked to stop at the very moment it is known and may be given runs."""

    def announce(self, announcement: Announcement) -> Lease:
        lease = super().announce(announcement)
        os.kill(os.getpid(), signal.SIGTERM)
        return lease


async def test_a_worker_asked_to_stop_as_soon_as_it_is_known_drains(request: pytest.FixtureRequest) -> None:
    struck: list[Any] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: struck.append(number))
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, before))
    worker = Worker(Eager(), workflows=[hello])
    await asyncio.wait_for(worker.run(), 30)
    assert struck == [], "the signal would have ended the process"
    assert worker.drained


executed: list[str] = []


async def effect() -> None:
    executed.append("effect")


@activity(queue="remote")
async def remote() -> None:
    executed.append("remote")


@workflow
async def one_step(ctx: Context) -> None:
    await ctx.step.run("effect", effect)


@workflow
async def one_activity(ctx: Context) -> None:
    await ctx.step.run("remote", remote)


class HeldUp(MemoryStore):
    """The first end of a run of this kind is held up, and just then the worker is asked to leave."""

    def __init__(self, kind: str, verdict: type[Busy | MoreMail]) -> None:
        super().__init__()
        self.kind = kind
        self.verdict = verdict
        self.leaves: Worker | None = None

    def write(self, batch: Batch) -> list[Verdict]:
        held = next((turn for turn in batch.turns if self.holds_up(turn)), None)
        if held is None or self.leaves is None:
            return super().write(batch)
        worker, self.leaves = self.leaves, None
        worker._ask_to_stop()
        place = len(batch.starts) + len(batch.sends) + batch.turns.index(held)
        verdicts = super().write(replace(batch, turns=[turn for turn in batch.turns if turn is not held]))
        return [*verdicts[:place], self.verdict(run=held.run), *verdicts[place:]]

    def holds_up(self, turn: Turn) -> bool:
        return turn.closing and self.rows([turn.run])[0].kind == self.kind


@pytest.mark.parametrize(
    ("kind", "verdict"), [("workflow", Busy), ("workflow", MoreMail), ("activity", Busy)], ids=lambda each: str(each)
)
async def test_what_was_executed_is_written_before_the_worker_leaves(kind: str, verdict: Any) -> None:
    executed.clear()
    store = HeldUp(kind, verdict)
    worker = Worker(store, workflows=[one_step, one_activity], activities=[remote], queues=["default", "remote"])
    store.leaves = worker
    serving = asyncio.ensure_future(worker.run())
    async with Client(store) as client:
        while not store.announced("default"):
            await asyncio.sleep(0.01)
        run = await client.start(one_step if kind == "workflow" else one_activity)
        await asyncio.wait_for(serving, 30)
        assert store.leaves is None, "its end was held up"
        if kind == "workflow":
            assert await run.status() == "completed"
        again = Worker(store, workflows=[one_step, one_activity], activities=[remote], queues=["default", "remote"])
        serving = asyncio.ensure_future(again.run())
        await run.result(timeout=30)
        await again.stop()
        await serving
    assert executed == ["effect" if kind == "workflow" else "remote"]


class Locked(MemoryStore):
    """Just when a worker comes, somebody else holds the lock."""

    def announce(self, announcement: Announcement) -> Lease:
        raise StoreLocked("The store is locked. Somebody else writes. Wait for them.")


async def test_who_cannot_come_says_why() -> None:
    with pytest.raises(StoreLocked, match="Somebody else writes"):
        async with Engine(Locked(), workflows=[hello]):
            pytest.fail("it has come")
    with pytest.raises(StoreLocked, match="Somebody else writes"):
        await Worker(Locked(), workflows=[hello]).run()
    engine = Engine(Locked(), workflows=[hello])
    with pytest.raises(StoreLocked):
        await engine.start(hello)
    await engine.close()
