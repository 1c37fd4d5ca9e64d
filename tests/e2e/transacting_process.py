"""A worker whose runs take transaction steps: each writes one row into a table of the user's own, `effects`.

Arguments: store URL, and `together`, or `apart` for a planted bug: effect and record in two commits.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
import time
from sqlite3 import Connection
from typing import Any

from perdure import Context, Retry, Worker, current_step, sync, workflow
from perdure.stores.sqlite.borrowed import Plain
from perdure.stores.sqlite.transaction import StepTransaction

TABLE = "CREATE TABLE IF NOT EXISTS effects (run TEXT NOT NULL, step TEXT NOT NULL)"
SOON = Retry(max_attempts=None, first_delay=0.01, jitter=False)
STEPS = 6


def affect(db: Connection, number: int) -> int:
    info = current_step()
    db.execute("INSERT INTO effects VALUES (?, ?)", (info.run_id, info.id))
    time.sleep(random.uniform(0, 0.004))
    if random.random() < 0.1:
        raise ValueError("now and then")
    return number + 1


async def plain(number: int) -> int:
    await asyncio.sleep(random.uniform(0, 0.005))
    return number


@workflow
async def pays(ctx: Context, number: int) -> int:
    step = ctx.step.options(retry=SOON)
    for n in range(STEPS // 2):
        number = await step.transaction(f"one-{n}", affect, number)
        number = await ctx.step.run(f"plain-{n}", plain, number)
    both = await asyncio.gather(*(step.transaction(f"two-{n}", affect, 0) for n in range(STEPS - STEPS // 2)))
    return int(number + sum(both))


@workflow
def pays_in_a_thread(ctx: sync.Context, number: int) -> int:
    for n in range(STEPS):
        number = ctx.step.options(retry=SOON).transaction(f"one-{n}", affect, number)
    return number


def apart() -> None:
    """Plant the bug: the effect is committed first, then the record."""
    record = StepTransaction._record

    def in_two_commits(self: StepTransaction, events: Any) -> None:
        db = Plain(self.connection)
        # Without the fence, or nobody could go on after a death in between.
        row = db.execute("SELECT version, turn FROM perdure_runs WHERE key = ?", (self._turn.run,)).fetchone()
        undo = "UPDATE perdure_runs SET version = ?, turn = ? WHERE key = ?"
        db.execute(undo, (self._turn.version, self._turn.last, self._turn.run))
        db.execute("COMMIT")
        time.sleep(0.004)
        db.execute("BEGIN IMMEDIATE")
        db.execute(undo, (*row, self._turn.run))
        record(self, events)

    StepTransaction._record = in_two_commits  # type: ignore[method-assign]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s")
    if sys.argv[2] == "apart":
        apart()
    worker = Worker(sys.argv[1], workflows=[pays, pays_in_a_thread], concurrency=16)
    asyncio.run(worker.run())
