"""A worker that leaves while its store is away."""

from __future__ import annotations

import logging

import pytest

from perdure import Context, Engine, MemoryStore, StoreUnavailable, workflow


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
