"""Workers are killed at random in transaction steps: rows written and steps recorded are the same, at every moment."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections import Counter
from typing import Any

from perdure import Client
from tests.e2e.processes import ROOT, Site, until
from tests.e2e.transacting_process import STEPS, TABLE

SECONDS = float(os.environ.get("PERDURE_KILL_SECONDS", "30")) / 4
WORKERS = 2
RUNS_PER_SECOND = 12

RECORDED = """
SELECT run.id, json_extract(history.event, '$.step') FROM perdure_history AS history
JOIN perdure_runs AS run ON run.key = history.run
WHERE json_extract(history.event, '$.kind') = 'step_completed' AND json_extract(history.event, '$.op') = 'transaction'
"""


def difference(site: Site) -> tuple[list[Any], list[Any]]:
    """Effects without a record, and records without an effect, in one snapshot of the database (INV-15)."""
    with site.database() as db:
        db.execute("BEGIN")
        effects = Counter(db.execute("SELECT run, step FROM effects").fetchall())
        recorded = Counter(db.execute(RECORDED).fetchall())
        db.execute("COMMIT")
    return sorted((effects - recorded).elements()), sorted((recorded - effects).elements())


class Killing:
    """Load, and workers that do not live long."""

    def __init__(self, site: Site, how: str) -> None:
        seed = int(os.environ.get("PERDURE_SEED", random.SystemRandom().randrange(1 << 32)))
        print(f"PERDURE_SEED={seed}")
        self.chance = random.Random(seed)
        self.site = site
        self.how = how
        self.kills = 0
        self.differences: list[Any] = []
        with site.database() as db:
            db.execute(TABLE)

    def worker(self) -> subprocess.Popen[bytes]:
        with open(self.site.folder / "workers.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.e2e.transacting_process", self.site.url, self.how],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
        self.site.processes.append(process)
        return process

    async def run(self, seconds: float) -> list[str]:
        """The ids of the runs that were started meanwhile."""
        workers = [self.worker() for _ in range(WORKERS)]
        await until(lambda: len(self.site.ask("SELECT name FROM perdure_workers")) >= WORKERS, "the workers")
        ids: list[str] = []
        deadline = time.monotonic() + seconds
        async with Client(self.site.url) as client:

            async def load() -> None:
                while time.monotonic() < deadline:
                    name = self.chance.choice(("pays", "pays_in_a_thread"))
                    ids.append((await client.options(id=f"run-{len(ids)}").start(name, 0)).id)
                    await asyncio.sleep(1 / RUNS_PER_SECOND)

            async def nemesis() -> None:
                while time.monotonic() < deadline:
                    await asyncio.sleep(self.chance.uniform(0.1, 0.8))
                    place = self.chance.randrange(WORKERS)
                    workers[place].kill()
                    workers[place].wait()
                    self.kills += 1
                    self.differences += difference(self.site)
                    workers[place] = self.worker()

            await asyncio.gather(load(), nemesis())
            results = await asyncio.wait_for(
                asyncio.gather(*(client.handle(id, returns=int).result() for id in ids)), 90
            )
        print(f"{len(ids)} runs, {self.kills} kills")
        assert set(results) <= {STEPS}
        self.differences += difference(self.site)
        return ids


async def test_rows_written_are_the_steps_recorded_whenever_a_worker_dies(site: Site) -> None:
    killing = Killing(site, "together")
    ids = await killing.run(SECONDS)
    assert [found for found in killing.differences if found] == []
    assert killing.kills >= SECONDS / 2
    assert site.ask("SELECT count(*) FROM effects") == [(len(ids) * STEPS,)]
    assert site.ask("SELECT sum(strikes) FROM perdure_runs") == [(0,)]
    assert "Traceback" not in site.log()


async def test_this_test_sees_effect_and_record_in_two_commits(site: Site) -> None:
    killing = Killing(site, "apart")
    await killing.run(SECONDS)
    assert [found for found in killing.differences if found]
