"""How much of a prune one call does, and what it has chosen: the same in every store that has rows."""

from __future__ import annotations

from typing import Final, NamedTuple

from perdure.core.status import ENDED
from perdure.core.turn import Key

LOOKED_AT: Final = 1_000
"""Runs looked at by one call."""
PIECE: Final = 1_000
"""Events and messages removed by one call."""
WHOLE: Final = ("forget_histories", "forget_mail", "forget_inputs", "forget_keys", "forget_runs")
EVERY_END: Final = tuple(sorted(status.value for status in ENDED))


class Chosen(NamedTuple):
    """What one call removes: whole runs, or a piece of one that is too large to go at once."""

    runs: list[Key]
    piece: tuple[Key, int, int] | None  # run, events, messages
    after: Key | None
