"""`make chaos`: real faults against real processes; each scenario says what it did and checks what is promised.

python -m chaos.run [--only NAME] [--store sqlite|postgres] [--short | --long] [--seed N] [--json] [--list]

Exit: 0 nothing was violated, 1 something was (named, with the seed), 2 the command was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from chaos import clock, disk, foreign, poison, processes, versions
from chaos.sqlite import SQLiteBase
from chaos.stage import Report, Scenario, Stage, Violated

SQLITE: Final = ("sqlite",)
SCENARIOS: Final = (
    Scenario(name="kill", play=processes.kill),
    Scenario(name="pause", play=processes.pause),
    Scenario(name="hold", play=processes.hold),
    Scenario(name="replace", play=processes.replace),
    Scenario(name="restart", play=processes.restart),
    Scenario(name="timers", play=processes.timers),
    Scenario(name="poison", play=poison.poison),
    Scenario(name="memory", play=poison.memory),
    Scenario(name="versions", play=versions.versions),
    Scenario(name="disk", play=disk.disk),
    Scenario(name="clock", play=clock.clock),
    Scenario(name="lock", play=foreign.lock, stores=SQLITE, why_not="a server lets several write at once"),
    Scenario(name="moved", play=foreign.moved, stores=SQLITE, why_not="a server's store is no file of ours"),
)


async def played(scenario: Scenario, stage: Stage) -> None:
    """Play it to the end, whatever happens, and audit what it left."""
    began = time.monotonic()
    try:
        stage.base.prepare()
        await scenario.play(stage)
        await stage.leave()
    except Violated as violated:
        stage.violated(str(violated))
    except Exception as error:
        stage.violated(f"the scenario met {type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}")
    finally:
        stage.close()
    try:
        stage.audit()
    except Exception as error:
        stage.violated(f"what it left cannot be read: {type(error).__name__}: {error}\n{traceback.format_exc(limit=-2)}")
    stage.report.seconds = time.monotonic() - began


@contextmanager
def staged(scenario: Scenario, store: str, size: str, seed: int, folder: Path) -> Iterator[Stage]:
    """The stage of one scenario in an empty folder, taken down at the end."""
    report = Report(scenario=scenario.name, store=store, size=size, seed=seed)
    with ExitStack() as after:
        place = folder / "store"
        place.mkdir()
        if scenario.name == "disk" and (unmount := disk.small_disk(place)) is not None:
            after.callback(unmount)
        stage = Stage(SQLiteBase(place), folder, report)
        yield stage


def run(scenario: Scenario, store: str, size: str, seed: int, *, keep: bool = False) -> Report:
    """Play one scenario on one store; its report. keep: leave the folder of one that was violated."""
    folder = Path(tempfile.mkdtemp(prefix=f"perdure-chaos-{scenario.name}-"))
    try:
        with staged(scenario, store, size, seed, folder) as stage:
            asyncio.run(played(scenario, stage))
            report = stage.report
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    if keep:
        report.notes.append(f"kept: {folder}")
    return report


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description="Real faults against real processes.")
    parser.add_argument("--only", metavar="NAME", action="append", choices=[each.name for each in SCENARIOS])
    parser.add_argument("--store", choices=("sqlite", "postgres"), help="only on this one; default: all that are found")
    parser.add_argument("--seed", type=int, help="default: drawn, and printed")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--short", action="store_const", dest="size", const="short", help="seconds each, as in `make test`")
    size.add_argument("--long", action="store_const", dest="size", const="long", help="hours: the literal list")
    parser.add_argument("--json", action="store_true", help="one object per line")
    parser.add_argument("--keep", action="store_true", help="leave the folders, with logs and ledgers")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    given = parser.parse_args(arguments)
    if given.list:
        for scenario in SCENARIOS:
            print(f"{scenario.name:<12} {', '.join(scenario.stores):<18} {scenario.text}")
        return 0
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    violated = 0
    for store in ("sqlite",):
        for scenario in SCENARIOS:
            if (given.only and scenario.name not in given.only) or (given.store and store != given.store):
                continue
            if store not in scenario.stores:
                continue
            report = run(scenario, store, given.size or "usual", seed, keep=given.keep)
            violated += bool(report.violations)
            print(report.json() if given.json else report.text(), flush=True)
    return 1 if violated else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
