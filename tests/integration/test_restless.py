"""Code that never rests is interrupted three times, then its run is put aside."""

from __future__ import annotations

from pathlib import Path

import pytest

from perdure import Context, Engine, Limits, RunFailed, Status, workflow
from perdure.worker import residents


async def step() -> None: ...


@workflow
async def never_rests(ctx: Context) -> None:
    await ctx.step.run("a", step)
    while True:
        pass


async def test_code_that_never_rests_is_quarantined_after_its_third_strike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residents, "FIRST_BACK_OFF", 10_000)
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    async with Engine(url, workflows=[never_rests], limits=Limits(busy=0.1)) as engine:
        handle = await engine.start(never_rests)
        with pytest.raises(RunFailed):
            await handle.result(timeout=20)
        assert await handle.status() == Status.QUARANTINED
