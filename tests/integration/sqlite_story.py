"""What the tests of the SQLite store are told with."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import IO, Any

from perdure.core.turn import Announced, Announcement, Batch, Begun, Claim, Head, Key, Start, Turn, TurnVerdict
from perdure.stores.contract import Store

SECOND = 1_000_000
HOUR = 3600 * SECOND


def start(id: str, **changes: Any) -> Start:
    facts: dict[str, Any] = {
        "namespace": "default",
        "id": id,
        "workflow": "orders",
        "input": "[[],{}]",
        "digest": "digest",
        "seed": f"seed of {id}",
        "event": '{"kind":"started"}',
    }
    return Start(**facts | changes)


def started(store: Store, id: str, **changes: Any) -> Key:
    [verdict] = store.write(Batch(starts=[start(id, **changes)]))
    assert isinstance(verdict, Begun), verdict
    return verdict.run


def announced(store: Store, incarnation: str = "w", *, ttl: int = HOUR) -> None:
    serves = [Announced(name="orders")]
    store.announce(
        Announcement(
            incarnation=incarnation, name=incarnation, namespace="default", queues=["default"], serves=serves, ttl=ttl
        )
    )


def claiming(store: Store, incarnation: str = "w", **changes: Any) -> list[Head]:
    facts: dict[str, Any] = {
        "incarnation": incarnation,
        "namespace": "default",
        "queues": ["default"],
        "workflows": ["orders"],
    }
    return store.claim(Claim(**facts | changes))


def first_turn(run: Key, **changes: Any) -> Turn:
    """The first turn of a run that `w` started embedded."""
    facts: dict[str, Any] = {
        "run": run,
        "owner": "w",
        "epoch": 1,
        "version": 0,
        "last": "",
        "id": f"turn of {run}",
        "first_seq": 2,
        "events": ['{"kind":"step_completed"}'],
        "status": "running",
    }
    return Turn(**facts | changes)


def taking(store: Store, run: Key, **changes: Any) -> TurnVerdict:
    [verdict] = store.write(Batch(turns=[first_turn(run, **changes)]))
    return verdict  # type: ignore[return-value]  # the only item is a turn


def another_process(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python that has the same modules, and says on its output when it is ready; `arguments` are its `argv`."""
    head = (
        "import os, sys, time\nfrom perdure.core.turn import *\nfrom perdure.stores.sqlite import SQLiteStore\n"
        "from tests.integration.sqlite_story import *\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in [*sys.path, os.getcwd()])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that the process says."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def closed(process: subprocess.Popen[str]) -> None:
    """End it, whatever it does."""
    process.kill()
    process.wait()
    pipe: IO[str] | None
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
