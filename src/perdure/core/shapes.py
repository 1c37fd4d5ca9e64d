"""The thorough way between values and JSON: a tree of nodes per annotation, one kind of node per kind of type.

A node's `lower` turns a value into what JSON has (None, bool, int, float, str, list, dict) and `lift` turns it back;
both raise `Misfit` with the path to the culprit. Nodes write the same text as msgspec wherever msgspec can write the
type (`native`), so that `codec.py` may use it for the quick way; `suspect` nodes can say whether the quick way is to be
trusted with a value, because equality does not see all of it.

In a place of type `Any` the values that JSON lacks are objects with one key, a tag. `$escape` wraps a plain dict that
would be taken for a tag.
"""

from __future__ import annotations

import collections.abc as abc
import dataclasses
import enum
import math
import re
import types
import typing
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin
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


class Node:
    """One place in the tree of an annotation."""

    native = True
    """msgspec reads and writes this kind of place as we do."""
    tags = False
    """Tags may stand here."""
    floats = False
    """An int may be given for a float here."""
    suspect = False
    """Equality does not see everything here: ask `trusts`."""
    watched = False
    """This place or one below it is suspect; set when a plan is made."""
    kinds: tuple[type, ...] = ()
    """Exactly these types belong here."""
    json: frozenset[str] = frozenset()
    """What may stand in the JSON text here: null, bool, int, float, str, array, object."""

    def lower(self, value: Any) -> Any:
        raise NotImplementedError

    def lift(self, plain: Any) -> Any:
        raise NotImplementedError

    def takes(self, value: Any) -> bool:
        """Whether the value belongs here rather than to another member of a union."""
        return isinstance(value, self.kinds)

    def trusts(self, value: Any) -> bool:
        """Whether a value that came back equal has come back the same."""
        return not self.suspect

    def below(self) -> Iterator[Node]:
        """The nodes of the places inside this one."""
        return iter(())

    @property
    def expected(self) -> str:
        return " or ".join(name_of(kind) for kind in self.kinds)

    def wrong(self, value: Any) -> Misfit:
        return Misfit(f"{self.expected} is expected, {article(value)} was given.")


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

