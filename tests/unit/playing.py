"""A run played by hand: give inputs, look at what its code asks for, replay its history with this code or another's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from msgspec import Raw

from perdure.core import events as ev
from perdure.core.failure import RecordedError
from perdure.core.limits import Limits
from perdure.runtime.context import ThisRun
from perdure.runtime.drive_sync import BodyThreads
from perdure.runtime.play import Play
from perdure.runtime.registry import Workflow

START: Final = 1_700_000_000_000_000
SEED: Final = "ab" * 16
THREADS: Final = BodyThreads()


class Run:
    """One life of a run. `events` is its history, `play` its play."""

    def __init__(
        self, fn: Callable[..., Any], *, known: Mapping[str, Any] | None = None, input: str = "[[],{}]"
    ) -> None:
        self.known = dict(known or {})
        self.input = input
        self.now = START
        self.events: list[ev.Event] = []
        self.begun: list[str] = []
        self.dropped: list[str] = []
        self.play = self._play(fn)
        self._history(ev.Started(at=START, seed=SEED))
        self._replay(self.events)
        self._take()

    def _play(self, fn: Callable[..., Any]) -> Play:
        facts = ThisRun(
            id="run-1",
            generation=1,
            workflow="flow",
            queue="default",
            namespace="default",
            attempt=1,
            max_attempts=1,
            parent=None,
            root="run-1",
            created_micros=START,
        )
        return Play(
            Workflow(fn, name="flow"),
            facts,
            seed=SEED,
            input=self.input,
            limits=Limits(),
            known=self.known,
            threads=THREADS,
        )

    def _history(self, event: ev.Event) -> None:
        self.events.append(event)

    def _replay(self, events: list[ev.Event]) -> None:
        for _ in self.play.replay(list(events)):
            pass

    def _take(self) -> None:
        asked = self.play.take()
        self.events.extend(asked.commands)
        self.begun.extend(op.id for op in asked.begun)
        self.dropped.extend(op.id for op in asked.dropped)

    # --- inputs ---

    def give(self, event: ev.Input) -> Run:
        self._history(event)
        self.play.deliver(event)
        self._take()
        return self

    def value(self, step: str, value: str = "null") -> Run:
        """The step has ended with this JSON value."""
        return self.give(ev.StepCompleted(value=Raw(value.encode()), **self._facts(step)))

    def fails(self, step: str, message: str = "no luck") -> Run:
        return self.give(ev.StepFailed(error=RecordedError(type="ValueError", message=message), **self._facts(step)))

    def _facts(self, step: str) -> dict[str, Any]:
        op = self.play.line.ops[step]
        return {
            "at": self.now,
            "step": step,
            "ordinal": op.ordinal,
            "name": op.name,
            "site": op.site,
            "digest": op.digest,
        }

    def signal(self, name: str, value: str = "null", message: str | None = None) -> Run:
        return self.give(
            ev.Signal(at=self.now, message=message or f"m{len(self.events)}", name=name, value=Raw(value.encode()))
        )

    def cancel(self, reason: str = "enough") -> Run:
        return self.give(ev.CancelRequested(at=self.now, message=f"c{len(self.events)}", reason=reason))

    def after(self, seconds: float) -> Run:
        """The clock goes on; what is due comes due."""
        self.now += int(seconds * 1_000_000)
        return self.give(ev.Time(at=self.now))

    # --- what came of it ---

    @property
    def status(self) -> str | None:
        return self.play.end.status if self.play.end is not None else None

    @property
    def result(self) -> Any:
        assert self.play.end is not None, "the run has not ended"
        return self.play.end.result

    @property
    def error(self) -> tuple[str, str]:
        assert self.play.end is not None
        assert self.play.end.error is not None
        return self.play.end.error.type, self.play.end.error.message

    @property
    def commands(self) -> list[str]:
        """The kinds of the commands in the history."""
        return [ev.kind(event) for event in self.events if not isinstance(event, ev.INPUTS)]

    @property
    def pending(self) -> list[str]:
        return list(self.play.line.pending)

    def again(self, fn: Callable[..., Any] | None = None) -> Run:
        """The same run rebuilt from its history, perhaps by other code."""
        other = object.__new__(Run)
        other.known, other.input, other.now, other.events = self.known, self.input, self.now, list(self.events)
        other.begun, other.dropped = [], []
        other.play = other._play(fn if fn is not None else self.play.workflow.fn)
        other._replay(self.events)
        if other.play.difference is None:
            other._take()
        return other

    def close(self) -> None:
        self.play.close()


def work(*args: Any) -> Any:
    """The function of a step; no test of this kind ever runs it."""
    raise AssertionError
