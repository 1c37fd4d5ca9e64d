"""The clock of the store is set back by hours, and put right again."""

from __future__ import annotations

import asyncio
import struct
import time
from pathlib import Path
from typing import Final

from chaos.load import Load
from chaos.stage import Stage
from chaos.worker import wrong_clock
from perdure import Client, SQLiteStore

HOURS: Final = 3


async def clock(stage: Stage) -> None:
    """The clock goes back by hours and is put right: timers may be late by the jump, never early; all runs end."""
    file = stage.folder / "clock"
    set_clock(file, 0)
    await stage.workers(2, clock=str(file), lease=2)
    store = SQLiteStore(stage.base.url.removeprefix("sqlite:///"), clock=wrong_clock(str(file)))
    async with Client(store) as client:
        load = Load(stage, client)
        for turn in range(stage.pick(1, 4, 50)):
            running = asyncio.create_task(load.run(stage.pick(2.5, 8.0, 20.0), 25))
            for n in range(20):
                await load.start("nap", stage.chance.uniform(0.2, 2.0), id=f"before-{turn}-{n}")
            set_clock(file, -HOURS * 3_600_000_000 - stage.chance.randrange(60_000_000))
            stage.did("jumps back")
            for n in range(20):
                await load.start("nap", stage.chance.uniform(0.2, 1.5), id=f"during-{turn}-{n}")
            # What is set while the clock is wrong keeps its own time: it need not wait for the clock.
            at = time.monotonic()
            await stage.until(lambda turn=turn: _ended(stage, f"during-{turn}"), "the timers set meanwhile")  # type: ignore[misc]
            stage.note(f"timers set while the clock was wrong had all fired after {time.monotonic() - at:.2f} s")
            set_clock(file, 0)
            stage.did("jumps forward")
            await running
        await stage.healed()
    store.close()


def _ended(stage: Stage, prefix: str) -> bool:
    return bool(
        stage.base.ask(f"SELECT count(*) = 20 FROM {{runs}} WHERE id LIKE '{prefix}-%' AND ended_at IS NOT NULL")[0][0]
    )


def set_clock(file: Path, microseconds: int) -> None:
    """Let the clock be wrong by so much from now on."""
    if file.exists():
        with open(file, "r+b") as opened:
            opened.write(struct.pack("<q", microseconds))
    else:
        file.write_bytes(struct.pack("<q", microseconds))
