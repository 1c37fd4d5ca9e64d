"""`make bench`: one table of this engine, its floors and its peers, measured in one run on this machine.

Every measurement is a program of its own that prints JSON; a row interleaves them in rounds and takes medians, so that
a busy moment of the machine meets all of them alike. A program that fails is a failed row, not the end of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import peers

HERE = Path(__file__).parent
COLUMNS = ("async", "sync", "dbos", "floor", "bare")
VOID = "void: the floor must do 10 times DBOS"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One number that was asked for. passed is None where it could not be judged; why says so."""

    asked: str
    found: str
    passed: bool | None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table: the same measure of everybody, and what was asked of us."""

    what: str
    unit: str
    values: dict[str, float] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How long to measure. `--quick` is for trying the programs out; its numbers are not for judging."""

    seconds: float = 2.0
    rounds: int = 3
    sleeps: int = 2000
    signals: int = 200
    flat: int = 100_000
    parked: int = 100_000
    replayed: int = 10_000
    idle: float = 10.0
    imports: int = 9


QUICK = Scale(seconds=0.7, rounds=1, sleeps=200, signals=20, flat=6000, parked=4000, replayed=1000, idle=2.0, imports=3)


class Failed(Exception):
    """A measurement that ended without an answer; the text is the last line it said."""


