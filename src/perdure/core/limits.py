"""How large things may be, and what an id or a name may look like: the same at every entry point."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from .errors import LimitExceeded, quoted

ID_LENGTH: Final = 255
"""Characters in an id: of a run, a step, a message, a key."""
NAME_LENGTH: Final = 255
"""Characters in a name: of a workflow, an activity, a signal, a queue, a namespace."""
ERROR_TEXT: Final = 16 * 1024
"""Bytes kept of an error's text or traceback."""
RESERVED_MESSAGE_IDS: Final = "perdure:"
"""Ids that begin so are derived by the engine; a sender's own would collide with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one value, one history, one mailbox and one activation of code may use.

    payload: bytes of one stored value; default 2,000,000. depth: levels of nesting in it; default 100. Beyond either:
        LimitExceeded.
    history_warn, history_stop: events of one run at which it is logged, default 10,000, and at which it fails,
        default 50,000.
    mailbox: unread messages of one run; default 10,000. Beyond: LimitExceeded for the sender.
    busy: seconds of workflow code without rest; default 10. Beyond: it is stopped, as if it had killed its worker.
    ValueError for what is no positive number.
    """

    payload: int = 2_000_000
    depth: int = 100
    history_warn: int = 10_000
    history_stop: int = 50_000
    mailbox: int = 10_000
    busy: float = 10

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kinds, named = ((int, float), "number") if field.name == "busy" else ((int,), "whole number")
            if not isinstance(value, kinds) or isinstance(value, bool) or not value > 0:
                raise ValueError(
                    f"Limits({field.name}={value!r}) is not a positive number. A limit of nothing would refuse "
                    f"everything. Leave it out for the default, or give a {named} above 0."
                )


def limits_of(given: Limits | None) -> Limits:
    """What `limits=` says; the defaults if it says nothing."""
    if given is None:
        return Limits()
    if not isinstance(given, Limits):
        raise TypeError(
            f"limits= must be a Limits. {type(given).__name__} was given. Write limits=Limits(payload=5_000_000), with "
            "only what differs from the defaults."
        )
    return given


def check_id(text: str, what: str) -> str:
    """`text` if it can be an id: 1 to 255 printable characters. what: how the caller calls it ("the run id")."""
    return _checked(text, what, ID_LENGTH)


def check_name(text: str, what: str) -> str:
    """`text` if it can be a name: 1 to 255 printable characters. what: how the caller calls it."""
    return _checked(text, what, NAME_LENGTH)


def check_reason(text: str) -> str:
    """`text` if it can be the reason of a cancel or terminate: any text."""
    if not isinstance(text, str):
        raise TypeError(
            f"The reason must be a str. {type(text).__name__} was given. Whoever waits for the run reads it: say it in "
            "words, or leave it out."
        )
    return text


def check_message_id(text: str, what: str = "message_id=") -> str:
    """`text` if a sender may use it as the id of a message."""
    if _checked(text, what, ID_LENGTH).startswith(RESERVED_MESSAGE_IDS):
        raise ValueError(
            f"{_capital(what)} {quoted(text)} is reserved. Ids that begin with {quoted(RESERVED_MESSAGE_IDS)} are made "
            "by the engine, and a message with such an id could be taken for one of its own. Choose another beginning."
        )
    return text


def _checked(text: str, what: str, length: int) -> str:
    if not isinstance(text, str):
        raise TypeError(
            f"{_capital(what)} must be a str. {type(text).__name__} was given. Pass it as text, for example with str()."
        )
    if not text:
        raise ValueError(f"{_capital(what)} is empty. It needs at least 1 character. Leave it out if you have none.")
    if len(text) > length:
        raise LimitExceeded(
            f"{_capital(what)} has {len(text)} characters. {length} are allowed, here it begins with "
            f"{quoted(text[:40])}. Use a shorter one, for example a hash of it.",
            what=what,
            limit=length,
            actual=len(text),
        )
    # Not printable: control characters with NUL, line and paragraph ends, lone surrogates, spaces other than " ".
    if not text.isprintable():
        at, wrong = next((at, letter) for at, letter in enumerate(text) if not letter.isprintable())
        raise ValueError(
            f"{_capital(what)} has U+{ord(wrong):04X} at position {at}, which is not printable. Ids and names are "
            "shown in logs, URLs and terminals. Remove that character."
        )
    return text


def _capital(what: str) -> str:
    return what if what.endswith("=") else what[:1].upper() + what[1:]
