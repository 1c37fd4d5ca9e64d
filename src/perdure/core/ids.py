"""Run ids that sort by the time of their start."""

from __future__ import annotations

from functools import lru_cache
from shlex import quote
from typing import Final

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32, in lower case: no letters that look like digits."""
_PAIRS: Final = tuple(a + b for a in _ALPHABET for b in _ALPHABET)


def sortable_id(at: int, entropy: int) -> str:
    """26 characters: 48 bits of milliseconds, then 80 bits drawn by the caller.

    at: microseconds since the epoch. entropy: a number below 2**80.
    """
    pairs = _PAIRS
    # Ten bits at a time; of the first pair of the time two bits are always 0.
    return _time(at // 1000 & (1 << 48) - 1) + "".join([pairs[entropy >> shift & 1023] for shift in _SHIFTS])


def typed(*words: str) -> str:
    """Ids and names as the last words of a command that we propose, whatever characters they have."""
    first = "-- " if any(word.startswith("-") for word in words) else ""
    return first + " ".join(map(quote, words))


_SHIFTS: Final = range(70, -1, -10)


@lru_cache(maxsize=16)
def _time(milliseconds: int) -> str:
    return "".join([_PAIRS[milliseconds >> shift & 1023] for shift in range(40, -1, -10)])