_WRITE: Final[dict[type, Callable[[Any], Any]]] = {
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
_READ: Final[dict[type, Callable[[Any], Any]]] = {kind: _reader(kind) for kind in _WRITE}
_JSON: Final = {type(None): "null", bool: "bool", int: "int", float: "float"}

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


def _plain(value: Any, kind: type) -> Any:
    """`value`, of a subclass of `kind`, as a `kind`; a subclass that holds more (nanoseconds) is refused."""
    result = _PLAIN[kind](value)
    # Not `!=`: a subclass may define only `__eq__`.
    if kind in _MAY_HIDE_MORE and not result == value:
        raise Misfit(
            f"{start_of(article(value))} holds more than a {kind.__name__}, and would lose it.",
            f"Turn it into a {kind.__name__} yourself.",
        )
    return result


class Leaf(Node):
    """A plain type. hint: the type as msgspec sees it, with its constraints."""

    def __init__(self, kind: type, hint: Any = None) -> None:
        self.kind = kind
        self.kinds = (kind,)
        self.hint = kind if hint is None else hint
        self.json = frozenset({_JSON.get(kind, "str")})
        self.floats = kind is float
        # Equality knows neither fold nor a zone without an offset, and takes a Decimal for an int or a float.
        self.suspect = kind in (datetime, time, Decimal)
        self._write = _WRITE[kind]
        self._read = _READ[kind]

    def takes(self, value: Any) -> bool:
        if self.kind is float:
            return isinstance(value, (float, int))
        if self.kind is date:
            return isinstance(value, date) and not isinstance(value, datetime)
        if self.kind is bytes:
            return isinstance(value, (bytes, bytearray))
        return isinstance(value, self.kind)

    def coerce(self, value: Any) -> Any:
        """The value as exactly this type."""
        if type(value) is self.kind:
            return value
        if not self.takes(value):
            raise self.wrong(value)
        if self.kind is float and isinstance(value, int):
            return _as_float(value)
        if self.kind is bytes and isinstance(value, bytearray):
            return bytes(memoryview(value))
        return _plain(value, self.kind)

    def lower(self, value: Any) -> Any:
        return self._write(self.coerce(value))

    def lift(self, plain: Any) -> Any:
        try:
            value = self._read(plain)
            # Constraints are msgspec's; a datetime that only we can read has none that it could check.
            return value if self.hint is self.kind else msgspec.convert(value, self.hint)
        except (msgspec.ValidationError, ValueError) as error:
            raise Misfit(f"{self.expected} is expected, found {cut(plain)}: {error}.") from None

    def trusts(self, value: Any) -> bool:
        if not self.suspect:
            return True
        if self.kind is Decimal:
            return type(value) is Decimal
        return value.tzinfo is timezone.utc or (value.tzinfo is None and not value.fold)


def _as_float(value: int) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if number != value:
        raise Misfit(f"The int {cut(value)} has no equal float.", "Annotate int, or Decimal, or pass a float.")
    return number


# --- Any


class Anything(Node):
    """A place without an annotation."""

    tags = True
    json = frozenset({"null", "bool", "int", "float", "str", "array", "object"})

    def lower(self, value: Any) -> Any:
        return lower_any(value)

    def lift(self, plain: Any) -> Any:
        return lift_any(plain)

    def takes(self, value: Any) -> bool:
        return True

    @property
    def expected(self) -> str:
        return "a plain value"


ANY: Final = Anything()


def lower_any(value: Any) -> Any:
    """A plain value as JSON, tagged where JSON has no such type."""
    kind = type(value)
    if kind is str or kind is int or kind is bool or value is None:
        return value
    if kind is float:
        return _write_float(value)
    if kind is list:
        return _each(lower_any, value)
    if kind is dict:
        return _lower_dict(value)
    if kind in _TAGGED:
        name, write, _ = _TAGGED[kind]
        return {name: write(value)}
    for base in _BASES:
        if isinstance(value, base):
            return lower_any(_plain(value, base))
    raise Misfit(
        f"{start_of(article(value))} is no plain value.",
        "Annotate the type (the parameter, the return type, or returns=) if it is a dataclass, a msgspec Struct, an "
        "attrs class or an Enum, or turn it into plain values.",
    )


def _lower_dict(value: dict[Any, Any]) -> dict[str, Any]:
    lowered: dict[str, Any] = {}
    for key, item in value.items():
        if type(key) is not str:
            if isinstance(key, str):
                return _lower_dict(_string_keys(value))
            return {"$map": _pairs(lower_any, lower_any, value)}
        try:
            lowered[key] = lower_any(item)
        except Misfit as misfit:
            raise misfit.under(f"[{cut(key)}]") from None
    return {"$escape": lowered} if _looks_tagged(value) else lowered


def _string_keys(value: dict[Any, Any]) -> dict[Any, Any]:
    keys = [_plain(key, str) if isinstance(key, str) else key for key in value]
    if len(set(keys)) < len(keys):
        raise Misfit("Two of its keys are the same str.", "Use plain str keys.")
    return dict(zip(keys, value.values(), strict=True))


def _looks_tagged(value: dict[str, Any]) -> bool:
    # Any dollar sign in a single key, not only the known ones: a later version may know more.
    return (len(value) == 1 and next(iter(value)).startswith("$")) or "$encoded" in value


def lift_any(plain: Any) -> Any:
    """The value of a JSON value from a place without an annotation."""
    if type(plain) is list:
        return _each(lift_any, plain)
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
        items = _each(lift_any, _array(inner))
        result = kind(items)
        if len(result) < len(items):
            raise Misfit("an element is there twice")
        return result

    return lift


def _lift_map(inner: Any) -> dict[Any, Any]:
    return _lift_pairs(lift_any, lift_any, inner)


def _lift_text(kind: type) -> Callable[[Any], Any]:
    def lift(inner: Any) -> Any:
        if type(inner) is not str:
            raise Misfit("it holds text")
        return _READ[kind](inner)

    return lift


def _array(plain: Any) -> list[Any]:
    if type(plain) is not list:
        raise Misfit(f"An array is expected, found {cut(plain)}.")
    return plain


def _tagged_text(kind: type) -> tuple[str, Callable[[Any], Any], Callable[[Any], Any]]:
    return f"${kind.__name__.lower()}", _WRITE[kind], _lift_text(kind)


_TAGGED: Final[dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]]] = {
    tuple: ("$tuple", lambda value: _each(lower_any, value), lambda inner: tuple(_each(lift_any, _array(inner)))),
    set: ("$set", lambda value: _in_order(_each(lower_any, value)), _lift_set(set)),
    frozenset: ("$frozenset", lambda value: _in_order(_each(lower_any, value)), _lift_set(frozenset)),
    **{kind: _tagged_text(kind) for kind in (bytes, datetime, date, time, timedelta, Decimal, UUID)},
}
_LIFT: Final[dict[str, Callable[[Any], Any]]] = {
    **{name: lift for name, _, lift in _TAGGED.values()},
    "$map": _lift_map,
    "$escape": _lift_escaped,
}
# datetime before date, of which it is a subclass.
_BASES: Final = (
    str, int, float, list, dict, tuple, set, frozenset, bytes, datetime, date, time, timedelta, Decimal, UUID,
)  # fmt: skip


# --- containers


_encode: Final = msgspec.json.Encoder().encode


def _in_order(items: list[Any]) -> list[Any]:
    """A set's lowered elements, in an order that does not depend on the process."""
    return sorted(items, key=_encode)


