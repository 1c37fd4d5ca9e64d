"""The rows on SQLite."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from statistics import median
from typing import Any

from programs import Answer, Scale, commit, dbos, fleet, floor, gathered, ours, program, remarks, side_by_side, sleepers
from table import Check, Line, at_least, at_most, percentile, times_dbos

ENGINES = 2
"""Processes of ours at full load: with one, one core is the limit; a third gains nothing on two cores."""
DBOS = {"processes": 3, "threads": 1, "pool": 4}
"""At full load; found by trying, as docs/bench.md says."""


def throughput(scale: Scale, *, steps: int, concurrency: int, judged: bool = False) -> list[Line]:
    size: dict[str, Any] = {"steps": steps, "concurrency": concurrency, "seconds": scale.seconds}
    peer = f"steps-{steps}"

    def engine(*, sync: bool = False) -> Answer:
        """As many processes as serve it best, on one file."""
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            found = side_by_side(ENGINES, store=f"sqlite:///{folder}/runs.db", sync=sync, **size)
        return {"steps_per_s": sum(each["steps_per_s"] for each in found)}

    programs = {
        "async": engine if judged else lambda: ours("throughput", **size),
        "sync": lambda: engine(sync=True) if judged else ours("throughput", sync=True, **size),
        "dbos": lambda: dbos(peer, scale.seconds, concurrency=concurrency, **(DBOS if judged else {})),
        "floor": lambda: floor(**size),
        "bare": lambda: floor(bare=True, **size),
    }
    if judged:
        programs["alone"] = lambda: ours("throughput", **size)
    # What nothing is asked of is measured once.
    answers, failures = gathered(scale.rounds if judged else 1, programs)
    rates = {name: median(each["steps_per_s"] for each in rounds) for name, rounds in answers.items()}
    times, void = times_dbos(rates)
    checks = [
        at_least(what, rates["async"] / rates[name], wanted, void=void)
        for name, what, wanted in (("floor", "part of floor", 0.4), ("dbos", "times DBOS", 40))
        if judged and rates.keys() >= {"async", name}
    ]
    notes = [f"{ENGINES} processes of ours"] if judged else []
    if times:
        notes.append(f"floors: {times[0]:.0f} and {times[1]:.0f} times DBOS")
    if "floor" in answers:
        ways = answers["floor"][0]
        notes.append(f"{ways['way']}, {ways['rows_of']}")
    what = f"{steps}-step runs, {concurrency} at once"
    note = remarks(answers, failures, notes)
    lines = [Line(what=what, unit="steps/s", values=rates, checks=tuple(checks), note=note)]
    if "alone" in rates:
        alone = rates.pop("alone")
        note = f"{ENGINES} processes: {rates['async'] / alone:.2f} times as many" if "async" in rates else ""
        lines.append(Line(what=f"{what}, in one process", unit="steps/s", values={"async": alone}, note=note))
    return lines


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
        Line(what=f"{what}, p50", unit="ms", values=p50, checks=tuple(fast), note=remarks(answers, failures)),
        Line(what=f"{what}, p99", unit="ms", values=p99, checks=tuple(even)),
    ]


def sleeps(scale: Scale) -> list[Line]:
    answers, failures = gathered(
        1,
        {
            "async": lambda: ours("sleeps", runs=scale.sleeps),
            "dbos": lambda: dbos("sleeps", scale.sleeps),
            "floor": lambda: {"ms": sleepers(scale.sleeps)},
        },
    )
    what = f"{scale.sleeps:,} one-second sleeps (floor: asyncio.sleep), lateness"
    middle = {name: median(median(each["ms"]) for each in rounds) for name, rounds in answers.items()}
    worst = {name: median(max(each["ms"]) for each in rounds) for name, rounds in answers.items()}
    return [
        Line(what=f"{what} p50", unit="ms", values=middle, note=remarks(answers, failures)),
        Line(what=f"{what} worst", unit="ms", values=worst),
    ]


def signal(scale: Scale) -> list[Line]:
    answers, failures = gathered(
        scale.few,
        {
            "async": lambda: ours("signals", runs=scale.signals),
            "dbos": lambda: dbos("signals", min(scale.signals, 50)),
            # One commit, after the same rest of 10 ms that each signal has before it.
            "floor": lambda: floor(seconds=scale.seconds, concurrency=1, rest=0.01),
        },
    )
    values = {name: median(percentile(each["ms"], 0.5) for each in rounds) for name, rounds in answers.items()}
    checks = []
    if values.keys() >= {"async", "floor"}:
        checks.append(at_most("commits of the floor", values["async"] / values["floor"], 2.5))
    what = "signal to result, p50 (floor: one commit after the same rest)"
    return [Line(what=what, unit="ms", values=values, checks=tuple(checks), note=remarks(answers, failures))]


def recovery(scale: Scale) -> list[Line]:
    rounds = [fleet("recovery") for _ in range(scale.few)]
    return [
        Line(
            what="killed worker: until all its runs go on in another (floor: one commit)",
            unit="ms",
            values={"async": median(max(each["gone_on_ms"]) for each in rounds), "floor": median(commit())},
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
    with tempfile.TemporaryDirectory(prefix="bench-four-") as folder:
        store = f"sqlite:///{folder}/four.db"
        ours("throughput", store=store, seconds=0.1)
        answers = side_by_side(4, store=store, concurrency=256, seconds=2 * scale.seconds)
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
            what="four processes on one file: longest wait for a start's commit (floor: one commit alone)",
            unit="ms",
            values={"async": worst, "floor": median(commit())},
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
            what=f"{what}: waking 2,000 that are not in memory, beyond the sleep (floor: asyncio.sleep)",
            unit="s",
            values={"async": found["late_s"], "floor": max(sleepers(2000)) / 1000},
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
    rebuilt, read = [], []
    for _ in range(scale.few):
        with tempfile.TemporaryDirectory(prefix="bench-replay-") as folder:
            store = f"sqlite:///{folder}/replay.db"
            ours("record", store=store, steps=scale.replayed)
            found = ours("replay", store=store)
            rebuilt.append(found["long_ms"] - found["short_ms"])
            read.append(program(sys.executable, "-c", READING, f"{folder}/replay.db")["ms"])
    return [
        Line(
            what=f"replay of a {scale.replayed:,}-step run beyond that of one step (floor: its events read and parsed)",
            unit="ms",
            values={"async": median(rebuilt), "floor": median(read)},
            checks=(at_most("ms", median(rebuilt), 300, strictly=True),),
        )
    ]


READING = """
import sqlite3, sys, time, msgspec
db = sqlite3.connect(sys.argv[1])
[long] = db.execute("SELECT run FROM perdure_history GROUP BY run ORDER BY count(*) DESC LIMIT 1").fetchone()
began = time.perf_counter()
for [event] in db.execute("SELECT event FROM perdure_history WHERE run = ? ORDER BY seq", [long]):
    msgspec.json.decode(event)
print('{"ms": %f}' % ((time.perf_counter() - began) * 1000))
"""


def idle(scale: Scale) -> list[Line]:
    percent = 100 * float(ours("idle", seconds=scale.idle)["core"])
    checks = (at_most("%", percent, 1, strictly=True),)
    return [Line(what="idle worker", unit="% of a core", values={"async": percent}, checks=checks)]


def importing(scale: Scale) -> list[Line]:
    def taken(modules: str) -> float:
        code = f"import time; a = time.perf_counter(); import {modules}; print((time.perf_counter() - a) * 1000)"
        # As installed: with its compiled files, which the first of these writes where they are missing.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        line = [sys.executable, "-c", code]
        done = subprocess.run(line, capture_output=True, text=True, check=True, env=environment)
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
