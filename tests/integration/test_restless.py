"""Code that never rests is interrupted three times, then its run is put aside."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from perdure import Context, Engine, Limits, RunFailed, Status, workflow
from perdure.core.errors import NeverRests
from perdure.worker import residents, watchdog

# The interruption may come between the making of a coroutine and its first step.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'sleep' was never awaited:RuntimeWarning")


async def step() -> None: ...


@workflow
async def never_rests(ctx: Context) -> None:
    await ctx.step.run("a", step)
    while True:
        pass


@workflow
async def only_yields(ctx: Context) -> None:
    await ctx.step.run("a", step)
    while True:
        await asyncio.sleep(0)


@pytest.mark.parametrize("flow", [never_rests, only_yields], ids=lambda flow: flow.name)
async def test_code_that_never_rests_is_quarantined_after_its_third_strike(
    flow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residents, "FIRST_BACK_OFF", 10_000)
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    async with Engine(url, workflows=[flow], limits=Limits(busy=0.1)) as engine:
        handle = await engine.start(flow)
        with pytest.raises(RunFailed, match="did not rest"):
            await handle.result(timeout=60)
        assert await handle.status() == Status.QUARANTINED
        why = await handle.why()
        assert "is quarantined: its code did not rest and was stopped" in why
        assert "test_restless.py" in why
        assert f"in {flow.name}" in why


async def test_an_interruption_that_comes_when_the_code_has_just_rested_reaches_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watchdog's exception is raised in the thread when it comes to it: perhaps after the code is left."""
    monkeypatch.setattr(residents, "FIRST_BACK_OFF", 10_000)
    late = iter(range(100))

    def arrives() -> None:
        if next(late) == 2:
            raise NeverRests

    async with Engine(f"sqlite:///{tmp_path / 'runs.db'}", workflows=[rests]) as engine:
        monkeypatch.setattr(watchdog, "arrives", arrives)
        handles = [await engine.start(rests, n) for n in range(4)]
        assert [await handle.result(timeout=60) for handle in handles] == [0, 1, 2, 3]
        assert next(late) > 3


@workflow
async def rests(ctx: Context, n: int) -> int:
    await ctx.step.run("a", step)
    await ctx.step.run("b", step)
    return n
