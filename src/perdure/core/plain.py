"""Plain Python values as JSON, where no annotation says what they are.

What JSON has (None, bool, int, finite float, str, list, dict with str keys) is written as it is. The other plain types
are an object with one key, a *tag*, from a closed list: `$tuple $set $frozenset $bytes $datetime $date $time $timedelta
$decimal $uuid $map`, and `$escape` for a plain dict that would be taken for one. Both directions raise `Misfit` with
the path to the culprit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, Final, get_origin
from uuid import UUID

import msgspec


class Misfit(Exception):
    """A value does not fit its place. path: from the inside out; advice: what to do."""

    def __init__(self, why: str, advice: str = "Return or pass what the annotation says, or change the annotation."):
        super().__init__(why)
        self.why = why
        self.advice = advice
        self.path: list[str] = []

    def under(self, step: str) -> Misfit:
        """The same one level further out."""
        self.path.append(step)
        return self

    def where(self, annotation: Any) -> str:
        """Words for the place: path and annotation, where there are any."""
        path = "".join(reversed(self.path))
        at = f" at {path[:200]}" if path else ""
        return at if annotation is Any else f"{at} as {name_of(annotation)}"


# --- leaves: how the plain types are written


def _same(value: Any) -> Any:
    return value


def _write_float(value: float) -> float:
    if not math.isfinite(value):
        raise Misfit(f"{value} is no number that JSON can hold.", "Store None or a str in its place.")
    return value


def _write_offset(value: Any) -> str:
    """A datetime or time: as msgspec writes it, with fold and offsets of seconds, which it drops, added."""
    offset = value.utcoffset()
    if offset is None:
        if value.tzinfo is not None:
            raise Misfit(
                f"The zone {value.tzinfo} gives no offset for this {type(value).__name__}.",
                "Use a full datetime in UTC, or a time without a zone.",
            )
        text: str = msgspec.to_builtins(value.replace(fold=0))
        return text + _FOLD if value.fold else text
    fixed = value.replace(tzinfo=timezone(offset), fold=0)
    text = fixed.isoformat() if offset % _MINUTE else msgspec.to_builtins(fixed)
    return text


def _read_offset(kind: type) -> Callable[[Any], Any]:
    def read(text: Any) -> Any:
        if isinstance(text, str):
            if text.endswith(_FOLD):
                value: Any = msgspec.convert(text[: -len(_FOLD)], kind)
                if value.tzinfo is None:
                    return value.replace(fold=1)
            elif _SECONDS_IN_OFFSET.search(text):
                return kind.fromisoformat(text)  # type: ignore[attr-defined]  # datetime and time both have it
        return msgspec.convert(text, kind)

    return read


def _reader(kind: type) -> Callable[[Any], Any]:
    if kind in (datetime, time):
        return _read_offset(kind)
    return lambda plain: msgspec.convert(plain, kind)


_FOLD: Final = "[fold=1]"
_MINUTE: Final = timedelta(minutes=1)
_SECONDS_IN_OFFSET: Final = re.compile(r"[+-]\d\d:\d\d:\d\d(\.\d{6})?\Z")

WRITE: Final[dict[type, Callable[[Any], Any]]] = {
    type(None): _same,
    bool: _same,
    int: _same,
    float: _write_float,
    str: _same,
    bytes: msgspec.to_builtins,
    bytearray: msgspec.to_builtins,
    datetime: _write_offset,
    date: msgspec.to_builtins,
    time: _write_offset,
    timedelta: msgspec.to_builtins,
    Decimal: msgspec.to_builtins,
    UUID: msgspec.to_builtins,
}
READ: Final[dict[type, Callable[[Any], Any]]] = {kind: _reader(kind) for kind in WRITE}
JSON_KINDS: Final = {type(None): "null", bool: "bool", int: "int", float: "float"}

# A subclass becomes the built-in type it derives from. Not through its own methods, which may do anything.
_PLAIN: Final[dict[type, Callable[[Any], Any]]] = {
    str: str.__str__,
    int: lambda value: int.__add__(value, 0),
    float: float.__float__,
    list: lambda value: list(list.__iter__(value)),
    dict: lambda value: dict(dict.items(value)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
    bytes: lambda value: bytes(memoryview(value)),
    bytearray: lambda value: bytearray(memoryview(value)),
    datetime: lambda value: datetime.combine(datetime.date(value), datetime.timetz(value)),
    date: lambda value: date(value.year, value.month, value.day),
    time: lambda value: time(value.hour, value.minute, value.second, value.microsecond, value.tzinfo, fold=value.fold),
    timedelta: lambda value: timedelta(value.days, value.seconds, value.microseconds),
    Decimal: lambda value: Decimal(value),
    UUID: lambda value: UUID(int=value.int),
}
_MAY_HIDE_MORE: Final = (datetime, date, time, timedelta, UUID)


def as_built_in(value: Any, kind: type) -> Any:
    """`value`, of a subclass of `kind`, as a `kind`; a subclass that holds more (nanoseconds) is refused."""
    result = _PLAIN[kind](value)
    # Not `!=`: a subclass may define only `__eq__`.
    if kind in _MAY_HIDE_MORE and not result == value:
        raise Misfit(
            f"{start_of(article(value))} holds more than a {kind.__name__}, and would lose it.",
            f"Turn it into a {kind.__name__} yourself.",
        )
    return result


def as_float(value: int) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if number != value:
        raise Misfit(f"The int {cut(value)} has no equal float.", "Annotate int, or Decimal, or pass a float.")
    return number


# --- Any


def lower_any(value: Any) -> Any:
    """A plain value as JSON, tagged where JSON has no such type."""
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if kind is float:
        return _write_float(value)
    if kind is list:
        return each_of(lower_any, value)
    if kind is dict:
        return _lower_dict(value)
    if kind in TAGGED:
        name, write, _ = TAGGED[kind]
        return {name: write(value)}
    for base in BASES:
        if isinstance(value, base):
            return lower_any(as_built_in(value, base))
    raise unawaited(value) or Misfit(
        f"{start_of(article(value))} is no plain value.",
        "Annotate the type (the parameter, the return type, or returns=) if it is a dataclass, a msgspec Struct, an "
        "attrs class or an Enum, or turn it into plain values.",
    )


def unawaited(value: Any) -> Misfit | None:
    """What to say of a value that only stands for one that is still to come."""
    if not isinstance(value, Awaitable):
        return None
    return Misfit(
        f"{start_of(article(value))} is still to be awaited.", "Put `await` in front, and use what comes of it."
    )


def _lower_dict(value: dict[Any, Any]) -> dict[str, Any]:
    lowered: dict[str, Any] = {}
    for key, item in value.items():
        if type(key) is not str:
            if isinstance(key, str):
                return _lower_dict(_string_keys(value))
            return {"$map": pairs(lower_any, lower_any, value)}
        try:
            lowered[key] = lower_any(item)
        except Misfit as misfit:
            raise misfit.under(f"[{cut(key)}]") from None
    return {"$escape": lowered} if _looks_tagged(value) else lowered


def _string_keys(value: dict[Any, Any]) -> dict[Any, Any]:
    keys = [as_built_in(key, str) if isinstance(key, str) else key for key in value]
    if len(set(keys)) < len(keys):
        raise Misfit("Two of its keys are the same str.", "Use plain str keys.")
    return dict(zip(keys, value.values(), strict=True))


def _looks_tagged(value: dict[str, Any]) -> bool:
    # Any dollar sign in a single key, not only the known ones: a later version may know more.
    return (len(value) == 1 and next(iter(value)).startswith("$")) or "$encoded" in value


def lift_any(plain: Any) -> Any:
    """The value of a JSON value from a place without an annotation."""
    if type(plain) is list:
        return each_of(lift_any, plain)
    if type(plain) is not dict:
        return plain
    if len(plain) == 1:
        ((key, inner),) = plain.items()
        if key in _LIFT:
            try:
                return _LIFT[key](inner)
            except Misfit as misfit:
                raise misfit.under(f".{key}") from None
            except (msgspec.ValidationError, ValueError, TypeError) as error:
                raise Misfit(f"{cut(inner)} is nothing that {key} can hold: {error}.") from None
    if "$encoded" in plain:
        raise Misfit("It went through a codec that was not taken off.")
    return _lift_plain_dict(plain)


def _lift_plain_dict(plain: dict[str, Any]) -> dict[str, Any]:
    lifted = {}
    for key, item in plain.items():
        try:
            lifted[key] = lift_any(item)
        except Misfit as misfit:
            raise misfit.under(f"[{cut(key)}]") from None
    return lifted


def _lift_escaped(inner: Any) -> dict[str, Any]:
    if type(inner) is not dict or not _looks_tagged(inner):
        raise Misfit("only an object that looks like a tag is escaped")
    return _lift_plain_dict(inner)


def _lift_set(kind: type) -> Callable[[Any], Any]:
    def lift(inner: Any) -> Any:
        items = each_of(lift_any, array(inner))
        result = kind(items)
        if len(result) < len(items):
            raise Misfit("an element is there twice")
        return result

    return lift


def _lift_map(inner: Any) -> dict[Any, Any]:
    return lift_pairs(lift_any, lift_any, inner)


def _lift_text(kind: type) -> Callable[[Any], Any]:
    def lift(inner: Any) -> Any:
        if type(inner) is not str:
            raise Misfit("it holds text")
        return READ[kind](inner)

    return lift


def array(plain: Any) -> list[Any]:
    if type(plain) is not list:
        raise Misfit(f"An array is expected, found {cut(plain)}.")
    return plain


def _tagged_text(kind: type) -> tuple[str, Callable[[Any], Any], Callable[[Any], Any]]:
    return f"${kind.__name__.lower()}", WRITE[kind], _lift_text(kind)


TAGGED: Final[dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]]] = {
    tuple: ("$tuple", lambda value: each_of(lower_any, value), lambda inner: tuple(each_of(lift_any, array(inner)))),
    set: ("$set", lambda value: in_order(each_of(lower_any, value)), _lift_set(set)),
    frozenset: ("$frozenset", lambda value: in_order(each_of(lower_any, value)), _lift_set(frozenset)),
    **{kind: _tagged_text(kind) for kind in (bytes, datetime, date, time, timedelta, Decimal, UUID)},
}
_LIFT: Final[dict[str, Callable[[Any], Any]]] = {
    **{name: lift for name, _, lift in TAGGED.values()},
    "$map": _lift_map,
    "$escape": _lift_escaped,
}
# datetime before date, of which it is a subclass.
BASES: Final = (
    str, int, float, list, dict, tuple, set, frozenset, bytes, datetime, date, time, timedelta, Decimal, UUID,
)  # fmt: skip


# --- containers

_encode: Final = msgspec.json.Encoder().encode


def in_order(items: list[Any]) -> list[Any]:
    """A set's lowered elements, in an order that does not depend on the process."""
    return sorted(items, key=_encode)


