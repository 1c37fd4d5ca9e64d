"""Records anew the tape of each planted bug that does not die on its own: `python -m tests.simulation.record`.

Needed when universes are drawn in another way, or a bug is new. The tape is the first that kills it, made small.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any, Final

from perdure.testing import sim
from perdure.testing.sim.planted import PLANTED, RARE, planted

TAPES: Final = Path(__file__).parent / "tapes"


def kept() -> dict[str, dict[str, Any]]:
    """The tapes by their names."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(TAPES.glob("*.json"))}


def kills(tape: dict[str, Any], bug: str) -> bool:
    """Whether this planted bug dies on this tape."""
    with planted(bug):
        return sim.run(tape["seed"], tape=tape["tape"]).violation is not None


def recorded(bug: str) -> dict[str, Any]:
    """A small tape on which this planted bug dies."""
    with planted(bug):
        first = next(report for report in map(sim.run, itertools.count()) if report.violation is not None)
        small = sim.shrunk(first)
    return {"seed": small.seed, "planted": bug, "why": str(small.violation), "tape": small.tape}


def main() -> None:
    there = {tape["planted"]: tape for tape in kept().values() if "planted" in tape}
    for bug in (*PLANTED, *RARE):
        if bug in there and kills(there[bug], bug):
            continue
        tape = recorded(bug)
        name = re.sub("[^a-z0-9]+", "-", bug.lower())
        (TAPES / f"{name}.json").write_text(json.dumps(tape) + "\n", encoding="utf-8")
        print(f"{name}: seed {tape['seed']}, {len(tape['tape'])} choices, {tape['why']}")


if __name__ == "__main__":
    main()
