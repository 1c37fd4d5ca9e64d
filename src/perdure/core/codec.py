"""Values and their stored form, which is JSON text: readable by people and by other languages.

- With an annotation the type decides. Without one, or inside `Any`, JSON's own types are written as they are and the
  other plain ones as an object with one key, a *tag*, from a closed list.
- Code always gets the decoded stored value, the first time too: `roundtrip` gives both.
- A value comes back equal and of its declared type, or it is refused before anything is written. So the last act of
  the thorough way is to write the decoded value again and to compare the two texts.

Plan: `plan(annotation)` compiles an annotation once. The quick way is msgspec alone: write, read, compare. Where the
comparison cannot be trusted or fails, the thorough way walks the value beside a tree of nodes (`nodes.py`).
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

import msgspec

from .errors import LimitExceeded, PayloadError
from .limits import Limits
from .nodes import ANY, Node, reachable
from .plain import Misfit, name_of, start_of
from .shapes import shape

DEFAULT_LIMITS: Final = Limits()

_write: Final = msgspec.json.Encoder().encode
_read: Final = msgspec.json.Decoder().decode
_canonical: Final = msgspec.json.Encoder(order="deterministic").encode
_BRACKETS: Final = bytes.maketrans(b"{}", b"[]")
_ALL_BUT_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))


# --- values


class Plan:
    """How the values of one annotation are written and read. Made by `plan`; never changes."""

    __slots__ = ("_decode", "_floats", "_node", "_quick", "_tags", "annotation")

    def __init__(self, annotation: Any, node: Node) -> None:
        nodes = reachable(node)
        self.annotation = annotation
        self._node = node
        self._tags = any(each.tags for each in nodes)
        # A whole float may arrive as an int, and equal inputs must have equal texts: what was read is written again.
        self._floats = any(each.floats for each in nodes)
        self._decode = _decoder(annotation, node) if all(each.native for each in nodes) else None
        self._quick = self._decode is not None
        suspects = {id(each) for each in nodes if each.suspect}
        for each in nodes:
            each.watched = bool(suspects) and any(id(below) in suspects for below in reachable(each))

    def quickly(self, value: Any, limits: Limits) -> tuple[bytes, Any] | None:
        """As `roundtrip`, for most values in a fraction of the time; None where the thorough way has to look."""
        if not self._quick:
            return None
        try:
            data = _write(value)
            if len(data) > limits.payload or (self._tags and b'"$' in data):
                return None
            decoded = self._decode(data)  # type: ignore[misc]  # quick: there is a decoder
            # Equal is enough: the decoder gives the declared types, and what JSON cannot tell apart from
            # them (a tuple, bytes, a date inside Any) is not equal to what came back.
            if decoded != value or (self._node.watched and not self._node.trusts(value)):
                return None
            if self._floats:
                data = _write(decoded)
            if data.count(b"[") + data.count(b"{") > limits.depth:
                return None
            return data, decoded
        except Exception:
            # Whatever the quick way stumbled over, the thorough way finds and names, or does right.
            return None

    def roundtrip(self, value: Any, what: str, limits: Limits = DEFAULT_LIMITS) -> tuple[bytes, Any]:
        """The stored text of `value`, and what code will see of it."""
        return self.quickly(value, limits) or self._thorough(value, what, limits)

    def decode(self, data: bytes | str, what: str) -> Any:
        """The value of a stored text. Raises PayloadError, also where the text is no JSON."""
        try:
            if self._decode is not None and not (self._tags and _may_hold_tags(data)):
                try:
                    return self._decode(data)
                except msgspec.ValidationError:
                    pass  # A form that only the nodes know (an offset with seconds), or a misfit they can name.
            return self._node.lift(_read(data))
        except Misfit as misfit:
            raise PayloadError(
                f"{start_of(what)} does not fit{misfit.where(self.annotation)}. {misfit.why} "
                "Send what the annotation says, or keep the annotation compatible with what is stored.",
                what=what,
            ) from None
        except RecursionError:
            raise _too_deep(what, "more levels than this process can follow") from None
        except (msgspec.MsgspecError, ValueError) as error:
            raise PayloadError(
                f"{start_of(what)} is not the JSON text of a value. {error}. Check where the text came from.",
                what=what,
            ) from None

    def _thorough(self, value: Any, what: str, limits: Limits) -> tuple[bytes, Any]:
        try:
            data = _write(self._node.lower(value))
        except Misfit as misfit:
            raise PayloadError(
                f"{start_of(what)} cannot be stored{misfit.where(self.annotation)}. {misfit.why} {misfit.advice}",
                what=what,
            ) from None
        except RecursionError:
            if _contains_itself(value):
                raise PayloadError(
                    f"{start_of(what)} cannot be stored. It contains itself, and a text of it would never end. "
                    "Store the parts, or the ids by which they refer to each other.",
                    what=what,
                ) from None
            raise _too_deep(what, f"more than the {limits.depth} allowed") from None
        except UnicodeEncodeError as error:
            raise PayloadError(
                f"{start_of(what)} has a str with a lone surrogate, U+{ord(error.object[error.start]):04X}. "
                "That is half a character and has no UTF-8 form. Decode the text properly, or pass it as bytes.",
                what=what,
            ) from None
        except (TypeError, ValueError, OverflowError) as error:
            raise PayloadError(
                f"{start_of(what)} cannot be stored. {error}. Turn it into plain values first.", what=what
            ) from error
        check(data, what, limits)
        decoded = self.decode(data, what)
        self._check_same(data, decoded, what)
        return data, decoded

    def _check_same(self, data: bytes, decoded: Any, what: str) -> None:
        """Refuse a value whose class changes or drops something when it is made anew."""
        try:
            again = _write(self._node.lower(decoded))
        except Exception as error:
            again = repr(error).encode(errors="replace")
        if again != data:
            raise PayloadError(
                f"{start_of(what)} would not come back as it was. Read back and written again as "
                f"{name_of(self.annotation)}, {_cut(data)} becomes {_cut(again)}. "
                "Make the class keep what it is given, or return plain values.",
                what=what,
            )


_plans: dict[Any, Plan] = {}


def plan(annotation: Any = Any, *, what: str = "a value") -> Plan:
    """The plan of an annotation, made at its first use. An annotation that cannot be stored is a PayloadError."""
    try:
        return _plans[annotation]
    except KeyError:
        made = _plans[annotation] = _compiled(annotation, what)
        return made
    except TypeError:  # Not hashable: an Annotated with a list in it, or no type at all.
        return _compiled(annotation, what)


def roundtrip(value: Any, annotation: Any = Any, *, what: str, limits: Limits = DEFAULT_LIMITS) -> tuple[bytes, Any]:
    """The stored text of a value, and what code will see of it.

    what: how the value is called in errors ("the result of step 'charge'").
    Raises PayloadError for its form, LimitExceeded for its size or depth.
    """
    return plan(annotation, what=what).roundtrip(value, what, limits)


def encode(value: Any, *, annotation: Any = Any, what: str, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The stored text of a value; see `roundtrip`."""
    return plan(annotation, what=what).roundtrip(value, what, limits)[0]


