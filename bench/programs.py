"""Every measurement is a program of its own that prints JSON; here they are called."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers

HERE = Path(__file__).parent
Answer = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How long to measure. `--quick` is for trying the programs out; its numbers are not for judging."""

    seconds: float = 1.5
    rounds: int = 3
    few: int = 2
    """Rounds of what says the same each time, such as a time that is far from the one that is asked for."""
    sleeps: int = 2000
    signals: int = 200
    flat: int = 100_000
    parked: int = 100_000
    replayed: int = 10_000
    idle: float = 10.0
    imports: int = 9
    finished: int = 1_000_000
    minutes: int = 10
    minute: float = 60.0


QUICK = Scale(
    seconds=0.7,
    rounds=1,
    few=1,
    sleeps=200,
    signals=20,
    flat=6000,
    parked=4000,
    replayed=1000,
    idle=2.0,
    imports=3,
    finished=20_000,
    minutes=3,
    minute=8.0,
)


PEERS = {"dbos": "DBOS", "absurd": "Absurd"}
"""As they are named in the answers of a row, and in what is printed of them."""


class Failed(Exception):
    """A measurement that ended without an answer; the text is the last line it said."""


def program(*command: object, timeout: float = 240, aloud: bool = False) -> Answer:
    """Runs one measurement and reads the JSON object in its last line. aloud: one that says itself how far it is."""
    says = None if aloud else subprocess.PIPE
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=says, text=True, timeout=timeout)
    if done.returncode:
        said = (done.stderr or "").strip().splitlines() or ["said nothing more"]
        raise Failed(re.sub(r" \(/.*\)", "", said[-1]))
    answer: Answer = json.loads(done.stdout.splitlines()[-1])
    return answer


def ours(measurement: str, **options: object) -> Answer:
    return program(sys.executable, HERE / "ours.py", measurement, *flags(options))


def side_by_side(processes: int, *, store: str, concurrency: int, **options: object) -> list[Answer]:
    """As many processes of ours on one store, each with its share of the runs under way, in the same seconds."""
    share = {**options, "store": store, "concurrency": concurrency // processes, "at": time.time() + 4}
    with ThreadPoolExecutor(processes) as pool:
        return list(pool.map(lambda _: ours("throughput", **share), range(processes)))


def fleet(measurement: str, *, timeout: float = 240, aloud: bool = False, **options: object) -> Answer:
    command = (sys.executable, HERE / "fleet.py", measurement, *flags(options))
    return program(*command, timeout=timeout, aloud=aloud)


def floor(**options: object) -> Answer:
    return program(sys.executable, HERE / "floor.py", *flags(options))


def pg_floor(**options: object) -> Answer:
    return program(sys.executable, HERE / "pg_floor.py", *flags(options))


def dbos(workload: str, size: float, **options: object) -> Answer:
    return program(peers.python("dbos"), HERE / "peer_dbos.py", workload, size, *flags(options))


def absurd(workload: str, size: float, **options: object) -> Answer:
    return program(peers.python("absurd"), HERE / "peer_absurd.py", workload, size, *flags(options))


def remarks(answers: dict[str, list[Any]], failures: list[str], notes: Iterable[str] = ()) -> str:
    """What stands beside a row: notes, what each peer was set to, as its program says, and what failed."""
    peers = [f"{title}: {answers[name][0]['settings']}" for name, title in PEERS.items() if name in answers]
    return "; ".join([*notes, *peers, *failures])


@functools.cache
def commit() -> list[float]:
    """Milliseconds of commits of the floor on SQLite, one at a time, each after a rest; once for all rows."""
    found: list[float] = floor(seconds=0.5, concurrency=1, rest=0.01, way="inline")["ms"]
    return found


@functools.cache
def sleepers(number: int) -> list[float]:
    """How many milliseconds late so many sleeps of one second are in the interpreter alone; once for all rows."""
    found: list[float] = program(sys.executable, "-c", SLEEPERS, number)["ms"]
    return found


SLEEPERS = """
import asyncio, json, sys, time

async def late():
    began = time.perf_counter()
    await asyncio.sleep(1.0)
    return (time.perf_counter() - began - 1.0) * 1000

async def all_late():
    return await asyncio.gather(*(late() for _ in range(int(sys.argv[1]))))

print(json.dumps({"ms": asyncio.run(all_late())}))
"""


def flags(options: dict[str, object]) -> Iterable[str]:
    for name, value in options.items():
        if value is True:
            yield f"--{name}"
        elif value is not False:
            yield f"--{name}={value}"


def gathered(rounds: int, programs: dict[str, Callable[[], Answer]]) -> tuple[dict[str, list[Any]], list[str]]:
    """The answers of each program, one per round, interleaved; and the failures, after which a program rests."""
    answers: dict[str, list[Any]] = {}
    failures: dict[str, str] = {}
    for _ in range(rounds):
        for name in [each for each in programs if each not in failures]:
            try:
                answers.setdefault(name, []).append(programs[name]())
            except (Failed, subprocess.TimeoutExpired, OSError, ValueError) as error:
                failures[name] = f"{name}: {error}"
    return {name: each for name, each in answers.items() if each}, list(failures.values())
