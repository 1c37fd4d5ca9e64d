"""A program's life as a tape of inputs, played without a store, a worker or a clock.

`live(program, seed)` lets one `Play` live: it draws what reaches the code next (an outcome, a signal, a timer, a
request to cancel) until the code has ended or only waits, and keeps each input with the commands it caused and the
position it left. `replayed` and `resumed` bring other plays to the same places, to be compared.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final

import msgspec
from msgspec import Raw

from perdure.core import events as ev
from perdure.core import stored
from perdure.core.failure import RecordedError
from perdure.core.limits import Limits
from perdure.core.match import Line, Op
from perdure.runtime.context import ThisRun
from perdure.runtime.drive_sync import BodyThreads
from perdure.runtime.play import Play
from perdure.runtime.registry import Workflow
from perdure.testing.programs import LEAF, Program, leaf

START: Final = 1_700_000_000_000_000
SECOND: Final = 1_000_000
SEED: Final = "5eed" * 8


async def no_work(id: str) -> int:
    """The function of a step whose outcome the tape gives."""
    raise AssertionError("the tape gives outcomes, no function runs")


no_work.__name__ = "work"  # Named in histories as the function that a service executes.

KNOWN: Final[dict[str, Workflow[Any, Any]]] = {LEAF: leaf(no_work)}


@dataclass(kw_only=True)
class Beat:
    """One input of a tape: what it caused and where the code then stood."""

    input: ev.Input
    commands: list[ev.Command]
    position: Any


@dataclass(kw_only=True)
class Tape:
    """A life so far."""

    program: Program
    play: Play
    beats: list[Beat] = field(default_factory=list)

    def events(self, beats: int | None = None) -> list[ev.Event]:
        """The history that these first beats leave."""
        return [e for beat in self.beats[: beat_count(self, beats)] for e in (beat.input, *beat.commands)]

    def texts(self) -> list[str]:
        """The whole history as it is stored."""
        return [stored.encode(event) for event in self.events()]

    @property
    def end(self) -> Any:
        """How the code ended, as far as a reader sees it."""
        return end_of(self.play)


def beat_count(tape: Tape, beats: int | None) -> int:
    return len(tape.beats) if beats is None else beats


def end_of(play: Play) -> Any:
    """Status, result and error of an ended play; None before."""
    end = play.end
    if end is None:
        return None
    return end.status, end.result, None if end.error is None else (end.error.type, end.error.message)


def position(play: Play) -> Any:
    """Everything that decides what the code does next: equal positions go on alike."""
    line = play.line
    return {
        "pending": [_stand(op) for op in line.pending.values()],
        "deferred": [op.id for op in line.deferred],
        "ended": sorted((op.ended, op.id, op.state) for op in line.ops.values() if op.over),
        "signals": {name: [s.message for s in queue] for name, queue in line.signals.items() if queue},
        "waits": {name: [op.id for op in queue] for name, queue in line.waits.items() if queue},
        "timers": timers(line),
        "next": line.next_timer(),
        "answers": dict(line.answers),
        "now": line.now,
        "cancel": line.cancel_requested,
        "end": end_of(play),
        "difference": play.difference,
    }


def timers(line: Line) -> list[int]:
    """When the timers that still mean something come due, in order."""
    return sorted(due for due, _, timer in line.timers if not timer.cancelled())


def _stand(op: Op) -> Any:
    return op.id, op.kind, op.name, op.attempt, op.retry_at, op.due, op.at, op.ordinal


def new_play(
    program: Program, *, known: Mapping[str, Workflow[Any, Any]] = KNOWN, threads: BodyThreads | None = None
) -> Play:
    """A play of this program before its first input."""
    facts = ThisRun(
        id=f"run-{program.seed}",
        generation=1,
        workflow="program",
        queue="default",
        namespace="default",
        attempt=1,
        max_attempts=1,
        parent=None,
        root=f"run-{program.seed}",
        created_micros=START,
    )
    return Play(
        program.workflow(no_work),
        facts,
        seed=SEED,
        input="[[],{}]",
        limits=Limits(),
        known=known,
        threads=threads if threads is not None else THREADS,
    )


THREADS: Final = BodyThreads()


def begin(program: Program) -> Tape:
    """The life of a program whose first input has come to rest."""
    tape = Tape(program=program, play=new_play(program))
    first = ev.Started(at=START, seed=SEED)
    _exhaust(tape.play.replay([first]))
    _keep(tape, first)
    return tape


def live(program: Program, seed: int, *, most: int = 40, unwinding: bool = True) -> Tape:
    """A whole life, drawn from the seed. unwinding: sync bodies give their threads back now and then."""
    rng = random.Random(seed)
    tape = begin(program)
    now = START
    signals = 0
    told: set[str] = set()
    while not tape.play.over and len(tape.beats) < most:
        play = tape.play
        if unwinding and rng.random() < 0.2:
            play.unwind()
        event, now = draw(play, rng, now, signals, told)
        if event is None:
            break
        if isinstance(event, ev.Signal):
            signals += 1
        elif isinstance(event, ev.ChildEnded):
            told.add(event.step)
        give(tape, event)
    return tape


def draw(
    play: Play, rng: random.Random, now: int, signals: int, told: Collection[str] = ()
) -> tuple[ev.Input | None, int]:
    """What reaches the code next, and when; None if nothing can but what nobody sends."""
    line = play.line
    if line.due(now):
        # As the owner of a run does: what is due at once is delivered at once.
        return ev.Time(at=now), now
    now += rng.choice([0, 0, 1, SECOND // 2, SECOND, SECOND, 5 * SECOND, 70 * SECOND])
    if line.due(now):
        return ev.Time(at=now), now
    choices: list[Any] = [*_outcomes(line), *(op for op in _ends(line) if op.id not in told)]
    if signals < 6 and (line.waits or rng.random() < 0.15):
        choices.append("signal")
    if not line.cancel_requested or rng.random() < 0.2:
        choices += ["cancel"] if rng.random() < 0.15 else []
    timer = line.next_timer()
    if timer is not None:
        choices.append("time")
    if not choices:
        return None, now
    chosen = choices[rng.randrange(len(choices))]
    if chosen == "time":
        assert timer is not None
        now = max(now, timer)
        return ev.Time(at=now), now
    if chosen == "signal":
        value = b'"no number"' if rng.random() < 0.1 else str(rng.randrange(100)).encode()
        name = rng.choice(["go", "go", "stop"])
        return ev.Signal(at=now, message=f"m{signals}-{now}", name=name, value=Raw(value)), now
    if chosen == "cancel":
        return ev.CancelRequested(at=now, message=f"c{now}", reason="enough"), now
    return _outcome(chosen, rng, now), now


def _outcomes(line: Line) -> Iterable[Op]:
    return [op for op in line.pending.values() if op.kind == "run"]


def _ends(line: Line) -> Iterable[Op]:
    """Children that may still tell their end, also those that were given up."""
    return [op for op in line.ops.values() if op.kind == "child" and op.awaited and op.at and op.state in (2, 4)][:3]


def _outcome(op: Op, rng: random.Random, now: int) -> ev.Input:
    luck = rng.random()
    error = RecordedError(type="ValueError", message=f"no luck with {op.id}")
    value = Raw(str(rng.randrange(1000)).encode())
    if op.kind == "child":
        facts: dict[str, Any] = {"at": now, "message": f"perdure:child:{op.id}", "step": op.id, "run": op.run}
        if luck < 0.7:
            return ev.ChildEnded(**facts, value=value)
        return ev.ChildEnded(**facts, status="failed", error=error)
    facts = {
        "at": now,
        "step": op.id,
        "ordinal": op.ordinal,
        "name": op.name,
        "site": op.site,
        "digest": op.digest,
        "attempt": op.attempt,
    }
    if luck < 0.65:
        return ev.StepCompleted(**facts, value=value)
    if luck < 0.85 or op.attempt >= 3:
        return ev.StepFailed(**facts, error=error)
    return ev.AttemptFailed(**facts, error=error, retry_at=now + (2 << (op.attempt - 1)) * SECOND)


def give(tape: Tape, event: ev.Input) -> None:
    """One more input."""
    tape.play.deliver(event)
    _keep(tape, event)


def _keep(tape: Tape, event: ev.Input) -> None:
    commands = list(tape.play.take().commands)
    tape.beats.append(Beat(input=event, commands=commands, position=position(tape.play)))


def replayed(program: Program, events: Sequence[ev.Event]) -> Play:
    """Another play, brought to the end of this history; what it asked for is not taken."""
    play = new_play(program)
    _exhaust(play.replay(events))
    return play


def _exhaust(steps: Iterable[None]) -> None:
    for _ in steps:
        pass


def shut(play: Play) -> None:
    """Close a play, and give back the thread of a sync body."""
    play.close()


def fingerprint(texts: Iterable[str]) -> str:
    """A short name for a history."""
    digest = blake2b(digest_size=16)
    for text in texts:
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def plain(events: Sequence[ev.Event]) -> list[Any]:
    """Events as people read them in a failed test."""
    return [msgspec.to_builtins(event) for event in events]
