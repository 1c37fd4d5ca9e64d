"""What `--json` prints: the fields of `RunInfo`, values in their stored form, times as ISO 8601."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from perdure.core import codec
from perdure.core.retry import moment
from perdure.core.waits import Waits
from perdure.info import RunInfo


def fields_of(info: RunInfo) -> dict[str, Any]:
    """A run as an object of plain JSON values."""
    made: dict[str, Any] = {}
    for name in RunInfo.__dataclass_fields__:
        value = getattr(info, name)
        made[name] = _SPECIAL[name](value) if name in _SPECIAL else msgspec.to_builtins(value, enc_hook=plain)
    return made


def _waits(waits: Waits) -> Any:
    shown = msgspec.to_builtins(waits)
    for wait in shown.get("for", ()):
        for name in ("since", "until"):
            if isinstance(wait.get(name), int):
                wait[name] = moment(wait[name]).isoformat()
    return shown


def stored(value: Any) -> Any:
    """A value as its stored text says it, so that every value has a form in JSON."""
    return msgspec.json.decode(codec.encode(value, what="a stored value"))


def plain(value: Any) -> Any:
    """For msgspec: what it does not write by itself."""
    if isinstance(value, msgspec.Raw):
        return msgspec.json.decode(bytes(value))
    raise TypeError(f"{type(value).__name__} has no plain form")


_SPECIAL: Final[dict[str, Callable[[Any], Any]]] = {"input": stored, "result": stored, "waits": _waits, "status": str}
