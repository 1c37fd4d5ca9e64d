"""The ledger of effects: what the functions of steps really did, beside what the store says.

A line is one `write` to a file opened with O_APPEND: lines of several processes do not mix, none is half there after a
kill. The file is the second argument of the worker's script; a process that a worker gives to one run imports the
modules of the workflows, with the same arguments, and finds it by them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final

from perdure import current_step
from perdure.worker.shift import Shift


class Ledger:
    """This process's side of it. clock: microseconds since the epoch, by the clock of the store."""

    file = -1
    clock: Callable[[], int] = staticmethod(lambda: time.time_ns() // 1000)
    epochs: Final[dict[tuple[str, str], int]] = {}
    """(run, "") or (run, step of an activity) -> the epoch of the last claim of it here."""


def note(what: str) -> None:
    """One line about the step whose function is running."""
    info = current_step()
    if Ledger.file < 0:
        Ledger.file = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND)
    line = {
        "what": what,
        "run": info.run_id,
        "step": info.id,
        "attempt": info.attempt,
        "key": info.key,
        "pid": os.getpid(),
        "epoch": Ledger.epochs.get((info.run_id, info.id)) or Ledger.epochs[info.run_id, ""],
        "at": Ledger.clock(),
        "mono": time.monotonic(),
    }
    os.write(Ledger.file, json.dumps(line).encode() + b"\n")


_take_up = Shift._take_up


def _noted(self: Shift, head: Any, events: Any) -> None:
    row = head.row
    Ledger.epochs[(row.id, "") if row.kind == "workflow" else (row.parent_id, row.parent_step)] = row.epoch
    _take_up(self, head, events)


Shift._take_up = _noted  # type: ignore[method-assign]
