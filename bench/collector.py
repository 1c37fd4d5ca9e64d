"""How the garbage collector is set in every program that is measured, ours and our peers' alike.

What is there at the start stays, and a collection begins after 10,000 new containers instead of 700: a choice that any
busy server may make, and `perdure worker` makes for itself. It was worth 5 to 12 % to this engine.
"""

from __future__ import annotations

import gc


def settle() -> None:
    """After the imports."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
