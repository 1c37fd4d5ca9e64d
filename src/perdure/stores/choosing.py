"""Which of the runs that a claim may take it takes: the same in every store."""

from __future__ import annotations

from collections.abc import Sequence

from perdure.core.turn import Claim, Key


def chosen(offered: Sequence[Sequence[int]], claim: Claim) -> list[Key]:
    """The keys to take, of [key, strikes, bytes of history, bytes of mail]: near `max_bytes`, the first in any case."""
    if (claim.alone or claim.only_suspects) and offered and offered[0][1] >= 2:
        return [offered[0][0]]
    keys: list[Key] = []
    room = claim.max_bytes
    for key, strikes, history, mail in offered:
        if strikes >= 2:
            continue
        room -= history + mail
        if room < 0 and keys:
            break
        keys.append(key)
    return keys