def each_of(act: Callable[[Any], Any], items: Any) -> list[Any]:
    done: list[Any] = []
    try:
        for item in items:
            done.append(act(item))
    except Misfit as misfit:
        raise misfit.under(f"[{len(done)}]") from None
    return done


def pairs(key: Callable[[Any], Any], item: Callable[[Any], Any], value: dict[Any, Any]) -> list[list[Any]]:
    pairs = []
    for each, of_it in value.items():
        try:
            pairs.append([key(each), item(of_it)])
        except Misfit as misfit:
            raise misfit.under(f"[{cut(each)}]") from None
    return pairs


def lift_pairs(key: Callable[[Any], Any], item: Callable[[Any], Any], plain: Any) -> dict[Any, Any]:
    lifted: dict[Any, Any] = {}
    for pair in array(plain):
        if len(array(pair)) != 2:
            raise Misfit(f"A pair is expected, found {cut(pair)}.")
        lifted[key(pair[0])] = item(pair[1])
    if len(lifted) < len(plain):
        raise Misfit("A key is there twice.")
    return lifted


# --- words


def name_of(annotation: Any) -> str:
    """An annotation as its author would write it."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return "None" if annotation is type(None) else annotation.__qualname__.rpartition("<locals>.")[2]
    return re.sub(r"\b(typing|builtins)\.", "", str(annotation))[:200]


def article(value: Any) -> str:
    """The type of a value with its article: "an int"."""
    if value is None:
        return "None"
    name = name_of(type(value))
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def start_of(sentence: str) -> str:
    """`sentence` with its first letter in upper case."""
    return sentence[:1].upper() + sentence[1:]


def cut(value: Any) -> str:
    """A short repr, whatever the value does."""
    try:
        text = value if type(value) is str and len(value) > 80 else repr(value)
    except Exception:
        return article(value)
    return text if len(text) <= 80 else text[:80] + "…"