def _each(act: Callable[[Any], Any], items: Any) -> list[Any]:
    done: list[Any] = []
    try:
        for item in items:
            done.append(act(item))
    except Misfit as misfit:
        raise misfit.under(f"[{len(done)}]") from None
    return done


def _pairs(key: Callable[[Any], Any], item: Callable[[Any], Any], value: dict[Any, Any]) -> list[list[Any]]:
    pairs = []
    for each, of_it in value.items():
        try:
            pairs.append([key(each), item(of_it)])
        except Misfit as misfit:
            raise misfit.under(f"[{cut(each)}]") from None
    return pairs


def _lift_pairs(key: Callable[[Any], Any], item: Callable[[Any], Any], plain: Any) -> dict[Any, Any]:
    lifted: dict[Any, Any] = {}
    for pair in _array(plain):
        if len(_array(pair)) != 2:
            raise Misfit(f"A pair is expected, found {cut(pair)}.")
        lifted[key(pair[0])] = item(pair[1])
    if len(lifted) < len(plain):
        raise Misfit("A key is there twice.")
    return lifted


class Items(Node):
    """A list, tuple, set or frozenset of one type of element. made: what comes back."""

    json = frozenset({"array"})

    def __init__(self, made: type) -> None:
        self.made = made
        self.kinds = (made,)
        self.unordered = made in (set, frozenset)
        self.suspect = self.unordered
        self.item: Node = ANY

    def below(self) -> Iterator[Node]:
        yield self.item

    def takes(self, value: Any) -> bool:
        return isinstance(value, (set, frozenset) if self.unordered else (list, tuple))

    def lower(self, value: Any) -> Any:
        if not self.takes(value):
            raise self.wrong(value)
        items = _each(self.item.lower, value)
        return _in_order(items) if self.unordered else items

    def lift(self, plain: Any) -> Any:
        items = _each(self.item.lift, _array(plain))
        try:
            return self.made(items)
        except TypeError as error:
            raise Misfit(f"{cut(plain)} cannot be the elements of a {self.made.__name__}: {error}.") from None

    def trusts(self, value: Any) -> bool:
        if self.unordered and len(value) > 1:
            return False  # Equal sets are written in an order that differs from process to process.
        return not self.item.watched or all(map(self.item.trusts, value))


class Row(Node):
    """A tuple with a type for each place; with `made`, a NamedTuple."""

    json = frozenset({"array"})

    def __init__(self, made: type = tuple, required: int | None = None) -> None:
        self.made = made
        self.kinds = (made,)
        self.items: list[Node] = []
        self.required = required

    def below(self) -> Iterator[Node]:
        return iter(self.items)

    def takes(self, value: Any) -> bool:
        return isinstance(value, (tuple, list) if self.made is tuple else tuple)

    def lower(self, value: Any) -> Any:
        if not self.takes(value):
            raise self.wrong(value)
        if len(value) != len(self.items):
            raise Misfit(f"{len(self.items)} elements are expected, there are {len(value)}.")
        return self._zipped("lower", value)

    def lift(self, plain: Any) -> Any:
        least = len(self.items) if self.required is None else self.required
        if not least <= len(_array(plain)) <= len(self.items):
            raise Misfit(f"{len(self.items)} elements are expected, there are {len(plain)}.")
        lifted = self._zipped("lift", plain)
        return tuple(lifted) if self.made is tuple else self.made(*lifted)

    def _zipped(self, act: str, values: Any) -> list[Any]:
        done: list[Any] = []
        try:
            for node, value in zip(self.items, values, strict=False):
                done.append(getattr(node, act)(value))
        except Misfit as misfit:
            raise misfit.under(f"[{len(done)}]") from None
        return done

    def trusts(self, value: Any) -> bool:
        return all(not node.watched or node.trusts(item) for node, item in zip(self.items, value, strict=True))


