"""Code that never rests is interrupted three times, then its run is put aside."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from perdure import Context, Engine, Limits, RunFailed, Status, workflow
from perdure.worker import residents


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
