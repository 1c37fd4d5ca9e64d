"""A failure as it is recorded, and the error that a recorded failure raises: the same in life and on replay.

- `record` turns an exception into data. It never fails itself, whatever the exception does.
- `raised` makes a `StepFailed` of the data. Where the recorded type is a built-in, or the workflow named it in
  `raises=`, the error is an instance of that type too, through a class that derives from both and is made once.
- A stored name is compared with the names of types that are at hand. It never imports anything.
"""

from __future__ import annotations

import builtins
import traceback
import types
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from .codec import plan
from .errors import (
    CallFailed,
    ChildFailed,
    LimitExceeded,
    PayloadError,
    StepFailed,
    StepTimedOut,
    quoted,
    restored,
)
from .limits import ERROR_TEXT, Limits
from .retry import add_note, exception_types

CAUSES: Final = 10
"""Errors kept of a chain of causes."""

NOTHING: Final = msgspec.Raw(b"null")
"""No value. Not None: msgspec reads a `Raw | None` as always None."""

_PACKAGE: Final = __file__.rpartition("core")[0]
_OWN: Final = ("step", "type", "message", "attempts", "traceback", "cause")
_DETAIL: Final = Limits(payload=ERROR_TEXT, depth=20)
_anything: Final = plan()


class RecordedError(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error as it is stored.

    type: `ValueError`, or `orders.CardDeclined` with its module. message: its text.
    args, attributes: an array and an object in the codec's form; `null` where they could not be stored.
    kind: what failed: `failed` (the function raised), `timed_out`, `child`, `call`, or `payload` (the result could not
        be stored). status, run_id: how a child ended, and its id.
    """

    type: str
    message: str = ""
    kind: str = "failed"
    attempts: int = 1
    args: msgspec.Raw = NOTHING
    attributes: msgspec.Raw = NOTHING
    traceback: str = ""
    cause: RecordedError | None = None
    status: str = ""
    run_id: str = ""


# --- from an exception to data


def record(
    error: BaseException, *, kind: str = "failed", attempts: int = 1, status: str = "", run_id: str = ""
) -> RecordedError:
    """`error` as data: type, text, args, attributes, traceback and its causes, each bounded."""
    return _recorded(error, set(), kind=kind, attempts=attempts, status=status, run_id=run_id)


_GROUPS: Final[Any] = getattr(builtins, "BaseExceptionGroup", ())
NO_TIME_LEFT: Final = "Its total_timeout has passed."
LAST_OF_ALL: Final = "Its total_timeout would pass before the next attempt."
"""What is recorded of a step whose last attempt, the cause, would be followed by another if there were time."""


def out_of_time(message: str, cause: RecordedError | None = None) -> RecordedError:
    """The record of a step that did not end in time."""
    return RecordedError(type="TimeoutError", message=message, kind="timed_out", cause=cause)


def let_go(error: BaseException) -> None:
    """It is recorded, or nobody wants it: free what the functions that it came through had taken.

    Its traceback holds their frames, of which one often holds the error: only the collector would free them, and by
    then they may be all the memory there is.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            # Not by an assignment: a frozen dataclass would refuse it.
            BaseException.with_traceback(each, None)
            waiting += [each.__cause__, each.__context__]
            if isinstance(each, _GROUPS):
                waiting += each.exceptions


def type_name(kind: type[BaseException]) -> str:
    """The name under which a type is recorded: `ValueError`, `orders.CardDeclined`, `perdure.NonRetryable`."""
    module = kind.__module__
    if module == "builtins":
        return kind.__qualname__
    if module == StepFailed.__module__:
        module = __name__.partition(".")[0]
    return _text(f"{module}.{kind.__qualname__}", 500)


def _recorded(error: BaseException, seen: set[int], **facts: Any) -> RecordedError:
    seen.add(id(error))
    before = getattr(error, "_recorded", None) if isinstance(error, StepFailed) else None
    text = _traceback_of(error)
    if isinstance(before, RecordedError) and isinstance(error, _Both):
        # A step's failure that leaves the workflow as the type it was raised as.
        return msgspec.structs.replace(before, traceback=text, **facts)
    return RecordedError(
        type=type_name(type(error)),
        message=_message_of(error),
        args=_args_of(error),
        attributes=_attributes_of(error),
        traceback=text,
        cause=before if before is not None else _cause_of(error, seen),
        **facts,
    )


def _cause_of(error: BaseException, seen: set[int]) -> RecordedError | None:
    cause = error.__cause__ if error.__cause__ is not None or error.__suppress_context__ else error.__context__
    if cause is None or id(cause) in seen or len(seen) >= CAUSES:
        return None
    return _recorded(cause, seen)


def _message_of(error: BaseException) -> str:
    try:
        return _text(str(error))
    except Exception as broken:
        return f"(its text cannot be shown: __str__ raised {type(broken).__name__})"


def _args_of(error: BaseException) -> msgspec.Raw:
    try:
        return _stored(list(error.args))
    except Exception:
        return NOTHING


def _attributes_of(error: BaseException) -> msgspec.Raw:
    """What an exception holds beside its args, as far as it can be stored."""
    own = {name: value for name, value in vars(error).items() if not name.startswith("_")}
    found = {name: value for name, value in {**_slots(error), **own}.items() if _stored(value) is not NOTHING}
    return _stored(found) if found else NOTHING


def _slots(error: BaseException) -> dict[str, Any]:
    """What built-in types keep outside `__dict__`: the `filename` of an OSError, the `name` of an ImportError."""
    values: dict[str, Any] = {}
    for kind in type(error).__mro__:
        if kind.__module__ != "builtins" or kind in (BaseException, Exception, object):
            continue
        for name, slot in vars(kind).items():
            # `obj` of an AttributeError is whatever the attribute was missing on.
            if isinstance(slot, (types.MemberDescriptorType, types.GetSetDescriptorType)) and name != "obj":
                value = _asked(error, name)
                if value is not None and not name.startswith("_"):
                    values[name] = value
    return values


def _asked(error: BaseException, name: str) -> Any:
    try:
        return getattr(error, name)
    except Exception:
        return None


def _stored(value: Any) -> msgspec.Raw:
    try:
        return msgspec.Raw(_anything.roundtrip(value, "an error's values", _DETAIL)[0])
    except Exception:
        return NOTHING


def _traceback_of(error: BaseException) -> str:
    """The traceback as Python prints it, without Perdure's own frames above the user's first one."""
    try:
        trace = traceback.TracebackException.from_exception(error)
        trace.__cause__ = trace.__context__ = None
        first = next((at for at, frame in enumerate(trace.stack) if not frame.filename.startswith(_PACKAGE)), 0)
        del trace.stack[:first]
        lines = list(trace.format(chain=False))
        notes = [f"{note}\n" for note in getattr(error, "__notes__", ()) if isinstance(note, str)]
        lines += [note for note in notes if note not in lines]  # Python 3.10 does not print them.
        return _text("".join(lines), tail=True)
    except Exception:
        return ""


def _text(text: str, size: int = ERROR_TEXT, *, tail: bool = False) -> str:
    """At most `size` bytes of `text`, without lone surrogates. tail: keep the end rather than the beginning."""
    if len(text) * 4 > size or not text.isascii():
        data = (text[-size:] if tail else text[:size]).encode("utf-8", "backslashreplace")
        if len(data) > size or len(text) > size:
            # The mark takes 3 bytes.
            kept = data[-(size - 3) :] if tail else data[: size - 3]
            return ("…{}" if tail else "{}…").format(kept.decode("utf-8", "ignore"))
        return data.decode()
    return text


# --- from data to an exception


class _Both:
    """Marks the classes that derive from `StepFailed` and from the type that was raised."""


def raised(
    recorded: RecordedError,
    step: str,
    raises: type[BaseException] | Iterable[type[BaseException]] = (),
    *,
    attempts: int | None = None,
) -> StepFailed:
    """The error that a failed step raises in the workflow.

    step: its id. raises: types named by the author. attempts: instead of the recorded number.
    """
    return _raised(recorded, step, exception_types(raises, "raises="), attempts or recorded.attempts)


def _raised(recorded: RecordedError, step: str, raises: tuple[type[BaseException], ...], attempts: int) -> StepFailed:
    cause = None if recorded.cause is None else _raised(recorded.cause, step, raises, recorded.cause.attempts)
    plain = _plain(recorded, step, attempts, cause)
    original = _original(recorded, raises)
    error = plain
    if original is not None and not isinstance(plain, original):
        error = _as_both(plain, original, recorded) or plain
    error.__dict__["_recorded"] = recorded
    error.__cause__ = cause
    return error


def _plain(recorded: RecordedError, step: str, attempts: int, cause: StepFailed | None) -> StepFailed:
    facts: dict[str, Any] = {"attempts": attempts, "traceback": recorded.traceback, "cause": cause}
    if recorded.kind == "timed_out":
        return StepTimedOut(step, recorded.type, recorded.message, **facts)
    if recorded.kind == "child":
        status = recorded.status or "failed"
        return ChildFailed(step, recorded.type, recorded.message, status=status, run_id=recorded.run_id, **facts)
    if recorded.kind == "call":
        answer = _lifted(recorded.attributes, {})
        known = {name: answer[name] for name in ("status", "headers", "body") if name in answer}
        return CallFailed(step, recorded.type, recorded.message, **{"status": 0, **known}, **facts)
    if recorded.kind in ("failed", "payload"):
        return StepFailed(step, recorded.type, recorded.message, **facts)
    raise ValueError(
        f"A recorded error of kind {recorded.kind!r} is unknown. Known are failed, timed_out, child, call and payload. "
        "It was written by a later version of Perdure: use that one."
    )


def _original(recorded: RecordedError, raises: tuple[type[BaseException], ...]) -> type[Exception] | None:
    """The type at hand that the recorded name means, if an error may be made of it."""
    found: Any = None
    if recorded.kind == "payload":
        found = LimitExceeded if recorded.type == type_name(LimitExceeded) else PayloadError
    elif "." not in recorded.type:
        found = vars(builtins).get(recorded.type)
    if found is None:
        found = next((kind for kind in raises if type_name(kind) == recorded.type), None)
    if not isinstance(found, type) or not issubclass(found, Exception) or issubclass(found, _NEVER):
        return None
    return found


# Python gives these a meaning of its own when they are raised, or keeps them for itself.
_NEVER: Final = tuple(
    getattr(builtins, name)
    for name in ("BaseExceptionGroup", "MemoryError", "StopIteration", "StopAsyncIteration")
    if hasattr(builtins, name)
)
_both: dict[tuple[type[StepFailed], type[Exception]], type[Any] | None] = {}


def _class_of_both(base: type[StepFailed], original: type[Exception]) -> type[Any] | None:
    key = (base, original)
    if key not in _both:
        names = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "__reduce__": lambda error: (_again, (base, original, error.args, dict(error.__dict__), _slots(error))),
        }
        try:
            _both[key] = types.new_class(
                original.__name__, (original, base, _Both), {}, lambda body: body.update(names)
            )
        except Exception:
            _both[key] = None  # A type that refuses to be derived from.
    return _both[key]


