"""Every decision of a simulated universe, drawn from one integer seed and written down so that it can be repeated."""

from __future__ import annotations

import random
from collections.abc import Sequence


class Tape:
    """`choose(n, label)` gives a number below n. The first of all choices is always the quietest one.

    given: choices to repeat instead of drawing; behind their end everything is 0. So a shrunk tape may be shorter
    than what it plays, and its numbers too great: they are taken modulo n.
    """

    def __init__(self, seed: int, given: Sequence[int] | None = None) -> None:
        self.seed = seed
        self.given = given
        self.choices: list[int] = []
        self.labels: list[str] = []
        self._random = random.Random(seed).random  # replayable, not secret

    def choose(self, n: int, label: str) -> int:
        """A number from 0 to n - 1. Asking for one of a single possibility leaves no trace."""
        if n <= 1:
            return 0
        given = self.given
        if given is None:
            value = int(self._random() * n)
        else:
            place = len(self.choices)
            value = given[place] % n if place < len(given) else 0
        self.choices.append(value)
        self.labels.append(label)
        return value

    def chance(self, rate: int, label: str) -> bool:
        """True in `rate` of 1,000 cases; the quiet answer is False."""
        return rate > 0 and self.choose(1000, label) >= 1000 - rate
