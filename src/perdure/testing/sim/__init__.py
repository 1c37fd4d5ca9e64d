"""The seeded simulation: many short universes with crashes, delays and lost answers, each checked after every commit.

`run(seed)` plays one and returns its `Report`; the same seed is the same universe. `docs/simulation.md` says what
is modelled and what is not.
"""

from __future__ import annotations

import gc
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from perdure.core.turn import Turn
from perdure.stores.contract import Store
from perdure.testing.sim.checks import Violation
from perdure.testing.sim.tape import Tape
from perdure.testing.sim.world import EPOCH, Config, World

__all__ = ["Config", "Report", "Violation", "run", "shrunk"]


@dataclass(kw_only=True)
class Report:
    """How a universe went. violation: what was broken, with its id, or None. tape: its choices."""

    seed: int
    violation: Violation | None
    tape: list[int]
    labels: list[str]
    world: World
    sometimes: Counter[str] = field(default_factory=Counter)

    @property
    def trace_hash(self) -> str:
        """The same for the same universe, on every machine."""
        lines = "\n".join(timeline(self.world))
        return hashlib.blake2b(f"{lines}{self.tape}".encode(), digest_size=16).hexdigest()

    def text(self) -> str:
        """For people: what broke, how it came to it, and how to see it again."""
        lines = [f"seed {self.seed}: {self.violation}", "", *timeline(self.world), ""]
        lines.append(f"perdure sim --seed {self.seed} --trace")
        return "\n".join(lines)


def run(
    seed: int,
    *,
    tape: Sequence[int] | None = None,
    config: Config | None = None,
    beside: Callable[[Callable[[], int]], Store] | None = None,
) -> Report:
    """Play the universe of a seed, or of a given tape. beside: makes another store that has to do the same."""
    played = Tape(seed, tape)
    # The collector's own time belongs to no universe; sync bodies refuse ctx while it runs.
    enabled = gc.isenabled()
    world = World(played, config, beside)
    found: Violation | None = None
    try:
        world.run()
    except Violation as violation:
        found = violation
    finally:
        if enabled:
            gc.enable()
    kept = played.choices if tape is None else list(tape)
    while kept and not kept[-1]:
        kept.pop()  # Behind its end a tape is all zeros.
    return Report(seed=seed, violation=found, tape=kept, labels=played.labels, world=world, sometimes=world.sometimes)


def shrunk(report: Report, *, tries: int = 400, config: Config | None = None) -> Report:
    """A shorter, quieter universe that breaks the same promise."""
    broken = report.violation
    assert broken is not None
    best = report
    left = tries

    def attempt(tape: list[int]) -> bool:
        nonlocal best, left
        left -= 1
        other = run(report.seed, tape=tape, config=config)
        if other.violation is None or other.violation.id != broken.id:
            return False
        best = other
        return True

    # Cut the end, then ever smaller pieces out of the middle, then quieten what is left.
    while left > 0 and len(best.tape) > 1 and attempt(best.tape[: len(best.tape) * 3 // 4]):
        pass
    size = max(len(best.tape) // 4, 1)
    while size and left > 0:
        at = 0
        while at < len(best.tape) and left > 0:
            tape = best.tape
            if not attempt(tape[:at] + tape[at + size :]):
                zeros = [0] * len(tape[at : at + size])
                if tape[at : at + size] == zeros or not attempt(tape[:at] + zeros + tape[at + size :]):
                    at += size
        size //= 2
    return best


def timeline(world: World) -> list[str]:
    """What happened, one line each: seconds, who, what."""
    return [f"{at / 1_000_000:9.3f}  {who:<9} {what:<16} {_said(more)}".rstrip() for at, who, what, more in world.notes]


def _said(more: Any) -> str:
    if not isinstance(more, Turn):
        return str(more)
    events = " ".join(_short(text) for text in more.events)
    wake = "" if more.wake_at is None else f" wake {(more.wake_at - EPOCH) / 1_000_000:.3f}"
    return (
        f"run {more.run} v{more.version} e{more.epoch} by {(more.owner or 'nobody')[:6]} -> {more.status}{wake}"
        f"{' released' if more.release else ''}: {events}"
    )


def _short(text: str) -> str:
    import json

    event = json.loads(text)
    named = event.get("step") or event.get("message") or event.get("status") or event.get("change") or ""
    attempt = f"#{event['attempt']}" if event.get("attempt", 1) > 1 else ""
    return f"{event['kind']}({named}{attempt})" if named else str(event["kind"])