class Table(Node):
    """A dict with one type of keys and one of values. Keys that JSON lacks are written as `$map`, a list of pairs."""

    json = frozenset({"object"})
    kinds = (dict,)

    def __init__(self) -> None:
        self.key: Node = ANY
        self.item: Node = ANY

    def set(self, key: Node, item: Node) -> None:
        self.key, self.item = key, item
        self.words = key.kind in _WORDS if isinstance(key, Leaf) else isinstance(key, (Member, Literals)) and key.native
        self.native = self.words
        # Two keys may be written alike: an int and a bool, a Decimal and its twin.
        self.suspect = not (isinstance(key, Leaf) and key.kind in (str, int))

    def below(self) -> Iterator[Node]:
        yield self.key
        yield self.item

    def lower(self, value: Any) -> Any:
        if not isinstance(value, dict):
            raise self.wrong(value)
        if not self.words:
            return {"$map": _pairs(self.key.lower, self.item.lower, dict(dict.items(value)))}
        lowered: dict[str, Any] = {}
        for key, item in dict.items(value):
            try:
                word = self.key.lower(key)
                lowered[word if type(word) is str else str(word)] = self.item.lower(item)
            except Misfit as misfit:
                raise misfit.under(f"[{cut(key)}]") from None
        if len(lowered) < len(value):
            raise Misfit("Two of its keys are written alike.", "Use keys of one type.")
        return lowered

    def lift(self, plain: Any) -> Any:
        if type(plain) is not dict:
            raise Misfit(f"An object is expected, found {cut(plain)}.")
        if not self.words:
            if set(plain) != {"$map"}:
                raise Misfit(f'An object with the one key "$map" is expected, found {cut(plain)}.')
            return _lift_pairs(self.key.lift, self.item.lift, plain["$map"])
        lifted: dict[Any, Any] = {}
        for word, item in plain.items():
            try:
                lifted[self._lift_key(word)] = self.item.lift(item)
            except Misfit as misfit:
                raise misfit.under(f"[{cut(word)}]") from None
        if len(lifted) < len(plain):
            raise Misfit("Two of its keys mean the same.")
        return lifted

    def _lift_key(self, word: str) -> Any:
        if self.key.json <= {"str"}:
            return self.key.lift(word)
        try:
            return self.key.lift(int(word) if re.fullmatch(r"-?\d+", word) else word)
        except ValueError as error:
            raise Misfit(f"{cut(word)} is no number: {error}.") from None

    def trusts(self, value: Any) -> bool:
        return not self.suspect and (not self.item.watched or all(map(self.item.trusts, value.values())))


_WORDS: Final = (str, int, UUID, date, Decimal, bytes)
"""Types whose text can be the key of a JSON object, there and back by msgspec too."""


class Loose(Node):
    """A bare `dict`: the keys and values of `Any`."""

    tags = True
    json = frozenset({"object"})
    kinds = (dict,)

    def lower(self, value: Any) -> Any:
        if not isinstance(value, dict):
            raise self.wrong(value)
        return lower_any(value)

    def lift(self, plain: Any) -> Any:
        value = lift_any(plain)
        if type(value) is not dict:
            raise Misfit(f"dict is expected, found {cut(plain)}.")
        return value


# --- classes with fields


class Field(typing.NamedTuple):
    """One field of a class. word: its key in JSON; given: its name as an argument, where it is one."""

    name: str
    word: str
    given: str | None
    required: bool
    node: Node


