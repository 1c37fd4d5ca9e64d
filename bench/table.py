"""The table that `make bench` prints: lines, what was asked of them, and how they are shown."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

COLUMNS = ("async", "sync", "dbos", "absurd", "floor", "bare")
TITLES = ("what", "unit", "async steps", "sync steps", "DBOS", "Absurd", "floor", "bare floor", "asked: found")


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


def at_least(what: str, value: float, wanted: float, *, void: str = "") -> Check:
    """void: why this cannot be judged, if so."""
    verdict = None if void else value >= wanted
    return Check(asked=f"{what} ≥ {wanted:.3g}", found=f"{value:.3g}", passed=verdict, why=void)


def at_most(what: str, value: float, wanted: float, *, strictly: bool = False, void: str = "") -> Check:
    """void: as there."""
    verdict = None if void else value < wanted if strictly else value <= wanted
    asked = f"{what} {'<' if strictly else '≤'} {wanted:.3g}"
    return Check(asked=asked, found=f"{value:.3g}", passed=verdict, why=void)


def times_dbos(rates: dict[str, float]) -> tuple[list[float], str]:
    """How many times DBOS the floors of a row do, and why nothing in it can be judged, if so.

    A floor that does little more than another engine is no floor.
    """
    if not rates.keys() >= {"floor", "bare", "dbos"}:
        return [], "void: a floor or DBOS has no number"
    times = [rates[name] / rates["dbos"] for name in ("floor", "bare")]
    return times, "" if min(times) >= 10 else "void: each floor must do 10 times DBOS"


def joined(note: str, failures: list[str]) -> str:
    return "; ".join(filter(None, [note, *failures]))


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def show(lines: list[Line], heading: list[str]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for each in heading:
            print(each)
        for line in lines:
            print(" | ".join(cells(line)).replace("\n", "; "))
        return
    console = Console(width=None if sys.stdout.isatty() else 180)
    table = Table(*TITLES, show_lines=True)
    for column in table.columns[2:-1]:
        column.justify = "right"
    for line in lines:
        table.add_row(*cells(line))
    for each in heading:
        console.print(each)
    console.print(table)


def cells(line: Line) -> list[str]:
    def shown(value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    verdicts = {True: "pass", False: "FAIL", None: "?"}
    asked = [f"{check.asked}: {check.found}  {verdicts[check.passed]}" for check in line.checks]
    remarks = [*asked, *dict.fromkeys(check.why for check in line.checks if check.why), *filter(None, [line.note])]
    return [line.what, line.unit, *(shown(line.values.get(column)) for column in COLUMNS), "\n".join(remarks)]
