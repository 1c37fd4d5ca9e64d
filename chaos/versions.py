"""Two adjacent versions of the tables side by side, and migrations that are killed half way."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import Final

from chaos.load import Load
from chaos.stage import ROOT, Stage
from perdure import Client
from perdure.stores.opening import open_store

OPENS: Final = "import sys; from perdure.stores.opening import open_store; open_store(sys.argv[1]).close()"
OPENS_WHEN_TOLD: Final = (
    "import sys; from perdure.stores.opening import open_store; print(); sys.stdout.flush(); sys.stdin.readline(); "
    "open_store(sys.argv[1]).close()"
)
LONGEST: Final = 0.25
"""Seconds that a migration takes at most; a process is killed at any moment of it."""


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


async def migrations(stage: Stage) -> None:
    """Processes are killed in the middle of a store's migrations: the next one finds it whole, or makes it so."""
    whole = 0
    for number in range(stage.pick(4, 30, 100)):
        url = stage.base.fresh(number)
        with subprocess.Popen(
            [sys.executable, "-c", OPENS_WHEN_TOLD, url], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            await asyncio.to_thread(process.stdout.readline)
            process.stdin.write(b"\n")
            process.stdin.flush()
            await asyncio.sleep(stage.chance.uniform(0, LONGEST))
            whole += process.poll() == 0
            stage.kill(process)
        for again in range(2):
            store = open_store(url)
            if store.counts("default") != {}:
                stage.violated(f"INV-8: a new store has runs after a killed migration ({again})")
            store.close()
    stage.note(f"{whole} of them had finished before they were killed")
