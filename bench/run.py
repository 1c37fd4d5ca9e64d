"""`make bench`: one table of this engine, its floors and its peers, measured in one run on this machine.

A row interleaves its measurements in rounds and takes medians, so that a busy moment of the machine meets all of them
alike. A program that fails is a failed row, not the end of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import peers
import postgres_rows
import sqlite_rows
from postgres import Postgres
from programs import QUICK, Failed, Scale
from table import Check, Line, show

LONG = ("million", "soak")
"""Rows that are measured only when they are asked for: they do not fit into the ten minutes."""


def measured(name: str, row: Callable[[Scale], list[Line]], scale: Scale) -> list[Line]:
    try:
        return row(scale)
    except (Failed, subprocess.SubprocessError, OSError, ValueError) as error:
        return [Line(what=name, unit="", checks=(Check(asked="a number", found="none", passed=False, why=str(error)),))]


def bound(row: Callable[[Scale, Postgres], list[Line]], postgres: Postgres) -> Callable[[Scale], list[Line]]:
    return lambda scale: row(scale, postgres)


def settings(scale: Scale) -> list[str]:
    return [
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {platform.system()}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before; "
        f"DBOS {peers.version('dbos')}, Absurd {peers.version('absurd', package='absurd-sdk')}",
        f"medians of {scale.rounds} interleaved rounds of {scale.seconds:g} s; "
        f"of {scale.few} or 1 where little hangs on it",
        "SQLite: WAL and synchronous=FULL everywhere; what a peer was set to stands in its row",
    ]


def main() -> int:
    postgres = Postgres()
    rows: dict[str, Callable[[Scale], list[Line]]] = dict(sqlite_rows.ROWS)
    rows |= {name: bound(row, postgres) for name, row in postgres_rows.ROWS.items()}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", action="append", choices=rows, metavar="NAME", help="only this row; see --list")
    parser.add_argument("--list", action="store_true", help="the names of the rows")
    parser.add_argument("--quick", action="store_true", help="a try-out: small sizes, one round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same as JSON")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(rows))
        return 0
    scale = QUICK if asked.quick else Scale()
    heading = settings(scale)
    began = time.monotonic()
    lines = []
    try:
        for name in asked.row or [each for each in rows if each not in LONG]:
            print(f"measuring {name} …", file=sys.stderr, flush=True)
            lines += measured(name, rows[name], scale)
        heading += postgres.settings()
    finally:
        postgres.stop()
    heading.append(f"measured in {time.monotonic() - began:.0f} s")
    show(lines, heading)
    if asked.json:
        asked.json.write_text(json.dumps({"settings": heading, "lines": [asdict(line) for line in lines]}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
