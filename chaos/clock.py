"""The clock of the store is set back by hours, and put right again."""

from __future__ import annotations

import asyncio
import os
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from chaos.load import Load
from chaos.postgres import PostgresBase
from chaos.sqlite import SQLiteBase
from chaos.stage import Skipped, Stage
from chaos.worker import wrong_clock
from perdure import Client, SQLiteStore
from perdure.stores.contract import Store
from tests.servers import PostgresServer

HOURS: Final = 3
LIBRARIES: Final = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketime.so.1",
    "/usr/lib64/faketime/libfaketime.so.1",
    "/usr/lib/faketime/libfaketime.so.1",
)
TIMERS: Final = 20
ANSWER: Final = 0.05
"""Seconds that a busy server's answer may be under way. A worker's clock is behind the server's by as much, until the
next answer: a length that begins before that one and ends after it is shorter by the difference."""


async def clock(stage: Stage) -> None:
    """The clock goes back by hours and is put right: timers may be late by the jump, never early; all runs end."""
    # The ledger is written by another clock than a server's, and by one that goes back.
    stage.promised.clock_is_right = False
    set_clock, store, settings = _clock_of(stage)
    await stage.workers(2, lease=2, **settings)
    async with Client(store) as client:
        load = Load(stage, client)
        for turn in range(stage.pick(1, 4, 50)):
            running = asyncio.create_task(load.run(stage.pick(2.5, 8.0, 20.0), 25))
            for n in range(TIMERS):
                await load.start("nap", stage.chance.uniform(0.2, 2.0), id=f"before-{turn}-{n}")
            set_clock(-HOURS * 3_600_000_000 - stage.chance.randrange(60_000_000))
            stage.did("jumps back")
            await asyncio.sleep(0.2)
            asked = {f"during-{turn}-{n}": stage.chance.uniform(0.2, 1.2) for n in range(TIMERS)}
            for run, seconds in asked.items():
                await load.start("nap", seconds, id=run)
            await asyncio.sleep(2.0)
            fired = _fired(stage, asked, ANSWER if isinstance(stage.base, PostgresBase) else 0.0)
            stage.note(f"{fired} of {TIMERS} timers set while the clock was wrong fired before it was right")
            if fired < TIMERS and isinstance(stage.base, SQLiteBase):
                # Everybody reads the one clock: what is set while it is wrong keeps its own time.
                stage.violated("INV-11: timers that were set while the clock was wrong waited until it was right")
            set_clock(0)
            stage.did("jumps forward")
            await running
        at = time.monotonic()
        await stage.healed()
        if time.monotonic() - at > stage.pick(20, 30, 30):
            stage.violated(f"INV-11: timers came {time.monotonic() - at:.1f} s after the clock was right")
    if not isinstance(store, str):
        store.close()


def _clock_of(stage: Stage) -> tuple[Callable[[int], None], str | Store, dict[str, Any]]:
    """What sets the store's clock; the client's store; and what a worker is told of it."""
    if isinstance(stage.base, PostgresBase):
        server = stage.base.server
        return lambda wrong_by: set_server_clock(clock_file(server), wrong_by), stage.base.url, {}
    assert isinstance(stage.base, SQLiteBase)
    file = stage.folder / "clock"
    file.write_bytes(struct.pack("<q", 0))

    def set_clock(wrong_by: int) -> None:
        with open(file, "r+b") as opened:
            opened.write(struct.pack("<q", wrong_by))

    return set_clock, SQLiteStore(stage.base.path, clock=wrong_clock(str(file))), {"clock": str(file)}


def _fired(stage: Stage, asked: dict[str, float], unsure: float) -> int:
    """How many timers have fired while the store's clock ran evenly: each took its time, by a clock nobody sets."""
    begun = {(line.run, line.step): line.mono for line in stage.lines()}
    fired = [run for run in asked if (run, "after-nap") in begun]
    for run in fired:
        took = begun[run, "after-nap"] - begun[run, "a"]
        if took < asked[run] - unsure:
            stage.violated(f"INV-11: {run} slept {took:.3f} s of {asked[run]:.3f}")
    return len(fired)


def clock_file(server: PostgresServer) -> Path:
    """Where libfaketime looks how wrong the server's clock is."""
    return server.folder / "clock"


def set_server_clock(file: Path, wrong_by: int) -> None:
    written = file.with_suffix(".new")
    written.write_text(f"{wrong_by / 1_000_000:+.6f}\n", encoding="ascii")
    written.chmod(0o644)
    written.rename(file)


def server_with_clock(after: ExitStack) -> PostgresServer:
    """A server whose clock can be set, until `after`: it runs under libfaketime."""
    library = next((path for path in LIBRARIES if os.path.isfile(path)), None)
    if library is None:
        raise Skipped("libfaketime is not installed, and a server's clock is the machine's")
    server = PostgresServer()
    after.callback(server.close)
    set_server_clock(clock_file(server), 0)
    faked = {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(clock_file(server)),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    # Only once it is the server's user: libfaketime shares a semaphore with what it was loaded into before.
    server._user = (*server._user, "env", *(f"{name}={value}" for name, value in faked.items()))
    return server.start()
