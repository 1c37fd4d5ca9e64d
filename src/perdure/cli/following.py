"""Shows a run's steps on stderr as they happen: one line per change, and in a terminal what goes on right now."""

from __future__ import annotations

import asyncio
import functools
import sys
import time
from typing import Any, Final

from perdure.cli.steps import Step, Steps
from perdure.cli.words import line, tell, when
from perdure.client import Core, RunHandle
from perdure.core import stored
from perdure.core.errors import StoreError
from perdure.core.retry import length, moment
from perdure.core.status import Status
from perdure.core.turn import Row
from perdure.core.waits import Wait, Waits, read_waits
from perdure.worker.waits import waits_of

LOOK: Final = 0.05
"""Seconds between two looks at the history."""
PATIENCE: Final = 30.0
"""Seconds for which a store may refuse what has come of the run."""
LONG: Final = 1_000_000
"""Microseconds after which a step that runs is worth a line of its own."""
_SIGNS: Final = {"done": "+", "failed": "x", "cancelled": "x", "retrying": "!"}
_STYLES: Final = {"done": "green", "failed": "red", "cancelled": "yellow", "retrying": "yellow"}


class Follower:
    """One run that is followed from its start, or, if it was created before `since`, from where it was."""

    def __init__(self, core: Core, handle: RunHandle[Any], *, since: int) -> None:
        self._core = core
        self._handle = handle
        self._since = since  # what is recorded from then on has come while we look
        self._steps = Steps()
        self._begun = False
        self._looking = asyncio.Lock()  # the last look may come while another is under way
        self._shown: set[str] = set()
        self._away = False  # whether the store could not be asked the last time
        self.stuck = False
        """Whether it was given up because its store cannot be written."""
        self._live: Any = None
        self._console: Any = None
        if sys.stderr.isatty():
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False)
            self._live = self._console.status("")
            self._live.start()

    async def close(self) -> None:
        """Give the terminal back. Twice is once."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    async def follow(self) -> str:
        """Until cancelled, or until the run is blocked, or `stuck`: then what is reported of it."""
        while True:
            try:
                row = await self._look()
            except StoreError as error:
                # What we show of it may wait; whoever executes it tries again, too.
                if not error.retryable:
                    raise
                if not self._away:
                    self._print(f"  ! {error}", "yellow")
                self._away = True
                await asyncio.sleep(1.0)
                continue
            self._away = False
            stuck = None if self._core.committer is None else self._core.committer.stuck
            if stuck is not None and time.monotonic() - stuck.since > PATIENCE:
                self.stuck = True
                return f"The store could not be written for {PATIENCE:g} s: {stuck.error}"
            # A worker's start makes blocked runs due. One that is due was blocked by code before ours.
            if row.status == Status.BLOCKED and (row.wake_at or 0) > self._core.store.now():
                return read_waits(row.waits).blocked
            self._show_now(row)
            await asyncio.sleep(LOOK)

    async def last(self) -> None:
        """Show what came with the end."""
        try:
            row = await self._look()
        except StoreError as error:
            self._print(f"  ! {error}", "yellow")
            return
        if row.ended_at is not None and row.ended_at >= self._since:
            took = length(moment(row.ended_at) - moment(row.created_at))
            self._print(f"run {row.id} {row.status.replace('_', ' ')} after {took}", "bold")

    async def _look(self) -> Row:
        async with self._looking:
            return await self._shown_anew()

    async def _shown_anew(self) -> Row:
        core = self._core
        row = await core.row(self._handle.id)
        if not self._begun:
            self._begun = True
            begins = "begins" if row.created_at >= self._since else "goes on"
            if row.ended_at is not None and row.ended_at < self._since:
                begins = f"has ended before: it is {row.status.replace('_', ' ')}"
            self._print(f"run {row.id} of workflow {row.workflow} {begins}", "bold")
        taken = self._steps.taken
        texts = await core.read(functools.partial(core.store.history, row.key, taken))
        # A look that was given up may have taken some of these meanwhile.
        events = [stored.decode(text) for text in texts[self._steps.taken - taken :]]
        if self._steps.taken == 0 and row.created_at < self._since:
            # What was there before we came: each step once, as it is.
            ours = (place for place, event in enumerate(events) if (getattr(event, "at", None) or 0) >= self._since)
            before = next(ours, len(events))
            self._steps.take(events[:before])
            if row.ended_at is not None and row.ended_at < self._since:
                self._steps.run_ended(moment(row.ended_at))
            for step in self._steps.by_id.values():
                self._print(f"  = {_words(step)}", "dim")
            del events[:before]
        for event in events:
            for step in self._steps.take([event]):
                self._print(f"  {_SIGNS.get(step.state, '.')} {_words(step)}", _STYLES.get(step.state, ""))
        return row

    def _show_now(self, row: Row) -> None:
        waits = self._waits(row)
        now = self._core.store.now()
        for wait in waits.waits:
            # In a terminal the last line says it; without one, what takes long is said once.
            long = wait.kind == "step" and now - wait.since > LONG
            if self._live is None and long and wait.step not in self._shown:
                self._shown.add(wait.step)
                self._print(f"  . {wait.step}: running", "")
        if self._live is not None and waits.waits:
            from rich.text import Text

            self._live.update(Text(line(_now(waits, now))))

    def _waits(self, row: Row) -> Waits:
        """What it waits for: from memory if it is executed here, which knows more than the store."""
        shift = self._core.shift
        resident = None if shift is None else shift.residents.get(row.key)
        if resident is not None and not resident.gone:
            return read_waits(waits_of(resident, resident.status))
        return read_waits(row.waits)

    def _print(self, text: str, style: str) -> None:
        if self._console is None:
            tell(text)
        else:
            from rich.text import Text

            self._console.print(Text(line(text), style=style))


def _words(step: Step) -> str:
    """A change in one line."""
    match step.state:
        case "retrying":
            last = step.failures[-1]
            pause = "" if last.next_at is None else f"; next attempt in {length(last.next_at - last.at)}"
            return f"{step.id}: attempt {last.attempt} failed: {last.error}{pause}"
        case "done":
            attempts = f" (attempt {step.attempts})" if step.kind == "step" and step.attempts > 1 else ""
            return f"{step.id}: done{attempts}"
        case "failed":
            attempts = f" after {step.attempts} attempts" if step.kind == "step" and step.attempts > 1 else ""
            return f"{step.id}: failed{attempts}: {step.error}"
        case "cancelled":
            return f"{step.id}: {step.error or 'cancelled'}"
    match step.kind:
        case "sleep":
            return f"{step.id}: sleeps until {when(step.until)} UTC"
        case "signal":
            until = "" if step.until is None else f" until {when(step.until)} UTC"
            return f'{step.id}: waits for signal "{step.name}"{until}'
        case _:
            return f"{step.id}: {step.kind} {step.run}"


def _now(waits: Waits, now: int) -> str:
    """What goes on right now."""
    first: Wait = waits.waits[0]
    others = len(waits.waits) - 1 + waits.more
    beside = f", and {others} more" if others else ""
    match first.kind:
        case "step":
            return (
                f"{first.step}: running, attempt {first.attempt}, {length(moment(now) - moment(first.since))}{beside}"
            )
        case "retry":
            return f"{first.step}: next attempt {_in(first.until, now)}{beside}"
        case "sleep" | "timer":
            return f"{first.step or 'a timer'}: {_in(first.until, now)}{beside}"
        case "signal":
            return f'{first.step}: waits for signal "{first.name}"{beside}'
        case _:
            return f"{first.step}: {first.kind} {first.run}{beside}"


def _in(until: int | None, now: int) -> str:
    return "" if until is None else f"in {length(moment(until) - moment(now))}"
