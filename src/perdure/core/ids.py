"""Run ids that sort by the time of their start."""

from __future__ import annotations

from typing import Final

_ALPHABET: Final = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's base 32, in lower case: no letters that look like digits."""
_PAIRS: Final = tuple(a + b for a in _ALPHABET for b in _ALPHABET)


def sortable_id(at: int, entropy: int) -> str:
    """26 characters: 48 bits of milliseconds, then 80 bits drawn by the caller.

    at: microseconds since the epoch. entropy: a number below 2**80.
    """
    number = (at // 1000 & (1 << 48) - 1) << 80 | entropy & (1 << 80) - 1
    pairs = _PAIRS
    # 130 bits, ten at a time; the first pair holds the two that are always 0.
    return "".join([pairs[number >> shift & 1023] for shift in range(120, -1, -10)])