class Record(Node):
    """A dataclass, a msgspec Struct, an attrs class or a TypedDict."""

    json = frozenset({"object"})

    def __init__(self, made: type) -> None:
        self.made = made
        self.kinds = (made,)
        self.fields: list[Field] = []
        self.mapping = typing.is_typeddict(made)
        self.struct = getattr(made, "__struct_config__", None)
        self.strict = bool(self.struct and self.struct.forbid_unknown_fields)
        self.tag: tuple[str, str | int] | None = None
        if self.struct is not None and self.struct.tag is not None:
            self.tag = (self.struct.tag_field, self.struct.tag)
        self.array = bool(self.struct and self.struct.array_like)
        if self.array:
            self.json = frozenset({"array"})
        if self.mapping:
            self.kinds = (dict,)
        self.suspect = not self.mapping and not _equality_sees_all(made)

    @property
    def expected(self) -> str:
        return name_of(self.made)

    def below(self) -> Iterator[Node]:
        for field in self.fields:
            yield field.node

    def lower(self, value: Any) -> Any:
        if self.mapping:
            return self._lower_mapping(value)
        if type(value) is not self.made:
            raise _subclass(value, self.made) if isinstance(value, self.made) else self.wrong(value)
        lowered: dict[str, Any] = {}
        for field in self.fields:
            try:
                item = getattr(value, field.name)
                if item is not msgspec.UNSET:
                    lowered[field.word] = field.node.lower(item)
            except AttributeError:
                raise Misfit(f"Its field {field.name} was never set.", "Set all fields.") from None
            except Misfit as misfit:
                raise misfit.under(f".{field.name}") from None
        if self.array:
            return [*([self.tag[1]] if self.tag else []), *lowered.values()]
        return {self.tag[0]: self.tag[1], **lowered} if self.tag else lowered

    def _lower_mapping(self, value: Any) -> Any:
        if not isinstance(value, dict):
            raise self.wrong(value)
        known = {field.name: field for field in self.fields}
        lowered: dict[str, Any] = {}
        for key, item in dict.items(value):
            if key not in known:
                raise Misfit(
                    f"{self.expected} has no key {cut(key)}, so it would be lost.",
                    f"Add the key to {self.expected}, or annotate dict[str, Any].",
                )
            try:
                lowered[key] = known[key].node.lower(item)
            except Misfit as misfit:
                raise misfit.under(f"[{cut(key)}]") from None
        for field in self.fields:
            if field.required and field.name not in value:
                raise Misfit(f"The key {field.name!r} is missing.")
        return lowered

    def lift(self, plain: Any) -> Any:
        if self.array:
            plain = self._as_object(plain)
        if type(plain) is not dict:
            raise Misfit(f"An object is expected, found {cut(plain)}.")
        if self.tag and plain.get(self.tag[0], self.tag[1]) != self.tag[1]:
            raise Misfit(f"{self.tag[1]!r} is expected for {self.tag[0]}, found {cut(plain[self.tag[0]])}.")
        lifted: dict[str, Any] = {}
        for field in self.fields:
            if field.word in plain:
                try:
                    lifted[field.name] = field.node.lift(plain[field.word])
                except Misfit as misfit:
                    raise misfit.under(f".{field.name}") from None
            elif field.required:
                raise Misfit(f"The field {field.word!r} is missing.")
        if self.strict:
            unknown = set(plain) - {field.word for field in self.fields} - ({self.tag[0]} if self.tag else set())
            if unknown:
                raise Misfit(f"{self.expected} has no field {cut(min(unknown))}.")
        return lifted if self.mapping else self._made(lifted)

    def _as_object(self, plain: Any) -> Any:
        values = list(_array(plain))
        if self.tag and (not values or values.pop(0) != self.tag[1]):
            raise Misfit(f"{self.tag[1]!r} is expected first, found {cut(plain)}.")
        if self.strict and len(values) > len(self.fields):
            raise Misfit(f"{len(self.fields)} elements are expected, there are {len(values)}.")
        return dict(zip((field.word for field in self.fields), values, strict=False))

    def _made(self, lifted: dict[str, Any]) -> Any:
        arguments = {f.given: lifted[f.name] for f in self.fields if f.given is not None and f.name in lifted}
        try:
            value = self.made(**arguments)
            for field in self.fields:
                if field.given is None and field.name in lifted:
                    object.__setattr__(value, field.name, lifted[field.name])
        except Exception as error:
            raise Misfit(f"{self.expected} refuses it: {type(error).__name__}: {error}.") from None
        return value

    def trusts(self, value: Any) -> bool:
        if self.suspect:
            return False
        for field in self.fields:
            if field.node.watched:
                if self.mapping:
                    if field.name in value and not field.node.trusts(value[field.name]):
                        return False
                elif not field.node.trusts(getattr(value, field.name)):
                    return False
        return True


def _subclass(value: Any, declared: type) -> Misfit:
    return Misfit(
        f"{start_of(article(value))} was given, a subclass of {name_of(declared)}: it would come back as "
        f"{name_of(declared)} and lose what it adds.",
        f"Annotate {name_of(type(value))}, or a union of tagged msgspec Structs.",
    )


def _equality_sees_all(made: type) -> bool:
    """Whether `==` compares all fields: not with a hand-written `__eq__` or with fields left out of it."""
    equal: Any = made.__eq__
    if hasattr(made, "__struct_config__"):
        return equal is msgspec.Struct.__eq__
    if not getattr(getattr(equal, "__code__", None), "co_filename", "").startswith("<"):
        return equal is object.__eq__  # Then only the object itself is equal, and the thorough way is taken.
    if hasattr(made, "__attrs_attrs__"):
        return all(field.eq is True and field.eq_key is None for field in made.__attrs_attrs__)
    return all(field.compare for field in dataclasses.fields(made))


# --- choices


class Member(Node):
    """An Enum: written by value where all values are str or all are int, as the sum of a Flag, else by name."""

    def __init__(self, made: type[enum.Enum]) -> None:
        self.made = made
        self.kinds = (made,)
        values = [member.value for member in made]
        self.flag = issubclass(made, enum.Flag)
        self.by_value = not self.flag and (
            all(type(value) is str for value in values) or all(type(value) is int for value in values)
        )
        self.native = self.by_value and bool(values)
        number = self.flag or (self.by_value and any(type(value) is int for value in values))
        self.json = frozenset({"int" if number else "str"})
        # The member of an IntEnum equals its int, and members may compare as they like.
        self.suspect = made.__eq__ is not object.__eq__

    def trusts(self, value: Any) -> bool:
        return not self.suspect or (isinstance(value, self.made) and self.made.__eq__ in (int.__eq__, str.__eq__))

    def lower(self, value: Any) -> Any:
        if not isinstance(value, self.made):
            raise self.wrong(value)
        if self.by_value or self.flag:
            return value.value
        return value.name

    def lift(self, plain: Any) -> Any:
        try:
            if self.by_value or self.flag:
                if type(plain) is bool:
                    raise ValueError(plain)
                return self.made(plain)
            return self.made[plain]
        except (ValueError, KeyError, TypeError):
            known = ", ".join(member.name for member in self.made)
            raise Misfit(f"{cut(plain)} is none of {self.expected}: {known}.") from None


