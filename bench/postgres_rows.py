"""The rows on PostgreSQL."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from statistics import mean, median
from typing import Any

from postgres import Postgres
from programs import (
    HERE,
    PEERS,
    Answer,
    Failed,
    Scale,
    absurd,
    dbos,
    fleet,
    gathered,
    ours,
    pg_floor,
    program,
    remarks,
    side_by_side,
)
from table import Check, Line, at_least, at_most, joined, percentile, times_dbos

ENGINES = 2
"""Processes of ours at full load: with one, one core is the limit (`pg-workers`); with three, the batches are small."""
DBOS = {"processes": 3, "threads": 2, "pool": 4}
ABSURD = {"workers": 4, "batch": 32}
LEASE = 4.0
"""Seconds; for the row of the lost machine, so that it need not wait for the default of 15."""


def throughput(scale: Scale, postgres: Postgres) -> list[Line]:
    size: dict[str, Any] = {"steps": 3, "concurrency": 256, "seconds": scale.seconds}
    batches: list[float] = []

    def engine() -> Answer:
        """As many processes as serve it best, on one store, side by side; the peers have theirs."""
        with postgres.fresh() as store:
            found = side_by_side(ENGINES, store=store, **size)
        runs = sum(each["runs"] for each in found)
        # Each has measured the whole server while it served all of them, and counted all transactions.
        batches.append(ENGINES * median(each["turns_per_transaction"] for each in found))
        return {
            "steps_per_s": sum(each["steps_per_s"] for each in found),
            "server_cpu_ms": median(each["server_cpu_ms"] * each["runs"] for each in found) / runs,
        }

    def rows(*, bare: bool) -> Answer:
        if not batches:
            raise Failed("the engine did not run, so that its batches are not known")
        with postgres.fresh() as store:
            return pg_floor(store=store, bare=bare, batch=round(batches[-1], 1), **size)

    def other(peer: Callable[..., Answer], **options: object) -> Answer:
        with postgres.fresh() as store:
            return peer("steps-3", 2 * scale.seconds, store=store, concurrency=256, **options)

    answers, failures = gathered(
        scale.rounds,
        {
            "async": engine,
            "dbos": lambda: other(dbos, **DBOS),
            "absurd": lambda: other(absurd, **ABSURD),
            "floor": lambda: rows(bare=False),
            "bare": lambda: rows(bare=True),
        },
    )
    rates = {name: median(each["steps_per_s"] for each in rounds) for name, rounds in answers.items()}
    spent: dict[str, float] = {
        name: median(each["server_cpu_ms"] for each in answers[name])
        for name in ("async", "floor", "bare")
        if name in answers
    }
    times, void = times_dbos(rates)
    fast = [
        at_least(what, rates["async"] / rates[name], wanted, void=void)
        for name, what, wanted in (
            ("dbos", "times DBOS", 50),
            ("absurd", "times Absurd", 15),
            ("bare", "part of a bare insert", 0.2),
        )
        if rates.keys() >= {"async", name}
    ]
    cheap = [at_most("times a bare insert", spent["async"] / spent["bare"], 3.5, void=void)] if len(spent) == 3 else []
    notes = [f"{ENGINES} processes of ours", f"{median(batches or [0]):.0f} turns a transaction, in the floors too"]
    if times:
        notes.append(f"floors: {times[0]:.0f} and {times[1]:.0f} times DBOS")
    if "floor" in answers:
        notes.append(f"rows of a run: {answers['floor'][0]['rows_per_run']}")
    what = "PostgreSQL: 3-step runs, 256 at once"
    return [
        Line(what=what, unit="steps/s", values=rates, checks=tuple(fast), note=remarks(answers, failures, notes)),
        Line(what=f"{what}: CPU of the server", unit="ms per run", values=spent, checks=tuple(cheap)),
    ]


def latency(scale: Scale, postgres: Postgres) -> list[Line]:
    def in_fresh(measure: Callable[[str], Answer]) -> Answer:
        with postgres.fresh() as store:
            return measure(store)

    size = {"seconds": scale.seconds, "concurrency": 1}
    answers, failures = gathered(
        scale.rounds,
        {
            "async": lambda: in_fresh(lambda store: ours("throughput", store=store, **size)),
            "dbos": lambda: in_fresh(lambda store: dbos("latency", scale.seconds, store=store)),
            "absurd": lambda: in_fresh(lambda store: absurd("latency", scale.seconds, store=store)),
            "floor": lambda: in_fresh(lambda store: pg_floor(store=store, **size)),
        },
    )

    def at(part: float) -> dict[str, float]:
        return {name: median(percentile(each["ms"], part) for each in rounds) for name, rounds in answers.items()}

    p50, p99 = at(0.5), at(0.99)
    checks = [
        at_most(f"part of {title}'s", p50["async"] / p50[name], 1 / 3)
        for name, title in PEERS.items()
        if p50.keys() >= {"async", name}
    ]
    what = "PostgreSQL: one run alone, 3 steps, start to result"
    return [
        Line(
            what=f"{what}, p50",
            unit="ms",
            values=p50,
            checks=tuple(checks),
            note=remarks(answers, failures),
        ),
        Line(what=f"{what}, p99", unit="ms", values=p99),
    ]


def workers(scale: Scale, postgres: Postgres) -> list[Line]:
    def with_workers(number: int) -> Answer:
        with postgres.fresh() as store:
            return fleet("workers", store=store, workers=number, seconds=2 * scale.seconds)

    answers, failures = gathered(
        scale.few,
        {"one": lambda: with_workers(1), "two": lambda: with_workers(2)},
    )

    def spent(name: str) -> float:
        return float(median(each["worker_us_per_step"] + each["server_us_per_step"] for each in answers[name]))

    lines = []
    if answers.keys() >= {"one", "two"}:
        parts = [
            f"{name}: workers {median(each['worker_us_per_step'] for each in answers[name]):.0f}, "
            f"server {median(each['server_us_per_step'] for each in answers[name]):.0f}"
            for name in answers
        ]
        lines.append(
            Line(
                what="PostgreSQL: CPU of workers and server, two workers (floor: one)",
                unit="us per step",
                values={"async": spent("two"), "floor": spent("one")},
                checks=(at_most("times", spent("two") / spent("one"), 1.3),),
                note=joined("; ".join(parts), failures),
            )
        )
    eight = with_workers(8)
    return [
        *lines,
        Line(
            what="PostgreSQL: eight workers, 256 runs at once: together",
            unit="steps/s",
            values={"async": eight["steps_per_s"]},
            checks=(
                at_most("runs lost", eight["lost"], 0),
                at_least("fewest runs of one, of an equal share", min(eight["runs"]) / mean(eight["runs"]), 0.2),
            ),
            note=joined("runs of each: " + ", ".join(map(str, sorted(eight["runs"]))), failures if not lines else []),
        ),
    ]


def beside(scale: Scale, postgres: Postgres) -> list[Line]:
    with postgres.fresh() as store:
        found = ours("beside", store=store, runs=20, seconds=2.0)
    alone, near = percentile(found["alone"], 0.5), percentile(found["beside"], 0.5)
    return [
        Line(
            what="PostgreSQL: a commit beside an open transaction that has signalled its run, p50 (floor: others)",
            unit="ms",
            values={"async": near, "floor": alone},
            checks=(
                at_most("ms more, within noise", near - alone, 1.0),
                at_most("sessions that waited for a lock", found["waited_for_locks"], 0),
                at_most("runs ended before it did", found["ended_before"], 0),
            ),
            note=f"all ended {found['ended_after_ms']:.0f} ms after it; "
            f"p99 {percentile(found['beside'], 0.99):.1f} ms, others {percentile(found['alone'], 0.99):.1f} ms",
        )
    ]


def transaction(scale: Scale, postgres: Postgres) -> list[Line]:
    rounds = []
    for _ in range(scale.rounds):
        with postgres.fresh() as store:
            rounds.append(ours("transactions", store=store, runs=max(3, int(10 * scale.seconds))))
    step, empty, insert = (median(each[kind] for each in rounds) for kind in ("step", "empty", "insert"))
    return [
        Line(
            what="PostgreSQL: a transaction step that inserts a row (floor: an ordinary step), one run alone",
            unit="ms",
            values={"async": insert, "floor": step},
            checks=(at_most("times", insert / step, 1.5),),
            note=f"one that does nothing: {empty:.3g} ms",
        )
    ]


def idle(scale: Scale, postgres: Postgres) -> list[Line]:
    with postgres.fresh() as store:
        found = ours("idle", store=store, seconds=scale.idle)
    return [
        Line(
            what="PostgreSQL: idle worker",
            unit="queries/s",
            values={"async": found["statements_per_s"]},
            checks=(at_most("queries/s", found["statements_per_s"], 2, strictly=True),),
            note=f"{100 * found['core']:.2g} % of a core",
        )
    ]


def recovery(scale: Scale, postgres: Postgres) -> list[Line]:
    def hit(signal: str, *, lease: float = 15.0) -> list[Answer]:
        rounds = []
        for _ in range(scale.few):
            with postgres.fresh() as store:
                rounds.append(fleet("recovery", store=store, signal=signal, lease=lease))
        return rounds

    with postgres.fresh() as store:
        commit = median(pg_floor(store=store, seconds=0.3, concurrency=1)["commit_ms"])

    def line(what: str, rounds: list[Answer], allowed: float) -> Line:
        return Line(
            what=f"PostgreSQL: {what}: until its runs go on in another (floor: one commit)",
            unit="ms",
            values={"async": median(max(each["gone_on_ms"]) for each in rounds), "floor": commit},
            checks=(
                at_most("ms, worst round", max(max(each["gone_on_ms"]) for each in rounds), allowed),
                at_most("runs lost", sum(each["lost"] for each in rounds), 0),
                Check(
                    asked="re-executed ≤ in flight",
                    found=", ".join(f"{each['re_executed']} of {each['orphans']}" for each in rounds),
                    passed=all(each["re_executed"] <= each["orphans"] for each in rounds),
                ),
            ),
        )

    return [
        line("SIGKILL", hit("SIGKILL"), 1000),
        line(f"SIGSTOP, as a lost machine, lease {LEASE:g} s", hit("SIGSTOP", lease=LEASE), 1000 * (LEASE + 2)),
        line("SIGTERM, after its steps in flight", hit("SIGTERM"), 100),
    ]


def million(scale: Scale, postgres: Postgres) -> list[Line]:
    """Two databases, one of them filled, measured in turn; the engine itself has made the tables of both."""
    with ExitStack() as stack:
        stores = {name: stack.enter_context(postgres.fresh()) for name in ("empty", "full")}
        filled = {
            name: program(
                sys.executable, HERE / "pg_fill.py", store, scale.finished if name == "full" else 0, timeout=1800
            )
            for name, store in stores.items()
        }
        seconds = 2 * scale.seconds

        def committed(name: str) -> Answer:
            return ours("throughput", store=stores[name], concurrency=256, seconds=seconds)

        def claimed(name: str) -> Answer:
            return fleet("workers", store=stores[name], workers=1, seconds=seconds)

        commits, failed = gathered(scale.rounds, {name: partial(committed, name) for name in stores})
        claims, failures = gathered(scale.rounds, {name: partial(claimed, name) for name in stores})
    failures = [*failed, *failures]

    def spent(each: Answer) -> float:
        return float(each["worker_us_per_step"] + each["server_us_per_step"])

    wall = {name: median(1000 / each["runs_per_s"] for each in rounds) for name, rounds in commits.items()}
    cpu = {name: median(each["cpu_ms"] + each["server_cpu_ms"] for each in rounds) for name, rounds in commits.items()}
    cost = {name: median(map(spent, rounds)) for name, rounds in claims.items()}
    what = f"PostgreSQL: {scale.finished:,} finished runs in the store (floor: none)"

    def line(part: str, unit: str, found: dict[str, float], note: str = "") -> Line:
        values = {column: found[name] for column, name in (("async", "full"), ("floor", "empty")) if name in found}
        checks = (at_most("times", found["full"] / found["empty"], 1.3),) if len(found) == 2 else ()
        return Line(what=f"{what}: {part}", unit=unit, values=values, checks=checks, note=note)

    size = f"{filled['full']['mb']:,.0f} MB, filled in {filled['full']['seconds']:.0f} s"
    return [
        line("256 runs at once, commits", "ms each", wall, joined(size, failures)),
        line("CPU of engine and server for them", "ms per run", cpu),
        line("claimed by a worker, CPU of worker and server", "us per step", cost),
    ]


def soak(scale: Scale, postgres: Postgres) -> list[Line]:
    with postgres.fresh() as store:
        found = fleet(
            "soak",
            store=store,
            minutes=scale.minutes,
            minute=scale.minute,
            timeout=120 + 2 * scale.minutes * scale.minute,
            aloud=True,
        )
    first, *_, last = found["minutes"]
    sizes = [each["mb"] for each in found["minutes"]]
    settled = max(sizes[: max(2, len(sizes) // 3)])
    times = ", ".join(f"{seconds:.1f}" for seconds in found["pruned_in_s"])
    what = f"PostgreSQL: soak of {scale.minutes} minutes, {found['rate']:g} runs/s"
    return [
        Line(
            what=f"{what}: CPU of the last minute (floor: the first)",
            unit="ms per run",
            values={"async": last["cpu_ms"], "floor": first["cpu_ms"]},
            checks=(
                at_most("times", last["cpu_ms"] / first["cpu_ms"], 1.3),
                at_most("runs lost", sum(each["lost"] for each in found["minutes"]), 0),
            ),
            note=f"{found['pruned']:,} runs pruned; each time in {times} s",
        ),
        Line(
            what=f"{what}: start to result, p50",
            unit="ms",
            values={"async": last["p50_ms"], "floor": first["p50_ms"]},
            checks=(at_most("times", last["p50_ms"] / first["p50_ms"], 1.3),),
        ),
        Line(
            what=f"{what}: size of the database at the end (floor: the most in its first third)",
            unit="MB",
            values={"async": sizes[-1], "floor": settled},
            checks=(at_most("times", sizes[-1] / settled, 1.3),),
            note="each minute: " + ", ".join(f"{size:.0f}" for size in sizes),
        ),
        Line(
            what=f"{what}: start to its first step, p99 while runs are pruned (floor: while not)",
            unit="ms",
            values={"async": found["cleaning_claim_ms"], "floor": found["quiet_claim_ms"]},
            checks=(at_most("times", found["cleaning_claim_ms"] / found["quiet_claim_ms"], 1.5),),
        ),
    ]


ROWS: dict[str, Callable[[Scale, Postgres], list[Line]]] = {
    "pg-steps-3-c256": throughput,
    "pg-latency": latency,
    "pg-workers": workers,
    "pg-beside": beside,
    "pg-transaction": transaction,
    "pg-idle": idle,
    "pg-recovery": recovery,
    "million": million,
    "soak": soak,
}
