"""Runs that harm their workers: they are put aside, and all other runs end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from chaos.load import Load
from chaos.stage import Stage
from perdure import Client

DEADLY: Final = ("exits", "crashes", "bombs", "loops")
HARMLESS: Final = {"digs": None, "deaf": '"gave up"'}
"""What fails, or goes on, in its own run only."""
MEMORY: Final = 400_000_000


async def poison(stage: Stage) -> None:
    """Runs that crash, exit, use up the memory or never rest are put aside; all other runs end."""
    stage.tracebacks = True
    # Each death costs a process and each suspicion a run alone: more of them are more time, not more truth.
    times = stage.pick(1, 2, 10)
    # The limit of memory is for the machine's sake only: should nobody look for a moment.
    settings: dict[str, Any] = {
        "memory": 4_000_000_000,
        "busy": 0.5,
        "concurrency": 16,
        "hasty": stage.report.size == "short",
    }
    workers = await stage.workers(2, **settings)
    busy = True

    async def again() -> None:
        """Like a service manager: what died is started anew."""
        while busy:
            for place, worker in enumerate(workers):
                if worker.poll() is not None:
                    stage.did("deaths")
                    workers[place] = stage.worker(**settings)
            await asyncio.sleep(0.02)

    async def out_of_memory() -> None:
        """Like the kernel: who has too much is killed."""
        while busy:
            for pid in _with_children([worker.pid for worker in workers if worker.poll() is None]):
                if _resident(pid) > MEMORY:
                    os.kill(pid, signal.SIGKILL)
                    stage.did("kills for memory")
            await asyncio.sleep(0.1)

    helpers = [asyncio.create_task(again()), asyncio.create_task(out_of_memory())]
    async with Client(stage.base.url) as client:
        load = Load(stage, client)
        for number in range(times):
            for workflow in DEADLY:
                stage.promised.deadly.add(f"{workflow}-{number}")
                await load.start(workflow, id=f"{workflow}-{number}")
            for workflow in HARMLESS:
                await load.start(workflow, id=f"{workflow}-{number}")
        await load.run(stage.pick(1.0, 10.0, 60.0), stage.pick(10, 20, 50))
        at = time.monotonic()
        await stage.healed(stage.pick(60, 180, 900))
        stage.note(f"the last run was put aside or ended {time.monotonic() - at:.1f} s after the load")
    busy = False
    await asyncio.gather(*helpers)
    for number in range(times):
        _expect(stage, f"deaf-{number}", "completed")
        _expect(stage, f"digs-{number}", "failed")


async def memory(stage: Stage) -> None:
    """A step uses up the address space of its process (RLIMIT_AS): its run fails or is put aside, all others end."""
    stage.tracebacks = True
    workers = await stage.workers(2, memory=1_200_000_000, threads=4)
    busy = True

    async def again() -> None:
        while busy:
            for place, worker in enumerate(workers):
                if worker.poll() is not None:
                    stage.did("deaths")
                    workers[place] = stage.worker(memory=1_200_000_000, threads=4)
            await asyncio.sleep(0.02)

    helper = asyncio.create_task(again())
    async with Client(stage.base.url) as client:
        load = Load(stage, client)
        for number in range(stage.pick(1, 3, 10)):
            stage.promised.deadly.add(f"bombs-{number}")
            await load.start("bombs", id=f"bombs-{number}")
        await load.run(stage.pick(1.0, 10.0, 60.0), 10)
        await stage.healed(180)
    busy = False
    await helper
    stage.did("memory bombs", len(stage.promised.deadly))


def _expect(stage: Stage, run: str, status: str) -> None:
    found = stage.base.ask(f"SELECT status FROM {{runs}} WHERE id = '{run}'")
    if found != [(status,)]:
        stage.violated(f"INV-20: {run} is {found}, not {status}")


def _with_children(pids: Sequence[int]) -> list[int]:
    """These processes and those they have begun: those that a worker gives to runs under suspicion."""
    found = list(pids)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent in pids:
            found.append(int(stat.parent.name))
    return found


def _resident(pid: int) -> int:
    """Bytes of memory that a process has; 0 where it cannot be seen."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096
    except (OSError, ValueError, IndexError):
        return 0
