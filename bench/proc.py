"""CPU time of processes, read from `/proc` (Linux only)."""

from __future__ import annotations

import os
from pathlib import Path

TICK = 1 / os.sysconf("SC_CLK_TCK")


def of_process(pid: int) -> float:
    """CPU seconds of all threads of a process; 0.0 if there is none."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) * TICK if fields else 0.0


def of_server(postmaster: int) -> float:
    """CPU seconds of a PostgreSQL server up to now: its processes, and those of it that have ended.

    A backend has one thread, so the scheduler's nanoseconds can be used; ticks of 10 ms would be too coarse for it.
    """
    ended = _stat(postmaster)
    reaped = (int(ended[13]) + int(ended[14])) * TICK if ended else 0.0
    return reaped + sum(map(_precisely, [postmaster, *children(postmaster)]))


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def parent(pid: int) -> int:
    return int(_stat(pid)[1])


def _precisely(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except FileNotFoundError:
        return 0.0


def _stat(pid: int) -> list[str]:
    """The fields behind the process's name, which may itself hold blanks."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return []
