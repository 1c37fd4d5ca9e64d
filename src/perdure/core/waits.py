"""What a run waits for, as its row keeps it: written with each commit that parks the run, read by `why` and lists.

A JSON object: `for` is a list of waits (the first ten, oldest first), `more` how many there are beyond. Each has
`kind`, `step` and `since` (microseconds), and what its kind needs: a due time, a signal's name, an attempt.
"""

from __future__ import annotations

from typing import Final

import msgspec

SHOWN: Final = 10
"""Waits that are kept; the rest are counted."""


class Wait(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that a run waits for."""

    kind: str  # sleep, signal, child, activity, retry, step, timer, nothing
    step: str = ""
    since: int = 0
    name: str = ""
    until: int | None = None
    attempt: int = 0
    attempts: int | None = None
    error: str = ""
    site: str = ""
    run: str = ""


class Waits(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The whole column. blocked: the report; tries: how often it was tried in vain. restless: a line.

    changed: the first step that the code now calls with other arguments than recorded.
    """

    waits: list[Wait] = msgspec.field(name="for", default_factory=list)
    more: int = 0
    cancel: str | None = None
    blocked: str = ""
    tries: int = 0
    restless: str = ""
    changed: str = ""


_decoder: Final[msgspec.json.Decoder[Waits]] = msgspec.json.Decoder(Waits)


def waits_text(waits: Waits) -> str:
    """The column as it is written."""
    return msgspec.json.encode(waits).decode()


def read_waits(text: str) -> Waits:
    """The column as it was written; empty if there is none, or none that we can read: nothing hangs on it."""
    try:
        return _decoder.decode(text) if text else Waits()
    except msgspec.DecodeError:
        return Waits()