class Literals(Node):
    """A `Literal`: some values of None, bool, int, str."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.values = values
        self.kinds = tuple({type(value) for value in values})
        self.json = frozenset(_JSON.get(kind, "str") for kind in self.kinds)
        # msgspec has no Literal of bool, and 1 == True.
        self.native = bool not in self.kinds
        if any(kind not in (type(None), bool, int, str) for kind in self.kinds):
            raise Misfit("A Literal of an Enum's members has no text of its own.", "Annotate the Enum.")

    @property
    def expected(self) -> str:
        return " or ".join(map(repr, self.values))

    def takes(self, value: Any) -> bool:
        return any(type(value) is type(each) and value == each for each in self.values)

    def lower(self, value: Any) -> Any:
        for base in (str, int):
            if isinstance(value, base) and type(value) not in (base, bool):
                value = _plain(value, base)
        if not self.takes(value):
            raise Misfit(f"{self.expected} is expected, found {cut(value)}.")
        return value

    def lift(self, plain: Any) -> Any:
        return self.lower(plain)


class Choice(Node):
    """A union whose members can be told apart by their JSON."""

    def __init__(self) -> None:
        self.members: list[Node] = []

    def set(self, members: list[Node]) -> None:
        # An int is read before a float, which would take it too.
        self.members = sorted(members, key=lambda member: isinstance(member, Leaf) and member.kind is float)
        self.json = frozenset().union(*(member.json for member in members))
        self.kinds = tuple(kind for member in members for kind in member.kinds)

    def below(self) -> Iterator[Node]:
        return iter(self.members)

    @property
    def expected(self) -> str:
        return " or ".join(member.expected for member in self.members)

    def takes(self, value: Any) -> bool:
        return any(member.takes(value) for member in self.members)

    def _member(self, value: Any) -> Node:
        kind = type(value)
        for member in self.members:
            if kind in member.kinds and member.takes(value):
                return member
        for member in self.members:
            if member.takes(value):
                return member
        raise self.wrong(value)

    def lower(self, value: Any) -> Any:
        return self._member(value).lower(value)

    def lift(self, plain: Any) -> Any:
        misfits: list[Misfit] = []
        for member in self.members:
            try:
                return member.lift(plain)
            except Misfit as misfit:
                misfits.append(misfit)
        # The one that came furthest knows most.
        raise max(misfits, key=lambda misfit: len(misfit.path))

    def trusts(self, value: Any) -> bool:
        try:
            return self._member(value).trusts(value)
        except Misfit:
            return False


class Tagged(Node):
    """A union of plain types that look alike in JSON, such as `datetime | str`: written as inside `Any`."""

    tags = True
    native = False

    def __init__(self, members: list[Leaf]) -> None:
        self.members = sorted(members, key=lambda member: member.kind is float)
        self.kinds = tuple(member.kind for member in members)
        self.json = frozenset().union(*(member.json for member in members)) | {"object"}

    def lower(self, value: Any) -> Any:
        if type(value) in self.kinds:
            return lower_any(value)
        for member in self.members:
            if member.takes(value):
                return lower_any(member.coerce(value))
        raise self.wrong(value)

    def lift(self, plain: Any) -> Any:
        value = lift_any(plain)
        if type(value) not in self.kinds:
            raise self.wrong(value)
        return value


def choice(members: list[Node]) -> Node:
    """The node of a union, or a Misfit where JSON could not tell its members apart."""
    if any(isinstance(member, Anything) for member in members):
        return ANY
    crowded = [
        kind
        for kind in ("bool", "int", "float", "str", "array", "object")
        if sum(kind in member.json for member in members) > 1
    ]
    if crowded and not _told_by_tag(crowded, members):
        if all(isinstance(member, Leaf) and member.kind in (*_TAGGED, *_JSON, str) for member in members):
            return Tagged([member for member in members if isinstance(member, Leaf)])
        alike = ", ".join(member.expected for member in members if crowded[0] in member.json)
        raise Misfit(
            f"In JSON its members {alike} look alike, so a stored value could come back as the wrong one.",
            "Make them msgspec Structs with tag=True, or use one type.",
        )
    made = Choice()
    made.set(members)
    return made


def _told_by_tag(crowded: list[str], members: list[Node]) -> bool:
    if crowded not in (["object"], ["array"]):
        return False
    alike = [member for member in members if crowded[0] in member.json]
    tags = [member.tag for member in alike if isinstance(member, Record) and member.tag]
    return len(tags) == len(alike) == len({tag for _, tag in tags}) and len({field for field, _ in tags}) == 1


# --- from annotations to nodes


_LISTS: Final = (list, abc.Sequence, abc.MutableSequence, abc.Collection, abc.Iterable)
_SETS: Final = (set, abc.Set, abc.MutableSet)
_DICTS: Final = (dict, abc.Mapping, abc.MutableMapping)
_WRAPPERS: Final = tuple(
    getattr(typing, name)
    for name in ("Final", "ClassVar", "Required", "NotRequired", "ReadOnly")
    if hasattr(typing, name)
)


def shape(annotation: Any) -> Node:
    """The node of an annotation. Raises Misfit for a type that cannot be stored."""
    return _Builder().build(annotation, {})


def reachable(node: Node) -> list[Node]:
    """`node` and all below it; types may contain themselves."""
    found: dict[int, Node] = {}
    todo = [node]
    while todo:
        each = todo.pop()
        if id(each) not in found:
            found[id(each)] = each
            todo.extend(each.below())
    return list(found.values())


class _Builder:
    """One annotation's way to its nodes; remembers classes, so that a type may contain itself."""

    def __init__(self) -> None:
        self._known: dict[Any, Node] = {}

    def build(self, annotation: Any, variables: dict[Any, Any]) -> Node:
        """variables: what the type variables of the class around stand for."""
        if annotation is Any or annotation is object:
            return ANY
        if annotation is None:
            return Leaf(type(None))
        if isinstance(annotation, TypeVar):
            return self._variable(annotation, variables)
        if isinstance(annotation, typing.NewType):
            return self.build(annotation.__supertype__, variables)
        if hasattr(annotation, "__value__") and type(annotation).__name__ == "TypeAliasType":
            return self._alias(annotation, variables)
        origin, args = get_origin(annotation), get_args(annotation)
        if origin is not None and hasattr(origin, "__value__"):
            named = dict(zip(origin.__type_params__, args, strict=False))
            return self.build(origin.__value__, {**variables, **named})
        if origin is typing.Annotated:
            return self._annotated(annotation, args, variables)
        if origin in _WRAPPERS:
            return self.build(args[0], variables)
        if origin is Literal:
            return Literals(args)
        if origin is Union or origin is types.UnionType:
            return choice(_flat([self.build(each, variables) for each in args]))
        return self._class(annotation, origin or annotation, args, variables)

    def _variable(self, variable: TypeVar, variables: dict[Any, Any]) -> Node:
        if variable in variables and variables[variable] is not variable:
            return self.build(variables[variable], variables)
        return ANY if variable.__bound__ is None else self.build(variable.__bound__, variables)

    def _alias(self, alias: Any, variables: dict[Any, Any]) -> Node:
        if alias in self._known:
            return self._known[alias]
        # An alias may contain itself (`type Json = list[Json] | str`): its node must exist before its value's.
        made = self._known[alias] = _Alias(alias)
        made.inner = self.build(alias.__value__, variables)
        return made.inner if made.inner is ANY else made

    def _annotated(self, annotation: Any, args: tuple[Any, ...], variables: dict[Any, Any]) -> Node:
        node = self.build(args[0], variables)
        if isinstance(node, Leaf) and any(isinstance(each, msgspec.Meta) for each in args[1:]):
            return Leaf(node.kind, annotation)
        return node

    def _class(self, annotation: Any, kind: Any, args: tuple[Any, ...], variables: dict[Any, Any]) -> Node:
        if kind in _WRITE:
            return Leaf(kind)
        if kind is tuple:
            return self._tuple(annotation, args, variables)
        if kind in _LISTS or kind in _SETS or kind is frozenset:
            made = Items(list if kind in _LISTS else set if kind in _SETS else frozenset)
            if args:
                made.item = self.build(args[0], variables)
            return made
        if kind in _DICTS:
            return self._dict(args, variables)
        if not isinstance(kind, type):
            raise Misfit(f"{name_of(annotation)} is no type of values.", _SUPPORTED)
        if issubclass(kind, enum.Enum):
            return Member(kind)
        if _has_fields(kind):
            return self._record(kind, args, variables)
        if issubclass(kind, _BASES):
            raise Misfit(
                f"{name_of(kind)} is a subclass of a built-in type, and would come back as that.",
                "Annotate the built-in type or a NewType of it.",
            )
        raise Misfit(f"{name_of(kind)} has no fields that are known.", _SUPPORTED)

    def _tuple(self, annotation: Any, args: tuple[Any, ...], variables: dict[Any, Any]) -> Node:
        if not args and str(annotation) in ("<class 'tuple'>", "typing.Tuple"):
            return Items(tuple)
        if len(args) == 2 and args[1] is Ellipsis:
            made = Items(tuple)
            made.item = self.build(args[0], variables)
            return made
        row = Row()
        # `Tuple[()]` has the argument `()` on 3.10.
        row.items = [self.build(each, variables) for each in args if each != ()]
        return row

    def _dict(self, args: tuple[Any, ...], variables: dict[Any, Any]) -> Node:
        if not args or all(each is Any or each is object for each in args):
            return Loose()
        made = Table()
        made.set(self.build(args[0], variables), self.build(args[1], variables))
        return made

    def _record(self, kind: type, args: tuple[Any, ...], variables: dict[Any, Any]) -> Node:
        given = tuple(variables.get(each, each) if isinstance(each, TypeVar) else each for each in args)
        try:
            key: Any = (kind, given)
            if key in self._known:
                return self._known[key]
        except TypeError:
            key = id(kind)
        hints = _hints(kind)
        inside = _variables(kind, given)
        if issubclass(kind, tuple):
            row = self._known[key] = Row(kind, required=len(kind._fields) - len(kind._field_defaults))  # type: ignore[attr-defined]  # a NamedTuple
            row.items = [self.build(hints.get(name, Any), inside) for name in kind._fields]  # type: ignore[attr-defined]
            return row
        record = self._known[key] = Record(kind)
        for name, word, argument, required in _fields(kind):
            try:
                node = self.build(hints.get(name, Any), inside)
            except Misfit as misfit:
                raise Misfit(f"Its field {name} is the trouble: {misfit.why}", misfit.advice) from None
            record.fields.append(Field(name, word, argument, required, node))
        return record


