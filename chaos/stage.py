"""What a scenario acts on: a store, worker processes, a load; and the report of what it did."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from chaos import facts
from chaos.audit import Promised, executions_again, violations

T = TypeVar("T")
ROOT: Final = Path(__file__).parents[1]
SIZES: Final = ("short", "usual", "long")
PATIENCE: Final = 60.0
"""Seconds within which all runs must end once the faults have stopped, and within which anything else must come."""


class Violated(Exception):
    """A scenario saw a promise broken and cannot go on."""


class Skipped(Exception):
    """A scenario cannot be played here; the text says why."""


class Base(Protocol):
    """A store as a scenario needs it; `sqlite.py` and `postgres.py` have one each."""

    kind: str
    url: str
    names: Mapping[str, str]

    def prepare(self) -> None: ...
    def fresh(self, number: int) -> str: ...
    def ask(self, query: str) -> list[tuple[Any, ...]]: ...
    def connection(self) -> AbstractContextManager[Any]: ...
    def now(self) -> int: ...
    def facts(self) -> facts.Facts: ...


@dataclass(kw_only=True)
class Report:
    """What a scenario did, and what it found."""

    scenario: str
    store: str
    size: str
    seed: int
    seconds: float = 0.0
    did: Counter[str] = field(default_factory=Counter)
    """kills, pauses, restarts …"""
    runs: Counter[str] = field(default_factory=Counter)
    """status -> runs"""
    started: int = 0
    executions: int = 0
    again: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    """Errors that callers were told, by type."""
    notes: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    skipped: str = ""

    def text(self) -> str:
        """For people."""
        head = f"{self.scenario} on {self.store} ({self.size}, seed {self.seed}, {self.seconds:.1f} s)"
        if self.skipped:
            return f"{head}: not run: {self.skipped}"
        did = ", ".join(f"{number} {what}" for what, number in self.did.items()) or "nothing"
        ended = ", ".join(f"{number} {status}" for status, number in sorted(self.runs.items()))
        lines = [
            f"{head}: {'VIOLATED' if self.violations else 'ok'}",
            f"  did: {did}",
            f"  runs: {self.started} starts acknowledged; now {ended or 'none'}",
            f"  steps: {self.executions} executions, {self.again} of them again",
        ]
        if self.refusals:
            lines.append("  refusals: " + ", ".join(f"{n} {kind}" for kind, n in self.refusals.items()))
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  VIOLATION {each}" for each in self.violations]
        return "\n".join(lines)

    def json(self) -> str:
        return json.dumps(asdict(self))


class Stage:
    """One scenario's store and processes. `pick` chooses by its size; `chance` is seeded."""

    def __init__(self, base: Base, folder: Path, report: Report) -> None:
        self.base = base
        self.folder = folder
        self.report = report
        self.chance = random.Random(report.seed)
        self.promised = Promised()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.ledger = folder / "ledger.jsonl"
        self.ledger.touch()
        self.tracebacks = False
        """Whether a traceback in a worker's log is what is to be expected."""
        self.planted: str | None = None
        """A bug for all its workers."""
        self.repeats: int | None = None
        """How many executions may be repeated at most, where a scenario knows."""

    def pick(self, short: T, usual: T, long: T) -> T:
        return dict(zip(SIZES, (short, usual, long), strict=True))[self.report.size]

    def did(self, what: str, number: int = 1) -> None:
        self.report.did[what] += number

    def note(self, text: str) -> None:
        self.report.notes.append(text)

    def violated(self, text: str) -> None:
        self.report.violations.append(text)

    # --- workers ---

    def worker(self, *, url: str | None = None, **settings: Any) -> subprocess.Popen[bytes]:
        """Start a worker process; it serves some time later, see `serving`."""
        settings.setdefault("queues", ["default", "remote"])
        if self.planted is not None:
            settings["planted"] = self.planted
        said = self.folder / f"settings-{len(self.processes)}.json"
        said.write_text(json.dumps(settings), encoding="utf-8")
        with open(self.folder / "workers.log", "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "chaos.worker", url or self.base.url, str(self.ledger), str(said)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)
        return process

    async def workers(self, number: int, **settings: Any) -> list[subprocess.Popen[bytes]]:
        """Start so many, and wait until they serve."""
        processes = [self.worker(**settings) for _ in range(number)]
        await self.serving(processes)
        return processes

    async def serving(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """Wait until each has announced itself."""
        names = {str(process.pid) for process in processes}

        def announced() -> bool:
            for process in processes:
                if process.poll() is not None:
                    raise Violated(f"a worker ended with {process.returncode} at its start: {self.log()[-2000:]}")
            return names <= {name for (name,) in self.base.ask("SELECT name FROM {workers}")}

        await self.until(announced, "the workers")

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL, and wait for it."""
        process.kill()
        process.wait()
        self.promised.harmed.add(str(process.pid))
        self.did("kills")

    async def leave(self) -> None:
        """SIGTERM all workers: they drain, give their runs back, and exit with 0."""
        living = [process for process in self.processes if process.poll() is None]
        for process in living:
            process.send_signal(signal.SIGTERM)
        for process in living:
            await self.until(lambda process=process: process.poll() is not None, f"the end of process {process.pid}")  # type: ignore[misc]
            if process.returncode not in (0, -signal.SIGTERM):  # the latter: it had not begun to serve
                self.note(f"process {process.pid} left with {process.returncode}")

    # --- looking ---

    async def until(self, found: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
        """Wait for a value that is true; `Violated` names what did not come."""
        deadline = time.monotonic() + seconds
        while True:
            value = found()
            if value:
                return value
            if time.monotonic() > deadline:
                raise Violated(f"INV-23: {what} did not come within {seconds:g} s")
            await asyncio.sleep(0.01)

    def lines(self, what: str = "begin", *, step: str | None = None) -> list[facts.Line]:
        """The ledger, oldest first."""
        return [line for line in facts.ledger(self.ledger, what) if step is None or line.step == step]

    def log(self) -> str:
        """What the workers logged."""
        path = self.folder / "workers.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    # --- the end ---

    async def healed(self, seconds: float | None = None) -> None:
        """Wait until all runs have ended, but those that are to stay open or were put aside.

        seconds: by default as long as the size allows. Runs that lost two workers are executed alone, some at a time in
        processes of their own: where many did, the last of them comes after minutes.
        """
        at = time.monotonic()
        if seconds is None:
            seconds = self.pick(PATIENCE, 3 * PATIENCE, 15 * PATIENCE)
        stay = len(self.promised.open)
        live = "FROM {runs} WHERE ended_at IS NULL AND status <> 'quarantined'"
        deadline = at + seconds
        while (left := self.base.ask(f"SELECT count(*) {live}")[0][0]) > stay:
            if time.monotonic() > deadline:
                some = self.base.ask(f"SELECT id, workflow, status, strikes, waits {live} LIMIT 5")
                self.violated(f"INV-23: {left} runs have not ended {seconds:g} s after the faults: {some}")
                return
            await asyncio.sleep(0.05)
        self.note(f"all had ended {time.monotonic() - at:.2f} s after the last fault")

    def audit(self) -> None:
        """Check the store, the ledger and what was acknowledged."""
        found = self.base.facts()
        found.begun, found.ended = facts.ledger(self.ledger, "begin"), facts.ledger(self.ledger, "end")
        report = self.report
        report.violations += violations(found, self.promised)
        report.runs.update(row["status"] for row in found.runs.values())
        report.started = len(self.promised.started)
        report.executions = len(found.begun)
        report.again = executions_again(found)
        if self.repeats is not None and report.again > self.repeats:
            self.violated(f"INV-5: {report.again} executions were repeated, {self.repeats} may be")
        log = self.log()
        if "Traceback" in log and not self.tracebacks:
            at = log.index("Traceback")
            self.violated(f"a worker logged a traceback: {log[max(0, at - 300) : at + 1500]}")

    def close(self) -> None:
        """Kill what still runs."""
        for process in self.processes:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGCONT)
                process.kill()
            process.wait()


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A name, what it does, and on which kinds of store it has a meaning."""

    name: str
    play: Callable[[Stage], Awaitable[None]]
    stores: tuple[str, ...] = ("sqlite", "postgres")

    @property
    def text(self) -> str:
        """Its first sentence."""
        return (self.play.__doc__ or "").strip().splitlines()[0]