def _again(
    base: type[StepFailed],
    original: type[Exception],
    args: tuple[Any, ...],
    values: dict[str, Any],
    slots: dict[str, Any],
) -> BaseException:
    """What pickle and copy call to make such an error anew."""
    kind: type[BaseException] = _class_of_both(base, original) or base
    error = restored(kind, args, values)
    for name, value in slots.items():
        _give(error, name, value)
    return error


def _as_both(plain: StepFailed, original: type[Exception], recorded: RecordedError) -> StepFailed | None:
    kind = _class_of_both(type(plain), original)
    if kind is None:
        return None
    args = tuple(_lifted(recorded.args, [recorded.message]))
    attributes = _lifted(recorded.attributes, {})
    try:
        error = original.__new__(kind, *args)
        if isinstance(original.__init__, types.WrapperDescriptorType):
            # Some built-in types take their args apart here (UnicodeDecodeError); no code of the user's runs.
            original.__init__(error, *args)
        error.args = args
        for name, value in vars(plain).items():
            if not (name in _OWN and hasattr(original, name)):
                error.__dict__[name] = value
        for name, value in attributes.items():
            _give(error, name, value)
        str(error)
    except Exception:
        return None  # A type that refuses to be made this way.
    if not isinstance(error, StepFailed):
        return None
    add_note(error, f"Step {quoted(plain.step)} failed after {plain.attempts} attempt{'s'[: plain.attempts != 1]}.")
    return error


def _give(error: BaseException, name: str, value: Any) -> None:
    try:
        setattr(error, name, value)
    except Exception:
        return  # Read-only, or computed by the class from something else.


def _lifted(raw: msgspec.Raw, otherwise: Any) -> Any:
    try:
        value = _anything.decode(bytes(raw), "an error's values")
    except PayloadError:
        return otherwise
    return value if type(value) is type(otherwise) else otherwise
