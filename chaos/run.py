"""`make chaos`: real faults against real processes; each scenario says what it did and checks what is promised.

python -m chaos.run [--only NAME] [--store sqlite|postgres] [--short | --long] [--seed N] [--json] [--list]

Exit: 0 nothing was violated, 1 something was (named, with the seed), 2 the command was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
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

from chaos import clock, disk, foreign, network, poison, postgres, processes, servers, versions
from chaos import open as open_
from chaos.planted import PLANTED
from chaos.sqlite import SQLiteBase
from chaos.stage import SIZES, Base, Report, Scenario, Skipped, Stage, Violated
from tests.servers import PostgresServer

STORES: Final = ("sqlite", "postgres")
SQLITE: Final = ("sqlite",)
POSTGRES: Final = ("postgres",)
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
    Scenario(name="migrations", play=versions.migrations),
    Scenario(name="open", play=open_.signalled),
    Scenario(name="disk", play=disk.disk),
    Scenario(name="clock", play=clock.clock),
    Scenario(name="lock", play=foreign.lock, stores=SQLITE),
    Scenario(name="moved", play=foreign.moved, stores=SQLITE),
    Scenario(name="crash", play=servers.crash, stores=POSTGRES),
    Scenario(name="outage", play=servers.outage, stores=POSTGRES),
    Scenario(name="cut", play=network.cut, stores=POSTGRES),
    Scenario(name="half-open", play=network.half_open, stores=POSTGRES),
    Scenario(name="held", play=network.held, stores=POSTGRES),
)
PLAYABLE: Final = tuple(
    (scenario.name, store) for store in STORES for scenario in SCENARIOS if store in scenario.stores
)
"""(scenario, store): everything there is to play."""


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
        stage.violated(
            f"what it left cannot be read: {type(error).__name__}: {error}\n{traceback.format_exc(limit=-2)}"
        )
    stage.report.seconds = time.monotonic() - began


@contextmanager
def staged(scenario: Scenario, folder: Path, report: Report) -> Iterator[Stage]:
    """The stage of one scenario in an empty folder, taken down at the end."""
    with ExitStack() as after:
        place = folder / "store"
        place.mkdir()
        base: Base
        if report.store == "sqlite":
            base = SQLiteBase(place)
            if scenario.name == "disk":
                disk.small_disk(place, after)
        else:
            base = postgres.PostgresBase(_server(scenario.name, after))
            after.callback(base.close)
        # What the engine says in this very process, the client's.
        log = logging.FileHandler(folder / "client.log")
        after.callback(log.close)
        logger = logging.getLogger("perdure")
        logger.addHandler(log)
        after.callback(logger.removeHandler, log)
        yield Stage(base, folder, report)


def _server(scenario: str, after: ExitStack) -> PostgresServer:
    """The server of a scenario: one of its own where it harms more than the processes of one."""
    if not postgres.found():
        raise Skipped("no PostgreSQL is found here")
    if scenario == "disk":
        return disk.server_on_small_disk(after)
    if scenario == "clock":
        return clock.server_with_clock(after)
    return postgres.shared()


def run(
    scenario: Scenario, store: str, size: str, seed: int, *, planted: str | None = None, keep: bool = False
) -> Report:
    """Play one scenario on one store; its report.

    planted: a bug for its workers. keep: leave its folder, with logs and ledger, and say where it is.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"perdure-chaos-{scenario.name}-"))
    report = Report(scenario=scenario.name, store=store, size=size, seed=seed)
    try:
        with staged(scenario, folder, report) as stage:
            stage.planted = planted
            asyncio.run(played(scenario, stage))
    except Skipped as skipped:
        report.skipped = str(skipped)
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    if keep:
        report.notes.append(f"kept: {folder}")
    return report


def main(arguments: list[str]) -> int:
    names = [each.name for each in SCENARIOS]
    parser = argparse.ArgumentParser(prog="make chaos", description="Real faults against real processes.")
    parser.add_argument("--only", metavar="NAME", action="append", choices=names, help=f"one of: {', '.join(names)}")
    parser.add_argument("--store", choices=STORES, help="only on this one; default: all that are found")
    parser.add_argument("--seed", type=int, help="default: drawn, and printed")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--short", action="store_const", dest="size", const=SIZES[0], help="seconds each, as `make test`")
    size.add_argument("--long", action="store_const", dest="size", const=SIZES[2], help="hours: the literal list")
    parser.add_argument("--json", action="store_true", help="one object per line")
    parser.add_argument("--keep", action="store_true", help="leave the folders, with logs and ledgers")
    parser.add_argument("--planted", choices=PLANTED, help="a bug in all processes, to see that it is found")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    given = parser.parse_args(arguments)
    if given.list:
        for scenario in SCENARIOS:
            print(f"{scenario.name:<12} {', '.join(scenario.stores):<18} {scenario.text}")
        return 0
    if given.planted:
        PLANTED[given.planted]()  # here too: the client is one of ours
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    print(f"seed {seed}", file=sys.stderr, flush=True)
    by_name = {scenario.name: scenario for scenario in SCENARIOS}
    violated = []
    for name, store in PLAYABLE:
        if (given.only and name not in given.only) or (given.store and store != given.store):
            continue
        size_ = given.size or SIZES[1]
        report = run(by_name[name], store, size_, seed, planted=given.planted, keep=given.keep)
        print(report.json() if given.json else report.text(), flush=True)
        if report.violations:
            violated.append(f"{name} on {store}")
    if violated:
        print(f"violated: {', '.join(violated)}; again with --seed {seed}", file=sys.stderr)
    return 1 if violated else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
