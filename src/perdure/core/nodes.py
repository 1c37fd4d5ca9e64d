"""The kinds of places in an annotation: one class per kind of type.

A node's `lower` turns a value into what JSON has and `lift` turns it back; both raise `Misfit` with the path to the
culprit. Nodes write the same text as msgspec wherever msgspec can write the type (`native`), so that `codec.py` may use
it for the quick way; `suspect` nodes can say whether the quick way is to be trusted with a value, because equality does
not see all of it.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import typing
from collections.abc import Iterator
from datetime import date, datetime, time, timezone
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

import msgspec

from .plain import (
    JSON_KINDS,
    READ,
    TAGGED,
    WRITE,
    Misfit,
    array,
    article,
    as_built_in,
    as_float,
    cut,
    each_of,
    in_order,
    lift_any,
    lift_pairs,
    lower_any,
    name_of,
    pairs,
    start_of,
    unawaited,
)


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
        return unawaited(value) or Misfit(f"{self.expected} is expected, {article(value)} was given.")


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


class Leaf(Node):
    """A plain type. hint: the type as msgspec sees it, with its constraints."""

    def __init__(self, kind: type, hint: Any = None) -> None:
        self.kind = kind
        self.kinds = (kind,)
        self.hint = kind if hint is None else hint
        self.json = frozenset({JSON_KINDS.get(kind, "str")})
        self.floats = kind is float
        # Equality knows neither fold nor a zone without an offset, and takes a Decimal for an int or a float.
        self.suspect = kind in (datetime, time, Decimal)
        self._write = WRITE[kind]
        self._read = READ[kind]

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
            return as_float(value)
        if self.kind is bytes and isinstance(value, bytearray):
            return bytes(memoryview(value))
        return as_built_in(value, self.kind)

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
        items = each_of(self.item.lower, value)
        return in_order(items) if self.unordered else items

    def lift(self, plain: Any) -> Any:
        items = each_of(self.item.lift, array(plain))
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
        if not least <= len(array(plain)) <= len(self.items):
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
            return {"$map": pairs(self.key.lower, self.item.lower, dict(dict.items(value)))}
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
            return lift_pairs(self.key.lift, self.item.lift, plain["$map"])
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
        values = list(array(plain))
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
        self.json = frozenset(JSON_KINDS.get(kind, "str") for kind in self.kinds)
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
                value = as_built_in(value, base)
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
        if all(isinstance(member, Leaf) and member.kind in (*TAGGED, *JSON_KINDS, str) for member in members):
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


class Alias(Node):
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
