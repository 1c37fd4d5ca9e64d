"""A check of what a store is made with: callers are not all type-checked, and a wrong setting shows up much later."""

from __future__ import annotations

from typing import Any


def of_type(value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """Raise a TypeError that names the setting."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = " or ".join(each.__name__ for each in (kind if isinstance(kind, tuple) else (kind,)))
        raise TypeError(f"{what} must be {names}. {type(value).__name__} was given. Mend it, or leave it out.")