class _Alias(Node):
    """A named type (`type X = …`), which may contain itself."""

    native = False

    def __init__(self, alias: Any) -> None:
        self.alias = alias
        self.inner: Node = ANY

    @property
    def json(self) -> frozenset[str]:  # type: ignore[override]  # known only when the inner node is
        return self.inner.json

    @property
    def kinds(self) -> tuple[type, ...]:  # type: ignore[override]  # known only when the inner node is
        return self.inner.kinds

    def below(self) -> Iterator[Node]:
        yield self.inner

    def takes(self, value: Any) -> bool:
        return self.inner.takes(value)

    def lower(self, value: Any) -> Any:
        return self.inner.lower(value)

    def lift(self, plain: Any) -> Any:
        return self.inner.lift(plain)


_SUPPORTED: Final = (
    "Use plain Python types, dataclasses, msgspec Structs, attrs classes, TypedDicts, NamedTuples or Enums, or turn "
    "the value into one of them."
)


def _flat(members: list[Node]) -> list[Node]:
    flat: list[Node] = []
    for member in members:
        inner = member.inner if isinstance(member, _Alias) else member
        flat.extend(inner.members if isinstance(inner, (Choice, Tagged)) else [member])
    return flat


def _has_fields(kind: type) -> bool:
    return (
        dataclasses.is_dataclass(kind)
        or hasattr(kind, "__struct_config__")
        or hasattr(kind, "__attrs_attrs__")
        or typing.is_typeddict(kind)
        or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
    )