def decode(data: bytes | str, annotation: Any = Any, *, what: str) -> Any:
    """The value of a stored text. Raises PayloadError where the two do not fit."""
    return plan(annotation, what=what).decode(data, what)


def check(data: bytes | str, what: str, limits: Limits = DEFAULT_LIMITS) -> None:
    """Refuse JSON text that is longer or deeper than allowed; for text that comes from outside, too."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogatepass")
    if len(data) > limits.payload:
        raise _too_big(what, len(data), limits)
    if data.count(b"[") + data.count(b"{") > limits.depth:
        _check_depth(data, what, limits)


# --- digests


def digest64(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """16 hex digits that tell one call's arguments from another's; None if they cannot be written.

    The order of sets and of keys does not count. It serves a warning only: it need not be exact, and it is cheap.
    """
    try:
        return hashlib.blake2b(_canonical((args, kwargs)), digest_size=8).hexdigest()
    except Exception:
        # Sessions, clients, anything may be passed to a local step.
        return None


def digest128(stored: bytes | str) -> str:
    """32 hex digits of a stored value: equal for texts that differ only in blanks and the order of keys."""
    return hashlib.blake2b(_canonical(_read(stored)), digest_size=16).hexdigest()


# --- codec chain


class Codec(Protocol):
    """Turns a stored text into other bytes and back: compression, encryption, offloading."""

    @property
    def name(self) -> str:
        """Kept beside the data: how the way back is found."""

    def encode(self, data: bytes, /) -> bytes:
        """The bytes to store."""

    def decode(self, data: bytes, /) -> bytes:
        """What `encode` was given."""


class _Wrapped(msgspec.Struct, forbid_unknown_fields=True):
    encoded: list[str] = msgspec.field(name="$encoded")
    data: bytes


_read_wrapped: Final = msgspec.json.Decoder(_Wrapped).decode


def wrap(data: bytes, codecs: Sequence[Codec]) -> bytes:
    """`data` after all codecs, first to last, as JSON text again; without codecs `data` itself."""
    if not codecs:
        return data
    for codec in codecs:
        data = codec.encode(data)
    return _write({"$encoded": [codec.name for codec in codecs], "data": base64.b64encode(data).decode()})


def unwrap(data: bytes | str, codecs: Iterable[Codec] = (), *, what: str) -> bytes | str:
    """What `wrap` was given. A text that no codec has touched comes back as it is.

    codecs: all that are known, in any order. An unknown name is a PayloadError.
    """
    if (b'"$encoded"' if isinstance(data, bytes) else '"$encoded"') not in data:  # type: ignore[operator]  # same kind
        return data
    try:
        wrapped = _read_wrapped(data)
    except msgspec.MsgspecError:
        return data  # A value that has such a text somewhere inside.
    known = {codec.name: codec for codec in codecs}
    inner = wrapped.data
    for name in reversed(wrapped.encoded):
        if name not in known:
            raise PayloadError(
                f'{start_of(what)} was stored through the codec "{name}". '
                f"This process knows {', '.join(sorted(known)) or 'no codec'}. Give it the writer's codec=.",
                what=what,
            )
        inner = known[name].decode(inner)
    return inner


# --- helpers


def _compiled(annotation: Any, what: str) -> Plan:
    if annotation is Any:
        return Plan(Any, ANY)
    try:
        return Plan(annotation, shape(annotation))
    except Misfit as misfit:
        raise PayloadError(
            f"{start_of(what)} is annotated as {name_of(annotation)}, which cannot be stored. "
            f"{misfit.why} {misfit.advice}",
            what=what,
        ) from None


def _decoder(annotation: Any, node: Node) -> Any:
    if node is ANY:
        return _read
    try:
        return msgspec.json.Decoder(annotation).decode
    except Exception:
        return None  # Something msgspec does not do: the nodes read it.


def _may_hold_tags(data: bytes | str) -> bool:
    # Other writers may escape the dollar sign.
    if isinstance(data, str):
        return '"$' in data or "\\u0024" in data
    return b'"$' in data or b"\\u0024" in data


def _check_depth(data: bytes, what: str, limits: Limits) -> None:
    """Refuse text with more than `limits.depth` levels.

    Only the brackets are kept; each round takes away the innermost pairs, so there are as many rounds as levels.
    """
    brackets = data.translate(_BRACKETS, _ALL_BUT_BRACKETS)
    for _ in range(limits.depth):
        shorter = brackets.replace(b"[]", b"")
        if not shorter:
            return
        if len(shorter) == len(brackets):
            break
        brackets = shorter
    # Too deep, or brackets inside strings have confused the count: count again without the strings.
    levels = deepest = 0
    in_string = escaped = False
    for byte in data:
        if in_string:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                in_string = False
        elif byte == 0x22:
            in_string = True
        elif byte in b"[{":
            levels += 1
            deepest = max(deepest, levels)
        elif byte in b"]}":
            levels -= 1
    if deepest > limits.depth:
        raise LimitExceeded(
            f"{start_of(what)} is nested {deepest} levels deep. {limits.depth} are allowed. "
            "Store it flatter, or raise Limits(depth=).",
            what=what,
            limit=limits.depth,
            actual=deepest,
        )


def _too_big(what: str, size: int, limits: Limits) -> LimitExceeded:
    return LimitExceeded(
        f"{start_of(what)} is {size:,} bytes of JSON. {limits.payload:,} are allowed for one value. "
        "Keep large data in a file or a table and pass its name, or raise Limits(payload=).",
        what=what,
        limit=limits.payload,
        actual=size,
    )


def _too_deep(what: str, how_deep: str) -> LimitExceeded:
    return LimitExceeded(f"{start_of(what)} is nested too deeply. It has {how_deep}. Store it flatter.", what=what)


def _contains_itself(value: Any) -> bool:
    """Whether some object can be reached from itself."""
    path: list[tuple[Any, Any]] = [(value, iter(_children(value)))]
    on_path, done = {id(value)}, set[int]()
    while path:
        parent, children = path[-1]
        for child in children:
            if id(child) in on_path:
                return True
            if id(child) not in done:
                on_path.add(id(child))
                path.append((child, iter(_children(child))))
                break
        else:
            on_path.discard(id(parent))
            done.add(id(parent))
            path.pop()
    return False


def _children(value: Any) -> list[Any]:
    if isinstance(value, (str, bytes, int, float, type(None))):
        return []
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return list(value)
    names = getattr(type(value), "__struct_fields__", None) or getattr(value, "__dict__", None) or ()
    return [getattr(value, name, None) for name in names]


def _cut(data: bytes) -> str:
    text = data.decode("utf-8", "replace")
    return text if len(text) <= 200 else text[:200] + "…"
