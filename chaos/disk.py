"""The disk of the store is full for a while."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

from chaos.load import Load
from chaos.stage import Stage
from perdure import Client

SIZE: Final = 24_000_000


async def disk(stage: Stage) -> None:
    """The disk is full under load, then has space again: nothing that was acknowledged is lost, all goes on."""
    workers = await stage.workers(2)
    async with Client(stage.base.url) as client:
        load = Load(stage, client)
        pids = [os.getpid(), *(worker.pid for worker in workers)]
        for _ in range(stage.pick(1, 3, 20)):
            running = asyncio.create_task(load.run(stage.pick(3.0, 10.0, 30.0), 40))
            await asyncio.sleep(stage.pick(0.7, 2.0, 5.0))
            make_room = _fill(stage, pids)
            stage.did("full disks")
            await _refused(stage)
            await asyncio.sleep(stage.pick(0.5, 3.0, 10.0))
            make_room()
            await running
        await stage.healed()
    if not stage.report.refusals["StoreFull"] and not stage.report.refusals["StoreUnavailable"]:
        stage.violated("nobody was told that the disk was full")


async def _refused(stage: Stage) -> None:
    before = stage.report.refusals.total()
    await stage.until(lambda: stage.report.refusals.total() > before, "a refusal")


def _fill(stage: Stage, pids: list[int]) -> Callable[[], None]:
    """Leave no room for the store; what makes room again. On a disk of its own with a file, else by a limit of size."""
    path = Path(stage.base.url.removeprefix("sqlite:///"))
    if path.parent.is_mount():
        ballast = path.parent / "ballast"
        with open(ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 65536)
            except OSError:
                pass
            try:
                while True:
                    file.write(b"\0" * 512)
            except OSError:
                pass
        return ballast.unlink
    log = Path(f"{path}-wal")
    limit = log.stat().st_size if log.exists() else 0
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(limit, 4096), resource.RLIM_INFINITY))

    def make_room() -> None:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    return make_room


def small_disk(folder: Path) -> Callable[[], None] | None:
    """Mount a small disk there; what takes it away, or None where we may not mount."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "perdure-chaos", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        return None
    return lambda: _unmount(folder)


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)