def _fields(kind: Any) -> Iterator[tuple[str, str, str | None, bool]]:
    """(attribute, key in JSON, name as an argument or None, required) of each field."""
    if hasattr(kind, "__struct_config__"):
        for info in msgspec.structs.fields(kind):
            yield info.name, info.encode_name, info.name, info.required
    elif typing.is_typeddict(kind):
        for name in [*kind.__annotations__]:
            yield name, name, name, name in kind.__required_keys__
    elif hasattr(kind, "__attrs_attrs__"):
        for each in kind.__attrs_attrs__:
            alias = getattr(each, "alias", None) or each.name.lstrip("_")
            yield each.name, each.name, alias if each.init else None, each.init and _bare(each.default)
    else:
        for field in dataclasses.fields(kind):
            bare = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            yield field.name, field.name, field.name if field.init else None, bare and field.init


def _bare(default: Any) -> bool:
    # attrs marks "no default" with an object of its own; it is an optional dependency, so it is known by its name.
    return type(default).__name__ == "_Nothing"


def _hints(kind: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind, include_extras=True)
    except NameError as error:
        raise Misfit(
            f"The annotations of {name_of(kind)} name {error.name!r}, which its module does not have at run time.",
            "Import it outside `if TYPE_CHECKING`, and define the class at the top of its module.",
        ) from None
    except Exception as error:
        raise Misfit(f"The annotations of {name_of(kind)} cannot be read: {error}.", "Mend them.") from None


def _variables(kind: Any, args: tuple[Any, ...]) -> dict[Any, Any]:
    """What the type variables of a generic class and of its bases stand for."""
    named = dict(zip(getattr(kind, "__parameters__", ()), args, strict=False))
    for base in getattr(kind, "__orig_bases__", ()):
        origin = get_origin(base)
        if origin is not None and origin is not typing.Generic:
            given = tuple(named.get(each, each) if isinstance(each, TypeVar) else each for each in get_args(base))
            named = {**_variables(origin, given), **named}
    return named


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
