"""The disk of the store is full for a while."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from chaos.load import Load
from chaos.postgres import PostgresBase, lives
from chaos.sqlite import SQLiteBase
from chaos.stage import Skipped, Stage
from perdure import Client
from tests.servers import PostgresServer

SIZE: Final = 24_000_000
SERVER_SIZE: Final = 160_000_000
SERVER_SETTINGS: Final = {"max_wal_size": "32MB", "min_wal_size": "32MB", "shared_buffers": "32MB"}


async def disk(stage: Stage) -> None:
    """The disk is full under load, then has space again: nothing that was acknowledged is lost, all goes on."""
    workers = await stage.workers(2)
    async with Client(stage.base.url) as client:
        load = Load(stage, client)
        for _ in range(stage.pick(1, 3, 20)):
            running = asyncio.create_task(load.run(stage.pick(3.0, 10.0, 30.0), 40))
            await asyncio.sleep(stage.pick(0.7, 2.0, 5.0))
            make_room = await asyncio.to_thread(_fill, stage, [os.getpid(), *(worker.pid for worker in workers)])
            stage.did("full disks")
            await _refused(stage)
            await asyncio.sleep(stage.pick(0.5, 3.0, 10.0))
            make_room()
            if isinstance(stage.base, PostgresBase) and not lives(stage.base.server):
                stage.did("restarts of a server that had given up")
                await asyncio.to_thread(stage.base.server.start)
            await running
        await stage.healed()
    if not stage.report.refusals["StoreFull"] and not stage.report.refusals["StoreUnavailable"]:
        stage.violated("nobody was told that the disk was full")


async def _refused(stage: Stage) -> None:
    before = stage.report.refusals.total()
    await stage.until(lambda: stage.report.refusals.total() > before, "a refusal")


def _fill(stage: Stage, pids: Sequence[int]) -> Callable[[], None]:
    """Leave no room for the store; what makes room again. On a small disk with a file, else by a limit of size."""
    place = stage.base.path if isinstance(stage.base, SQLiteBase) else _data(stage)
    if (place.parent if place.is_file() else place).is_mount():
        ballast = (place.parent if place.is_file() else place) / "ballast"
        with open(ballast, "wb", buffering=0) as file:
            for piece in (65536, 512):
                try:
                    while True:
                        file.write(b"\0" * piece)
                except OSError:
                    continue  # smaller pieces still find room
        return ballast.unlink
    log = Path(f"{place}-wal")
    limit = max(4096, log.stat().st_size if log.exists() else 0)
    for pid in pids:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def make_room() -> None:
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    return make_room


def _data(stage: Stage) -> Path:
    assert isinstance(stage.base, PostgresBase)
    return stage.base.server.folder / "data"


def small_disk(folder: Path, after: ExitStack, size: int = SIZE, *options: str) -> bool:
    """Mount a small disk there until `after`; False where we may not mount."""
    command = ["mount", "-t", "tmpfs", "-o", ",".join((f"size={size}", *options)), "perdure-chaos", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        return False
    after.callback(subprocess.run, ["umount", "--lazy", str(folder)], capture_output=True)
    return True


def server_on_small_disk(after: ExitStack) -> PostgresServer:
    """A server whose data are on a small disk, until `after`."""
    server = PostgresServer(settings=SERVER_SETTINGS)
    data, made = server.folder / "data", server.folder / "made"
    data.rename(made)
    data.mkdir()
    owner = made.stat()
    if not small_disk(data, after, SERVER_SIZE, f"uid={owner.st_uid}", f"gid={owner.st_gid}", "mode=0700"):
        server.close()
        raise Skipped("a small disk cannot be mounted here")
    after.callback(server.close)
    subprocess.run(["cp", "-a", f"{made}/.", str(data)], check=True)
    return server.start()
