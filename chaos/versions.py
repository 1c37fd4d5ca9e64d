"""Two adjacent versions of the tables side by side, and migrations that are killed half way."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Final

from chaos.load import Load
from chaos.stage import ROOT, Stage
from perdure import Client

OPENS: Final = "import sys; from perdure.stores.opening import open_store; open_store(sys.argv[1]).close()"


async def versions(stage: Stage) -> None:
    """A worker of the next version migrates the tables under the load of old ones; both serve side by side."""
    await stage.workers(1)
    async with Client(stage.base.url) as client:
        load = Load(stage, client)
        before = asyncio.create_task(load.run(stage.pick(2.5, 20.0, 120.0), 30))
        await asyncio.sleep(stage.pick(0.5, 2.0, 5.0))
        newer = await stage.workers(1, newer=True)
        stage.did("migrations")
        await before
        # The old ones go on; one that is killed is replaced by a newer one.
        stage.kill(stage.processes[0])
        await load.run(stage.pick(0.5, 5.0, 30.0), 30)
        await stage.healed()
    of_newer = sum(line.pid == newer[0].pid for line in stage.lines())
    of_older = sum(line.pid == stage.processes[0].pid for line in stage.lines())
    stage.note(f"{of_older} executions by the old version, {of_newer} by the new one")
    if not of_newer or not of_older:
        stage.violated("one of the two versions did nothing")
    opened = subprocess.run([sys.executable, "-c", OPENS, stage.base.url], cwd=ROOT, capture_output=True, text=True)
    said = opened.stderr.strip().splitlines()[-1:] or ["it opened"]
    stage.note(f"an old process that is started after the migration: {said[0][:160]}")
    if opened.returncode and "StoreTooNew" not in said[0]:
        stage.violated(f"an old process met the newer tables with {said[0]}")
