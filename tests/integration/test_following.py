"""What `perdure run` shows of a run that was there before."""

from __future__ import annotations

from pathlib import Path

import pytest

from perdure import Context, workflow
from perdure.cli.following import Follower
from tests.integration.helpers import engine, status_of


@workflow
async def seated(ctx: Context) -> str:
    seat: str = await ctx.step.wait_signal("seat")
    await ctx.step.run("print", lambda: None)
    return seat


async def test_what_came_before_the_first_look_is_still_told_as_new(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with engine(tmp_path, seated) as ours:
        run = await ours.start(seated)
        await status_of(run, "waiting")
        core = ours._core
        since = core.store.now()
        await run.signal("seat", "7F")
        assert await run.result() == "7F"
        follower = Follower(core, run, since=since)
        await follower.last()
        await follower.close()
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines[0].endswith("of workflow seated goes on")
    assert lines[1:4] == ['= seat: waits for signal "seat"', "+ seat: done", "+ print: done"]
