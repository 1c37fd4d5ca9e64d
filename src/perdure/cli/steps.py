"""A history as its steps: what each did, how often it was tried, how it ended. Pure: told the events, one by one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

from perdure.core import events as ev
from perdure.core.failure import LAST_OF_ALL, RecordedError
from perdure.core.retry import moment
from perdure.core.waits import Waits


@dataclass(slots=True, kw_only=True)
class Failure:
    """One attempt that failed. traceback: of its function, with its causes. next_at: the next try, None if never."""

    attempt: int
    at: datetime
    error: str
    traceback: str
    next_at: datetime | None = None


@dataclass(slots=True, kw_only=True)
class Step:
    """One durable operation. asked_at: None for a step that ran here, of which only outcomes are recorded.

    kind: `step`, `sleep`, `signal`, `child`, `activity`. state: `running`, `retrying`, `waiting`, `done`, `failed`,
    `cancelled`. attempts: how many were made or are being made. until: when a sleep or a wait ends by itself.
    """

    id: str
    kind: str
    state: str
    name: str = ""
    attempts: int = 0
    asked_at: datetime | None = None
    ended_at: datetime | None = None
    until: datetime | None = None
    run: str = ""
    site: str = ""
    error: str = ""
    value: Any = None
    failures: list[Failure] = field(default_factory=list)
    traceback: str = ""
    """Where a child or an activity raised what it has failed with."""

    @property
    def over(self) -> bool:
        """Whether it has its final outcome."""
        return self.state in ("done", "failed", "cancelled")

    def detail(self) -> str:
        """In a few words, what else is worth knowing."""
        if self.state == "retrying" and self.failures:
            last = self.failures[-1]
            return f"attempt {last.attempt} failed: {last.error}"
        if self.error:
            return f"{self.run}: {self.error}" if self.run else self.error
        if self.kind == "signal" and not self.over:
            until = "" if self.until is None else f" until {self.until:%Y-%m-%d %H:%M:%S}"
            return f'for signal "{self.name}"{until}'
        if self.kind == "sleep" and self.until is not None and not self.over:
            return f"until {self.until:%Y-%m-%d %H:%M:%S}"
        if self.kind in ("child", "activity"):
            return self.run
        return ""


def traceback_of(error: RecordedError) -> str:
    """Where an error was raised, and those that caused it; its words where that is not known."""
    text = error.traceback.rstrip() or (f"{error.type}: {error.message}" if error.message else error.type)
    return text if error.cause is None else f"{text}\ncaused by\n{traceback_of(error.cause)}"


class Steps:
    """The steps of a run, in the order in which they were asked for; grows with `take`."""

    def __init__(self) -> None:
        self.by_id: dict[str, Step] = {}
        self.taken = 0
        self.at: datetime | None = None
        """The time of the last event."""

    def take(self, events: Iterable[ev.Event]) -> list[Step]:
        """Read further events; the steps that changed, one entry per change."""
        changed: list[Step] = []
        for event in events:
            self.taken += 1
            at = getattr(event, "at", None)
            if at is not None:
                self.at = moment(at)
            changed.extend(self._take(event))
        return changed

    def _take(self, event: ev.Event) -> list[Step]:
        assert self.at is not None
        match event:
            case ev.StepCompleted():
                step = self._local(event, "done")
                step.value = msgspec.json.decode(bytes(event.value))
            case ev.StepFailed():
                step = self._local(event, "failed")
                step.error = words_of(event.error)
                # What was the last attempt's own, and not only that there is no time for another.
                own = event.error
                if own.message == LAST_OF_ALL and own.cause is not None:
                    own = own.cause
                step.failures.append(
                    Failure(attempt=event.attempt, at=self.at, error=words_of(own), traceback=traceback_of(event.error))
                )
            case ev.AttemptFailed():
                step = self._local(event, "retrying")
                step.ended_at = None
                step.failures.append(
                    Failure(
                        attempt=event.attempt,
                        at=self.at,
                        error=words_of(event.error),
                        traceback=traceback_of(event.error),
                        next_at=moment(event.retry_at),
                    )
                )
            case ev.Sleep():
                step = self._asked(event.step, "sleep", "", event.site)
                step.until = moment(event.due)
            case ev.SignalWait():
                step = self._asked(event.step, "signal", event.name, event.site)
                step.until = None if event.deadline is None else moment(event.deadline)
            case ev.Child() | ev.Activity():
                kind = "child" if isinstance(event, ev.Child) else "activity"
                step = self._asked(event.step, kind, event.name, event.site)
                step.run = event.run
                if isinstance(event, ev.Child) and not event.awaited:
                    step.state, step.ended_at = "done", self.at
            case ev.Sent():
                step = self._asked(event.step, event.op, event.name, event.site)
                step.state, step.ended_at, step.run = "done", self.at, event.run
            case ev.SignalTaken():
                step = self._ended(event.step, "done")
            case ev.ChildEnded() | ev.ActivityEnded():
                step = self._ended(event.step, "done" if event.status == "completed" else "failed")
                step.attempts = event.attempts
                if event.error is not None:
                    how = "" if event.status == "failed" else f"{event.status}: "
                    step.error = f"{how}{words_of(event.error)}"
                    step.traceback = traceback_of(event.error)
                elif event.status != "completed":
                    step.error = event.status
                else:
                    step.value = msgspec.json.decode(bytes(event.value))
            case ev.StepCancelled():
                step = self._ended(event.step, "cancelled")
            case ev.Time():
                return self._rang()
            case _:
                return []
        return [step]

    def waiting(self, waits: Waits) -> None:
        """Add what the run's row knows: the steps that are being executed now, of which no event tells yet."""
        for wait in waits.waits:
            if wait.kind in ("step", "retry"):
                step = self.by_id.setdefault(wait.step, Step(id=wait.step, kind="step", state="running"))
                step.state = "running" if wait.kind == "step" else "retrying"
                step.attempts = wait.attempt if wait.kind == "step" else max(wait.attempt - 1, step.attempts)
                step.name, step.site = step.name or wait.name, step.site or wait.site
                step.asked_at = moment(wait.since)

    def run_ended(self, at: datetime) -> None:
        """The run has ended: what it waited for then, it does not wait for any more."""
        for step in self.by_id.values():
            if not step.over:
                step.state, step.ended_at, step.error = "cancelled", at, "ended with its run"

    def _local(self, event: ev.StepCompleted | ev.StepFailed | ev.AttemptFailed, state: str) -> Step:
        step = self.by_id.setdefault(event.step, Step(id=event.step, kind="step", state=state))
        step.state, step.attempts, step.ended_at = state, event.attempt, self.at
        step.name, step.site = event.name or "", event.site
        return step

    def _asked(self, id: str, kind: str, name: str, site: str) -> Step:
        step = Step(id=id, kind=kind, state="waiting", name=name, site=site, asked_at=self.at)
        self.by_id[id] = step
        return step

    def _ended(self, id: str, state: str) -> Step:
        step = self.by_id.setdefault(id, Step(id=id, kind="step", state=state))
        step.state, step.ended_at = state, self.at
        return step

    def _rang(self) -> list[Step]:
        assert self.at is not None
        due = [
            step
            for step in self.by_id.values()
            if step.state == "waiting" and step.until is not None and step.until <= self.at
        ]
        for step in due:
            step.ended_at = self.at
            step.state = "done" if step.kind == "sleep" else "failed"
            if step.kind == "signal":
                step.error = "TimeoutError: no signal came in time"
        return due


def words_of(error: RecordedError) -> str:
    """An error in one line."""
    return f"{error.type}: {error.message}" if error.message else error.type
