"""A worker that leaves at a bad moment: while its store is away, or before it has quite come."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from typing import Any

import pytest

from perdure import Context, Engine, MemoryStore, StoreUnavailable, Worker, workflow
from perdure.core.turn import Announcement, Lease


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
