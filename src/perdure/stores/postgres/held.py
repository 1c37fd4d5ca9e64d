"""Items that an open transaction of somebody else holds up, because it has written the same id, key or message.

The server lets whoever writes the same wait for the end of that transaction. A batch must not: what is known to be held
up goes alone, seldom, and behind everything else.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from typing import Final

from perdure.core.turn import Send, Start, Turn

LOCKED: Final = "55P03"
"""What the server says when a lock was not to be had in time."""
WAIT: Final = 0.2
"""Seconds that a batch waits for a lock. One that is held for longer is no other batch's."""
MOST_WAITS: Final = 12
"""Of one batch; what is left of it then is put off untried."""
PAUSE: Final = 1.0
"""Seconds from a try in vain to the next, of whatever is held up: each may stop everybody for `WAIT`."""
FORGOTTEN: Final = 60.0
"""Seconds without a try after which nobody wants it any more."""


class Held:
    """See the module. One for all batches of a process."""

    def __init__(self) -> None:
        self._since: dict[Hashable, float] = {}
        self._next = 0.0

    def __bool__(self) -> bool:
        return bool(self._since)

    def knows(self, item: Start | Send | Turn) -> bool:
        """Whether this item, or one of the same id or key, was held up when it was tried last."""
        return not self._since.keys().isdisjoint(_names(item))

    def may_try(self) -> bool:
        """Whether one of them may be tried now: none was, in vain, a moment ago."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._since = {name: at for name, at in self._since.items() if now - at < FORGOTTEN}
        return True

    def add(self, item: Start | Send | Turn) -> None:
        """It is held up."""
        now = time.monotonic()
        self._next = now + PAUSE
        self._since.update(dict.fromkeys(_names(item), now))

    def remove(self, item: Start | Send | Turn) -> None:
        """It was written, or refused."""
        for name in _names(item):
            self._since.pop(name, None)


def _names(item: Start | Send | Turn) -> list[Hashable]:
    if isinstance(item, Turn):
        return [item.run]
    if isinstance(item, Send):
        return [(item.to, item.id)]
    names: list[Hashable] = [("id", item.namespace, item.id)]
    if item.idempotency_key is not None:
        names.append((item.namespace, item.idempotency_scope, item.idempotency_key))
    return names