def program(*command: object) -> dict[str, Any]:
    """Runs one measurement and reads the JSON object in its last line."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["said nothing"]
        raise Failed(re.sub(r" \(/.*\)", "", said[-1]))
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def ours(measurement: str, **options: object) -> dict[str, Any]:
    return program(sys.executable, HERE / "ours.py", measurement, *flags(options))


def floor(**options: object) -> dict[str, Any]:
    return program(sys.executable, HERE / "floor.py", *flags(options))


def dbos(workload: str, *sizes: object) -> dict[str, Any]:
    return program(peers.python("dbos"), HERE / "peer_dbos.py", workload, *sizes)


def flags(options: dict[str, object]) -> Iterable[str]:
    for name, value in options.items():
        if value is True:
            yield f"--{name}"
        elif value is not False:
            yield f"--{name}={value}"


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def at_least(what: str, value: float, wanted: float, *, void: bool = False) -> Check:
    verdict = None if void else value >= wanted
    return Check(asked=f"{what} ≥ {wanted:g}", found=f"{value:.3g}", passed=verdict, why=VOID if void else "")


def at_most(what: str, value: float, wanted: float, *, strictly: bool = False) -> Check:
    passed = value < wanted if strictly else value <= wanted
    return Check(asked=f"{what} {'<' if strictly else '≤'} {wanted:.3g}", found=f"{value:.3g}", passed=passed)


def gathered(rounds: int, programs: dict[str, Callable[[], dict[str, Any]]]) -> tuple[dict[str, list[Any]], list[str]]:
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


def throughput(scale: Scale, *, steps: int, concurrency: int, judged: bool = False) -> list[Line]:
    size: dict[str, object] = {"steps": steps, "concurrency": concurrency, "seconds": scale.seconds}
    answers, failures = gathered(
        scale.rounds,
        {
            "async": lambda: ours("throughput", **size),
            "sync": lambda: ours("throughput", sync=True, **size),
            "dbos": lambda: dbos(f"steps-{steps}", scale.seconds, concurrency),
            "floor": lambda: floor(**size),
            "bare": lambda: floor(bare=True, **size),
        },
    )
    rates = {name: median(each["steps_per_s"] for each in rounds) for name, rounds in answers.items()}
    checks: list[Check] = []
    note = ""
    if rates.keys() >= {"floor", "bare", "dbos"}:
        ways = answers["floor"][0]
        times = [rates[name] / rates["dbos"] for name in ("floor", "bare")]
        note = f"floors: {times[0]:.0f} and {times[1]:.0f} times DBOS; {ways['way']}, {ways['rows_of']}"
        if judged and "async" in rates:
            void = min(times) < 10
            checks.append(at_least("part of floor", rates["async"] / rates["floor"], 0.4, void=void))
            checks.append(at_least("times DBOS", rates["async"] / rates["dbos"], 40))
    what = f"{steps}-step runs, {concurrency} at once"
    return [Line(what=what, unit="steps/s", values=rates, checks=tuple(checks), note=joined(note, failures))]


def latency(scale: Scale) -> list[Line]:
    answers, failures = gathered(
        scale.rounds,
        {
            "async": lambda: ours("throughput", seconds=scale.seconds),
            "sync": lambda: ours("throughput", seconds=scale.seconds, sync=True),
            "dbos": lambda: dbos("latency", scale.seconds),
            "floor": lambda: floor(seconds=scale.seconds, concurrency=1),
            "bare": lambda: floor(seconds=scale.seconds, concurrency=1, bare=True),
        },
    )

    def at(part: float) -> dict[str, float]:
        return {name: median(percentile(each["ms"], part) for each in rounds) for name, rounds in answers.items()}

    p50, p99 = at(0.5), at(0.99)
    fast, even = [], []
    if p50.keys() >= {"async", "floor"}:
        fast.append(at_most("times floor", p50["async"] / p50["floor"], 2.5))
    if p50.keys() >= {"async", "dbos"}:
        even.append(at_most("ms, DBOS's p50", p99["async"], p50["dbos"], strictly=True))
    what = "one run alone, 3 steps, start to result"
    return [
        Line(what=f"{what}, p50", unit="ms", values=p50, checks=tuple(fast), note=joined("", failures)),
        Line(what=f"{what}, p99", unit="ms", values=p99, checks=tuple(even)),
    ]


def sleeps(scale: Scale) -> list[Line]:
    answers, failures = gathered(
        scale.rounds,
        {"async": lambda: ours("sleeps", runs=scale.sleeps), "dbos": lambda: dbos("sleeps", scale.sleeps)},
    )
    what = f"{scale.sleeps:,} one-second sleeps, lateness"
    middle = {name: median(median(each["ms"]) for each in rounds) for name, rounds in answers.items()}
    worst = {name: median(max(each["ms"]) for each in rounds) for name, rounds in answers.items()}
    return [
        Line(what=f"{what} p50", unit="ms", values=middle, note=joined("", failures)),
        Line(what=f"{what} worst", unit="ms", values=worst),
    ]


def signal(scale: Scale) -> list[Line]:
    answers, failures = gathered(
        scale.rounds,
        {
            "async": lambda: ours("signals", runs=scale.signals),
            "dbos": lambda: dbos("signals", min(scale.signals, 50)),
            "floor": lambda: floor(seconds=scale.seconds, concurrency=1),
        },
    )
    # The floor's measure is one commit, a quarter of its 3-step run alone.
    values = {
        name: median(percentile(each["ms"], 0.5) for each in rounds) / (4 if name == "floor" else 1)
        for name, rounds in answers.items()
    }
    checks = []
    if values.keys() >= {"async", "floor"}:
        checks.append(at_most("commits of the floor", values["async"] / values["floor"], 2.5))
    what = "signal to result, p50 (floor: one commit)"
    return [Line(what=what, unit="ms", values=values, checks=tuple(checks), note=joined("", failures))]


def recovery(scale: Scale) -> list[Line]:
    rounds = [ours("recovery", runs=100) for _ in range(scale.rounds)]
    return [
        Line(
            what="killed worker: until all its runs go on in another",
            unit="ms",
            values={"async": median(max(each["gone_on_ms"]) for each in rounds)},
            checks=(
                at_most("ms, worst round", max(max(each["gone_on_ms"]) for each in rounds), 1000),
                at_most("runs lost", sum(each["lost"] for each in rounds), 0),
                Check(
                    asked="re-executed ≤ in flight",
                    found=", ".join(f"{each['re_executed']} of {each['orphans']}" for each in rounds),
                    passed=all(each["re_executed"] <= each["orphans"] for each in rounds),
                ),
            ),
            note="each run that it held had one step in flight",
        )
    ]


def four(scale: Scale) -> list[Line]:
    with tempfile.TemporaryDirectory(prefix="bench-four-") as folder, ThreadPoolExecutor(4) as pool:
        store = f"sqlite:///{folder}/four.db"
        ours("throughput", store=store, seconds=0.1)
        options: dict[str, object] = {"store": store, "seconds": 2 * scale.seconds, "concurrency": 64}
        begin = time.time() + 4
        answers = list(pool.map(lambda _: ours("throughput", at=begin, **options), range(4)))
    rates = sorted(each["steps_per_s"] for each in answers)
    worst = max(each["worst_start_ms"] for each in answers)
    return [
        Line(
            what="four processes on one file, 64 runs at once in each: together",
            unit="steps/s",
            values={"async": sum(rates)},
            checks=(at_least("slowest / fastest", rates[0] / rates[-1], 1 / 3),),
            note="each: " + ", ".join(f"{rate:,.0f}" for rate in rates),
        ),
        Line(
            what="four processes on one file: longest wait for a start's commit",
            unit="ms",
            values={"async": worst},
            checks=(at_most("ms", worst, 1000),),
        ),
    ]


def parked(scale: Scale) -> list[Line]:
    with tempfile.TemporaryDirectory(prefix="bench-parked-") as folder:
        store = f"sqlite:///{folder}/parked.db"
        left = ours("park", store=store, runs=scale.parked)
        found = ours("wake", store=store, at=left["at"])
    own = program(sys.executable, "-c", INTERPRETER)["mb"]
    what = f"{scale.parked:,} parked runs"
    return [
        Line(
            what=f"{what}: a worker's memory (floor: the interpreter's own)",
            unit="MB",
            values={"async": found["mb"], "floor": own},
            checks=(at_most("MB", found["mb"], 250, strictly=True),),
            note=f"{left['mb_having_parked']:.0f} MB in the process that started them, "
            f"{left['starts_per_s']:,.0f} starts/s",
        ),
        Line(
            what=f"{what}: waking 2,000 that are not in memory, beyond the sleep",
            unit="s",
            values={"async": found["late_s"]},
            checks=(at_most("s", found["late_s"], 0.5),),
            note="void: opened after the instant" if found["opened_too_late"] else "",
        ),
    ]


INTERPRETER = """
import asyncio, sqlite3
lines = open("/proc/self/status").read().splitlines()
kb = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
print('{"mb": %f}' % (kb / 1024))
"""


def flat(scale: Scale) -> list[Line]:
    found = ours("flat", runs=scale.flat)
    early, late = median(found["early_ms"]), median(found["late_ms"])
    cpu = median(found["late_cpu_ms"]) / median(found["early_cpu_ms"])
    return [
        Line(
            what=f"run number {scale.flat:,} (floor: run number 1,000), 256 at once",
            unit="ms each",
            values={"async": late, "floor": early},
            checks=(at_most("times", late / early, 1.3),),
            note=f"CPU alone: {cpu:.2f} times",
        )
    ]


def replay(scale: Scale) -> list[Line]:
    rebuilt = []
    for _ in range(scale.rounds):
        with tempfile.TemporaryDirectory(prefix="bench-replay-") as folder:
            store = f"sqlite:///{folder}/replay.db"
            ours("record", store=store, steps=scale.replayed)
            found = ours("replay", store=store)
            rebuilt.append(found["long_ms"] - found["short_ms"])
    return [
        Line(
            what=f"replay of a {scale.replayed:,}-step run (beyond that of one step)",
            unit="ms",
            values={"async": median(rebuilt)},
            checks=(at_most("ms", median(rebuilt), 300, strictly=True),),
        )
    ]


def idle(scale: Scale) -> list[Line]:
    percent = 100 * float(ours("idle", seconds=scale.idle)["core"])
    checks = (at_most("%", percent, 1, strictly=True),)
    return [Line(what="idle worker", unit="% of a core", values={"async": percent}, checks=checks)]


def importing(scale: Scale) -> list[Line]:
    def taken(modules: str) -> float:
        code = f"import time; a = time.perf_counter(); import {modules}; print((time.perf_counter() - a) * 1000)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return float(done.stdout)

    pairs = [(taken("perdure"), taken("asyncio, sqlite3")) for _ in range(scale.imports)]
    ms, own = (median(each) for each in zip(*pairs, strict=True))
    checks = (at_most("ms", ms, 150, strictly=True),)
    what = "import perdure (floor: import asyncio, sqlite3)"
    return [Line(what=what, unit="ms", values={"async": ms, "floor": own}, checks=checks)]


ROWS: dict[str, Callable[[Scale], list[Line]]] = {
    "steps-3-c1": lambda scale: throughput(scale, steps=3, concurrency=1),
    "steps-3-c32": lambda scale: throughput(scale, steps=3, concurrency=32),
    "steps-3-c256": lambda scale: throughput(scale, steps=3, concurrency=256, judged=True),
    "steps-100": lambda scale: throughput(scale, steps=100, concurrency=32),
    "latency": latency,
    "sleeps": sleeps,
    "signal": signal,
    "recovery": recovery,
    "four": four,
    "parked": parked,
    "flat": flat,
    "replay": replay,
    "idle": idle,
    "import": importing,
}


def measured(name: str, scale: Scale) -> list[Line]:
    try:
        return ROWS[name](scale)
    except (Failed, subprocess.SubprocessError, OSError, ValueError) as error:
        return [Line(what=name, unit="", checks=(Check(asked="a number", found="none", passed=False, why=str(error)),))]


def joined(note: str, failures: list[str]) -> str:
    return "; ".join(filter(None, [note, *failures]))


def settings(scale: Scale) -> list[str]:
    return [
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {platform.system()}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before; DBOS {peers.version('dbos')}",
        f"WAL and synchronous=FULL everywhere; medians of {scale.rounds} interleaved rounds of {scale.seconds:g} s",
        "DBOS: sync workflows, 2 executor threads, pool 4, 10 ms polling; sleeps and signals as async workflows",
    ]


def cells(line: Line) -> list[str]:
    def shown(value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    verdicts = {True: "pass", False: "FAIL", None: "?"}
    asked = [f"{check.asked}: {check.found}  {verdicts[check.passed]}" for check in line.checks]
    remarks = [*asked, *(check.why for check in line.checks if check.why), *filter(None, [line.note])]
    return [line.what, line.unit, *(shown(line.values.get(column)) for column in COLUMNS), "\n".join(remarks)]


def show(lines: list[Line], heading: list[str]) -> None:
    titles = ["what", "unit", "async steps", "sync steps", "DBOS", "floor", "bare floor", "asked: found"]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for each in heading:
            print(each)
        for line in lines:
            print(" | ".join(cells(line)).replace("\n", "; "))
        return
    console = Console(width=None if sys.stdout.isatty() else 170)
    table = Table(*titles, show_lines=True)
    for column in table.columns[2:7]:
        column.justify = "right"
    for line in lines:
        table.add_row(*cells(line))
    for each in heading:
        console.print(each)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", action="append", choices=ROWS, metavar="NAME", help="only this row; see --list")
    parser.add_argument("--list", action="store_true", help="the names of the rows")
    parser.add_argument("--quick", action="store_true", help="a try-out: small sizes, one round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same as JSON")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(ROWS))
        return 0
    scale = QUICK if asked.quick else Scale()
    heading = settings(scale)
    began = time.monotonic()
    lines = []
    for name in asked.row or ROWS:
        print(f"measuring {name} …", file=sys.stderr, flush=True)
        lines += measured(name, scale)
    heading.append(f"measured in {time.monotonic() - began:.0f} s")
    show(lines, heading)
    if asked.json:
        asked.json.write_text(json.dumps({"settings": heading, "lines": [asdict(line) for line in lines]}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
