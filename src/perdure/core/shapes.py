"""From an annotation to the tree of its nodes, or to a sentence why it cannot be stored."""

from __future__ import annotations

import collections.abc as abc
import dataclasses
import enum
import types
import typing
from collections.abc import Iterator
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin

import msgspec

from .nodes import (
    ANY,
    Alias,
    Choice,
    Field,
    Items,
    Leaf,
    Literals,
    Loose,
    Member,
    Node,
    Record,
    Row,
    Table,
    Tagged,
    choice,
)
from .plain import BASES, WRITE, Misfit, name_of

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
        made = self._known[alias] = Alias(alias)
        made.inner = self.build(alias.__value__, variables)
        return made.inner if made.inner is ANY else made

    def _annotated(self, annotation: Any, args: tuple[Any, ...], variables: dict[Any, Any]) -> Node:
        node = self.build(args[0], variables)
        if isinstance(node, Leaf) and any(isinstance(each, msgspec.Meta) for each in args[1:]):
            return Leaf(node.kind, annotation)
        return node

    def _class(self, annotation: Any, kind: Any, args: tuple[Any, ...], variables: dict[Any, Any]) -> Node:
        if not isinstance(kind, type):
            raise Misfit(f"{name_of(annotation)} is no type of values.", _SUPPORTED)
        if kind in WRITE:
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
        if issubclass(kind, enum.Enum):
            return Member(kind)
        if _has_fields(kind):
            return self._record(kind, args, variables)
        if issubclass(kind, BASES):
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
            named: Any = kind  # a NamedTuple
            row = self._known[key] = Row(kind, required=len(named._fields) - len(named._field_defaults))
            row.items = [self.build(hints.get(name, Any), inside) for name in named._fields]
            return row
        record = self._known[key] = Record(kind)
        for name, word, argument, required in _fields(kind):
            try:
                node = self.build(hints.get(name, Any), inside)
            except Misfit as misfit:
                raise Misfit(f"Its field {name} is the trouble: {misfit.why}", misfit.advice) from None
            record.fields.append(Field(name, word, argument, required, node))
        return record


_SUPPORTED: Final = (
    "Use plain Python types, dataclasses, msgspec Structs, attrs classes, TypedDicts, NamedTuples or Enums, or turn "
    "the value into one of them."
)


def _flat(members: list[Node]) -> list[Node]:
    flat: list[Node] = []
    for member in members:
        inner = member.inner if isinstance(member, Alias) else member
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
