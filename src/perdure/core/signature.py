"""What a function takes and gives: its input in one normal form, and the plans of its values.

An input is stored as `[[positional…], {by name…}]`. What can go by name does, in the order of the signature; defaults
are not filled in, so that a changed default reaches runs that did not set it. Digests and key paths see this form.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
import types
import typing
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final, NamedTuple

import msgspec

from .codec import DEFAULT_LIMITS, Plan, check, plan
from .errors import PayloadError, quoted
from .limits import Limits


class Parameter(msgspec.Struct, frozen=True, omit_defaults=True):
    """One parameter as it is announced to clients that have no code.

    kind: `only` (positional only), `any` (either way), `named` (keyword only), `rest` (`*args`), `more` (`**kwargs`).
    """

    name: str
    kind: str = "any"
    required: bool = True


MOST_FORMS: Final = 256
"""Forms of calls that a signature remembers; `**kwargs` could make any number."""


class Argument(NamedTuple):
    """Where an argument of a call stands, how its name is written (empty if it goes by position), what it is."""

    place: int
    label: bytes
    plan: Plan
    what: str


Form = tuple[Argument, ...]


class Signature:
    """The parameters of one function after its context, and the plans of their values."""

    __slots__ = (
        "_any",
        "_by_name",
        "_context",
        "_forms",
        "_known",
        "_more",
        "_named",
        "_only",
        "_places",
        "_plans",
        "_rest",
        "name",
        "parameters",
    )

    def __init__(
        self, name: str, parameters: Sequence[Parameter], plans: Mapping[str, Plan] | None = None, *, context: str = ""
    ) -> None:
        """name: of the function, for errors. plans: by parameter; what has none is `Any`.

        context: the name of the parameter in front of these, which no argument can have.
        """
        self.name = name
        self._context = context
        self.parameters = tuple(parameters)
        self._plans = dict(plans or {})
        self._only = [each for each in parameters if each.kind == "only"]
        self._any = [each for each in parameters if each.kind == "any"]
        self._named = [each for each in parameters if each.kind == "named"]
        self._rest = next((each.name for each in parameters if each.kind == "rest"), None)
        self._more = next((each.name for each in parameters if each.kind == "more"), None)
        self._by_name = [each.name for each in (*self._any, *self._named)]
        self._places = [each.name for each in (*self._only, *self._any)]
        self._known = frozenset(self._by_name)
        # How calls that are right were written, by the number of positional arguments and the names of the others.
        self._forms: dict[tuple[int, tuple[str, ...]], Form] = {}

    def normalise(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments in their one form. A TypeError names the argument that is wrong, missing or unknown."""
        before, slots = len(self._only), len(self._only) + len(self._any)
        if len(args) > slots and self._rest is None:
            raise self._wrong(f"{slots} by position at most, {len(args)} were given", "Leave out what is too much")
        given = dict(zip((each.name for each in self._any), args[before:], strict=False))
        for name in kwargs:
            if name in given:
                raise self._wrong(f"{quoted(name)} was given twice, by position and by name", "Give it once")
            if name not in self._known and self._more is None:
                raise self._unknown(name)
            if name == self._context:
                raise self._wrong(f"{quoted(name)} is its context", "Give the argument another name")
        for at, each in enumerate(self._only):
            if each.required and at >= len(args):
                raise self._missing(each.name)
        for each in (*self._any, *self._named):
            if each.required and each.name not in given and each.name not in kwargs:
                raise self._missing(each.name)
        if len(args) > slots:
            # `*args` is filled: everything before it can only go by position.
            return list(args), self._ordered(kwargs)
        return list(args[:before]), self._ordered({**given, **kwargs})

    def encode(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, limits: Limits = DEFAULT_LIMITS) -> bytes:
        """The stored input of a call: checked against the signature (TypeError) and the types (PayloadError)."""
        form = self._form(args, kwargs)
        given = (*args, *kwargs.values())
        items = [
            argument.label + argument.plan.roundtrip(given[argument.place], argument.what, limits)[0]
            for argument in form
        ]
        by_position = sum(not argument.label for argument in form)
        data = b"[[" + b",".join(items[:by_position]) + b"],{" + b",".join(items[by_position:]) + b"}]"
        check(data, f"the input of {self.name}", limits)
        return data

    def _form(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Form:
        """How the arguments of a call are written, in order; a TypeError if they do not fit."""
        key = (len(args), tuple(kwargs))
        form = self._forms.get(key)
        if form is None:
            # Places stand for the values: `normalise` only moves them.
            places = dict(zip(kwargs, range(len(args), len(args) + len(kwargs)), strict=True))
            positional, by_name = self.normalise(range(len(args)), places)
            form = (
                *(
                    Argument(place, b"", self._plan(at), f"argument {at + 1} of {self.name}")
                    for at, place in enumerate(positional)
                ),
                *(
                    Argument(
                        place,
                        msgspec.json.encode(name) + b":",
                        self._plan(name),
                        f"argument {quoted(name)} of {self.name}",
                    )
                    for name, place in by_name.items()
                ),
            )
            if len(self._forms) < MOST_FORMS:
                self._forms[key] = form
        return form

    def rewritten(self, data: bytes) -> bytes:
        """A stored input of somebody who did not know the signature, in its one form; as it is if it does not fit."""
        args, kwargs = _parts.decode(data)
        try:
            return msgspec.json.encode(self.normalise(args, kwargs))
        except TypeError:
            return data  # whoever has the code says what is wrong with it

    def decode(self, data: bytes | str) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a stored input. A PayloadError names what no longer fits the signature."""
        try:
            positional, by_name = _read_input(data)
        except msgspec.MsgspecError as error:
            raise PayloadError(
                f"The input of {self.name} is no stored input. {error}. "
                'It must be JSON of the form [[positional…], {"name": value, …}].',
                what=f"the input of {self.name}",
            ) from None
        try:
            # First the form, then each value.
            form = self._form(positional, by_name)
        except TypeError as error:
            raise PayloadError(str(error), what=f"the input of {self.name}") from None
        read: list[Any] = [*positional, *by_name.values()]
        for argument in form:
            read[argument.place] = argument.plan.decode(bytes(read[argument.place]), argument.what)
        count = len(positional)
        return read[:count], dict(zip(by_name, read[count:], strict=True))

    def _plan(self, place: int | str) -> Plan:
        if isinstance(place, int):
            name = self._places[place] if place < len(self._places) else f"*{self._rest}"
        else:
            name = place if place in self._known else f"**{self._more}"
        return self._plans.get(name) or _ANY

    def _ordered(self, given: Mapping[str, Any]) -> dict[str, Any]:
        ordered = {name: given[name] for name in self._by_name if name in given}
        # What `**kwargs` takes has no order of its own, and equal inputs must have equal texts.
        ordered.update((name, given[name]) for name in sorted(given) if name not in self._known)
        return ordered

    def _wrong(self, what: str, remedy: str) -> TypeError:
        takes = ", ".join(_shown(each) for each in self.parameters) or "no arguments"
        return TypeError(f"{self.name} was given arguments that do not fit: {what}. It takes {takes}. {remedy}.")

    def _missing(self, name: str) -> TypeError:
        return self._wrong(f"{quoted(name)} is missing", f"Pass {quoted(name)}")

    def _unknown(self, name: str) -> TypeError:
        close = difflib.get_close_matches(name, self._by_name, 1)
        if any(each.name == name for each in self._only):
            return self._wrong(f"{quoted(name)} goes by position only", "Pass it by position")
        remedy = f"Write {quoted(close[0])} if you meant that" if close else f"Leave out {quoted(name)}"
        return self._wrong(f"there is no parameter {quoted(name)}", remedy)


_ANY: Final = plan()
_read_input: Final = msgspec.json.Decoder(tuple[list[msgspec.Raw], dict[str, msgspec.Raw]]).decode


def signature_of(function: Callable[..., Any], *, name: str = "", context: bool = True) -> Signature:
    """The signature of a function, its annotations resolved and compiled.

    name: for errors, else the function's own. context: whether its first parameter is the context, which is no input.
    Raises PayloadError for an annotation that cannot be stored or resolved.
    """
    name = name or function_name(function)
    try:
        parameters = list(_signature(function).parameters.values())
    except (ValueError, TypeError):
        # Some functions written in C do not tell.
        return Signature(name, [Parameter("args", "rest", False), Parameter("kwargs", "more", False)])
    taken = ""
    if context:
        if not parameters or parameters[0].kind not in (inspect.Parameter.POSITIONAL_ONLY, _EITHER, _REST):
            raise TypeError(
                f"{name} has no parameter for the context. A workflow's first parameter is its context. "
                f"Write `def {name}(ctx, …)`."
            )
        taken = parameters[0].name if parameters[0].kind is _EITHER else ""
        parameters = parameters if parameters[0].kind is _REST else parameters[1:]
    hints = _Hints(function)
    facts, plans = [], {}
    for each in parameters:
        facts.append(Parameter(each.name, _KINDS[each.kind], each.default is each.empty and _KINDS[each.kind] in _MUST))
        hint = hints.of(each.name, f"parameter {quoted(each.name)} of {name}")
        if hint is not Any:
            key = {"rest": f"*{each.name}", "more": f"**{each.name}"}.get(facts[-1].kind, each.name)
            plans[key] = plan(hint, what=f"parameter {quoted(each.name)} of {name}")
    return Signature(name, facts, plans, context=taken)


def result_plan(function: Callable[..., Any], *, what: str = "") -> Plan:
    """The plan of what a function returns: its return annotation, `Any` without one. Cheap to ask again.

    Of a coroutine function it is what is awaited, of a generator what it returns at its end, of a class its instances.
    Raises PayloadError for an annotation that cannot be stored or resolved.
    """
    # A bound method is a new object each time it is asked for; its function stays.
    key = function.__func__ if isinstance(function, types.MethodType) else function
    try:
        known = _results.get(key)
    except TypeError:
        known = None  # Cannot be hashed, or not be referred to weakly.
    if known is not None:
        return known
    made = _result_plan(function, what or f"the result of {function_name(function)}")
    try:
        _results[key] = made
    except TypeError:
        pass
    return made


def function_name(function: Any) -> str:
    """What a function is called in errors."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__qualname__).rpartition("<locals>.")[2]


# --- annotations


_EITHER: Final = inspect.Parameter.POSITIONAL_OR_KEYWORD
_REST: Final = inspect.Parameter.VAR_POSITIONAL
_KINDS: Final = {
    inspect.Parameter.POSITIONAL_ONLY: "only",
    _EITHER: "any",
    inspect.Parameter.KEYWORD_ONLY: "named",
    _REST: "rest",
    inspect.Parameter.VAR_KEYWORD: "more",
}
_MUST: Final = ("only", "any", "named")
_results: weakref.WeakKeyDictionary[Callable[..., Any], Plan] = weakref.WeakKeyDictionary()
_NO_RESULT: Final = tuple(
    getattr(typing, name) for name in ("NoReturn", "Never", "Self", "LiteralString") if hasattr(typing, name)
)


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    if sys.version_info >= (3, 14):
        import annotationlib

        # Annotations that cannot be evaluated are none of the form's business.
        return inspect.signature(function, annotation_format=annotationlib.Format.FORWARDREF)
    return inspect.signature(function)


def _result_plan(function: Callable[..., Any], what: str) -> Plan:
    if isinstance(function, type):
        return plan(function, what=what)
    hint = _Hints(function).of("return", what)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Generator or hint is Generator:
        hint = args[2] if len(args) == 3 else Any
    elif origin is Coroutine:
        hint = args[2]
    elif origin is Awaitable:
        hint = args[0]
    elif inspect.isgeneratorfunction(_underlying(function)):
        hint = Any  # Annotated as an Iterator, which does not say what it returns.
    if isinstance(hint, typing.TypeVar) or hint in _NO_RESULT:
        return _ANY
    return plan(hint, what=what)


def _underlying(function: Any) -> Any:
    """The function that has the annotations."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, types.MethodType):
            function = function.__func__
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif not isinstance(function, (types.FunctionType, type)) and hasattr(type(function), "__call__"):  # noqa: B004 - we want the method itself
            method = type(function).__call__
            if not isinstance(method, types.FunctionType):
                return function
            function = method
        else:
            return function


class _Hints:
    """The annotations of one function, each resolved alone: a name that is missing spoils only its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = _underlying(function)
        self._raw = _annotations(self._function)

    def of(self, name: str, what: str) -> Any:
        hint = self._raw.get(name, Any)
        if isinstance(hint, (typing.ParamSpecArgs, typing.ParamSpecKwargs)):
            return Any
        if isinstance(hint, type) or hint is Any:
            return hint
        holder = types.SimpleNamespace(__annotations__={name: hint})
        try:
            return typing.get_type_hints(holder, self._globals(), self._locals(), include_extras=True)[name]
        except Exception as error:
            raise PayloadError(
                f"The annotation of {what} cannot be resolved. {type(error).__name__}: {error}. Import the name "
                "outside `if TYPE_CHECKING`, or define it at the top of the module; for a step, pass returns= instead.",
                what=what,
            ) from None

    def _globals(self) -> dict[str, Any]:
        return getattr(self._function, "__globals__", {})

    def _locals(self) -> dict[str, Any]:
        """What the function's own code takes from the functions around it."""
        found: dict[str, Any] = {}
        code, cells = getattr(self._function, "__code__", None), getattr(self._function, "__closure__", None)
        if code is not None and cells:
            for name, cell in zip(code.co_freevars, cells, strict=True):
                try:
                    found[name] = cell.cell_contents
                except ValueError:
                    continue  # Not set yet.
        return found


def _annotations(function: Any) -> dict[str, Any]:
    if sys.version_info >= (3, 14):
        import annotationlib

        try:
            return annotationlib.get_annotations(function, format=annotationlib.Format.FORWARDREF)
        except TypeError:
            return {}
    return dict(getattr(function, "__annotations__", None) or {})


def _shown(parameter: Parameter) -> str:
    text = {"rest": "*", "more": "**"}.get(parameter.kind, "") + parameter.name
    return text if parameter.required or text.startswith("*") else f"{text} (optional)"


_parts: Final[msgspec.json.Decoder[tuple[list[msgspec.Raw], dict[str, msgspec.Raw]]]] = msgspec.json.Decoder(
    tuple[list[msgspec.Raw], dict[str, msgspec.Raw]]
)

ANY_CALL: Final = Signature(
    "a workflow whose code is elsewhere", [Parameter("args", "rest", False), Parameter("kwargs", "more", False)]
)
"""Takes everything, and leaves it as it is."""


def announced_signature(name: str, announced: Mapping[str, Any] | None) -> Signature:
    """What a worker has announced of a function: its parameters without their types."""
    return Signature(name, [Parameter(**each) for each in (announced or {}).get("parameters", ())])


def announced_timeout(announced: Mapping[str, Any] | None) -> timedelta | None:
    """How long a run of it may take, as its worker has announced."""
    timeout = (announced or {}).get("timeout")
    return None if timeout is None else timedelta(microseconds=timeout)
