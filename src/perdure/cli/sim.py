"""`perdure sim`."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from perdure.cli.command import DONE, NO_SUCCESS
from perdure.cli.words import Wrong, json_text, say, tell


def _tape(path: Path) -> Any:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        given["seed"], given["tape"]
    except (ValueError, TypeError, KeyError):
        raise Wrong(f"{path} is no tape. A tape is what a failing universe prints: seed, why and tape.") from None
    return given


@click.command()
@click.option("--seed", type=int, default=0, help="The first universe; default 0.")
@click.option("--universes", type=click.IntRange(min=1), default=1, help="How many, from the seed on; default 1.")
@click.option("--tape", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Play a kept tape instead.")
@click.option("--trace", is_flag=True, help="Print what happened, line by line.")
@click.option("--shrink/--no-shrink", default=True, help="Make a failing universe small before it is printed.")
@click.option("--json", "as_json", is_flag=True, help="Print one object of JSON: what was played, what was broken.")
def command(seed: int, universes: int, tape: Path | None, trace: bool, shrink: bool, as_json: bool) -> int:
    """Run the seeded simulation of the engine.

    Crashes, delays and lost answers at every call of the store; every promise is checked after every commit.
    The same seed is the same universe. Exit code 1 if a promise was broken."""
    from perdure.testing import sim

    played, sometimes = 0, Counter[str]()
    shown = tell if as_json else say

    def told(broken: dict[str, Any] | None) -> None:
        """The whole of it for a program, at the end."""
        if as_json:
            happened = dict(sorted(sometimes.items()))
            say(json_text({"seed": first, "universes": played, "sometimes": happened, "violation": broken}))

    given = None if tape is None else _tape(tape)
    first = given["seed"] if given is not None else seed
    began = time.perf_counter()
    for number in range(first, first + universes):
        report = sim.run(number, tape=given["tape"] if given is not None else None)
        played += 1
        sometimes.update(report.sometimes)
        if number % 100 == 99 and given is None and sim.run(number).trace_hash != report.trace_hash:
            twice = "it is not the same universe twice"
            tell(f"seed {number}: {twice}")
            told({"seed": number, "why": twice, "tape": report.tape})
            return NO_SUCCESS
        if report.violation is not None:
            if shrink:
                report = sim.shrunk(report)
            shown(report.text())
            kept = {"seed": number, "why": str(report.violation), "tape": report.tape}
            tell(f"kept as a tape: {json.dumps(kept)}")
            told(kept)
            return NO_SUCCESS
        if trace:
            shown(report.text())
    for name, count in sorted(sometimes.items()):
        tell(f"{count:8}  {name}")
    taken = time.perf_counter() - began
    shown(f"{universes} universes, {universes / taken:.0f} a second, no promise broken")
    told(None)
    return DONE
