"""When to try again, and the durations and instants that settings are given in.

Durations are `timedelta`s or seconds outside, `timedelta`s inside; stored times are whole microseconds since 1970. All
arithmetic on them is in integers: a float cannot hold microseconds beyond the year 2255.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from .errors import NonRetryable, RetryAfter

EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)
LONGEST: Final = 10_000 * 366 * 86_400 * 1_000_000
"""Microseconds: beyond the year 9999 from any time there is. Added to one, it still is an integer that stores hold."""
_NOTHING: Final = timedelta(0)
_MICROSECOND: Final = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True, init=False)
class Retry:
    """How often and how soon a failed step is tried again. `Retry()` is the default of every step.

    max_attempts: counts the first try; default 3, None is unlimited.
    first_delay, max_delay: timedelta or seconds; the wait after the first failure, default 1 s, and the longest one,
        default 60 s.
    factor: how much longer each wait is than the one before it, at least 1; default 2.
    jitter: wait a random part of the delay ("full jitter"); default true.
    give_up_on: exception types that are final, besides NonRetryable. retry_if(error): false means final; a plain
        function. Both default to nothing more.
    TypeError or ValueError for what is none of these.
    """

    max_attempts: int | None
    first_delay: timedelta
    factor: float
    max_delay: timedelta
    jitter: bool
    give_up_on: tuple[type[BaseException], ...]
    retry_if: Callable[[Exception], object] | None

    def __init__(
        self,
        *,
        max_attempts: int | None = 3,
        first_delay: timedelta | float = 1,
        factor: float = 2.0,
        max_delay: timedelta | float = 60,
        jitter: bool = True,
        give_up_on: type[BaseException] | Iterable[type[BaseException]] = (),
        retry_if: Callable[[Exception], object] | None = None,
    ) -> None:
        keep = object.__setattr__
        keep(self, "max_attempts", _attempts(max_attempts))
        keep(self, "first_delay", duration(first_delay, "Retry(first_delay=)"))
        keep(self, "factor", _factor(factor))
        keep(self, "max_delay", duration(max_delay, "Retry(max_delay=)"))
        keep(self, "jitter", bool(jitter))
        keep(self, "give_up_on", exception_types(give_up_on, "Retry(give_up_on=)"))
        if retry_if is not None and not callable(retry_if):
            raise TypeError(
                f"Retry(retry_if=) must be a function. {retry_if!r} cannot be called. "
                "Give one that takes the error and returns whether to try again."
            )
        if inspect.iscoroutinefunction(retry_if):
            raise TypeError(
                f"Retry(retry_if=) must be a plain function. {retry_if!r} is async and would not be awaited. "
                "Give one that takes the error and returns whether to try again."
            )
        keep(self, "retry_if", retry_if)


def retry_given(given: Any, what: str) -> Retry:
    """A `Retry`; TypeError for anything else. what: the setting, for the error's text."""
    if not isinstance(given, Retry):
        raise TypeError(f"{what} takes a Retry. {given!r} is none. Pass one, such as Retry(max_attempts=5).")
    return given


def backoff(retry: Retry, attempt: int, *, spread: float) -> timedelta | None:
    """How long to wait before trying again, or None to give up.

    attempt: attempts already made, at least 1.
    spread: a number in [0, 1) drawn by the caller, so that this function stays pure.

    "Full jitter": a crowd that failed together does not come back together.
    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    if retry.max_attempts is not None and attempt >= retry.max_attempts:
        return None
    first, longest = micros(retry.first_delay), micros(retry.max_delay)
    # A whole factor grows in integers, exactly. 64 doublings pass every cap; a float would overflow at attempt 1100.
    factor = int(retry.factor) if retry.factor == int(retry.factor) else retry.factor
    try:
        delay = int(min(longest, first * factor ** min(attempt - 1, 64)))
    except OverflowError:
        delay = longest
    return timedelta(microseconds=int(delay * spread) if retry.jitter else delay)


def decide(retry: Retry, error: BaseException, attempt: int, spread: float) -> timedelta | None:
    """How long to wait before trying again after `error`, or None where it is final.

    attempt: attempts already made, at least 1. spread: see `backoff`.

    A `retry_if` that raises ends the trying, and what it raised is added to the error as a note.
    """
    if retry.max_attempts is not None and attempt >= retry.max_attempts:
        return None
    if isinstance(error, (NonRetryable, *retry.give_up_on)) or not isinstance(error, Exception):
        return None
    if isinstance(error, RetryAfter):
        return error.delay
    if retry.retry_if is not None and not _wanted(retry.retry_if, error):
        return None
    return backoff(retry, attempt, spread=spread)


def _wanted(retry_if: Callable[[Exception], object], error: Exception) -> bool:
    try:
        return bool(retry_if(error))
    except Exception as broken:
        where = broken.__traceback__
        while where is not None and where.tb_next is not None:
            where = where.tb_next
        line = f" ({where.tb_frame.f_code.co_filename}:{where.tb_lineno})" if where is not None else ""
        add_note(error, f"It was not tried again: retry_if raised {type(broken).__name__}: {broken}{line}")
        return False


def add_note(error: BaseException, note: str) -> None:
    """`error.add_note(note)`, which Python 3.10 does not have."""
    try:
        error.__dict__["__notes__"] = [*getattr(error, "__notes__", ()), note]
    except Exception:
        # An exception that takes no attributes goes without its note: showing the original one matters more.
        return


def exception_types(
    given: type[BaseException] | Iterable[type[BaseException]], what: str
) -> tuple[type[BaseException], ...]:
    """One exception type, or several, as a tuple. what: the setting, for the error's text."""
    whole: Any = given  # Callers are not all type-checked.
    types: tuple[Any, ...] = tuple(whole) if isinstance(whole, Iterable) and not isinstance(whole, type) else (whole,)
    for item in types:
        if not isinstance(item, type) or not issubclass(item, BaseException):
            raise TypeError(
                f"{what} takes exception types. {item!r} is none. Pass classes like ValueError, not names or objects."
            )
    return types


# --- durations and instants


def length(span: timedelta) -> str:
    """A duration as people read it: `12 ms`, `3.4 s`, `5 min 10 s`, `2 d 3 h`; one below nothing is `0 ms`."""
    seconds = max(span.total_seconds(), 0)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    parts, rest = [], int(seconds)
    for name, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])


def duration(given: timedelta | float, what: str, *, negative: bool = False, zero: bool = True) -> timedelta:
    """`given` as a timedelta, exact to the microsecond.

    given: a timedelta or a number of seconds. what: the setting, for the error's text.
    negative, zero: whether such a duration is allowed.
    """
    value: Any = given  # Callers are not all type-checked.
    if isinstance(value, timedelta):
        # Subclasses (pandas, pendulum) count nanoseconds or months: only what a timedelta holds is meant.
        result = timedelta(value.days, value.seconds, value.microseconds)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{what} is {value!r}. That is no length of time. Give seconds or a timedelta.")
        try:
            result = timedelta(seconds=value)
        except OverflowError:
            raise ValueError(
                f"{what} is {value!r} seconds. That is more than a timedelta holds, 999999999 days. Give less."
            ) from None
    else:
        raise TypeError(
            f"{what} must be a timedelta or a number of seconds. {type(value).__name__} was given. "
            "Write timedelta(minutes=5), or 300."
        )
    if result < _NOTHING and not negative:
        raise ValueError(f"{what} is {result}. It cannot be negative. Give seconds or a timedelta of 0 or more.")
    if not result and not zero:
        raise ValueError(f"{what} is 0. It must leave some time. Give seconds or a timedelta above 0.")
    return result


def micros(length: timedelta) -> int:
    """Microseconds in a timedelta, exactly; of one beyond LONGEST, that."""
    return min((length.days * 86_400 + length.seconds) * 1_000_000 + length.microseconds, LONGEST)


def instant(when: datetime, what: str) -> int:
    """Microseconds between 1970 and `when`, exactly. what: the setting, for the error's text."""
    if not isinstance(when, datetime):
        raise TypeError(
            f"{what} must be an aware datetime. {type(when).__name__} was given. "
            "Write datetime(2030, 1, 31, 9, 0, tzinfo=timezone.utc)."
        )
    if when.utcoffset() is None:
        raise ValueError(
            f"{what} has no time zone. {when.isoformat(' ')} is a different moment on another machine. "
            "Add tzinfo=timezone.utc if it is UTC, or call .astimezone() on it if it is this machine's local time."
        )
    return (when - EPOCH) // _MICROSECOND


def moment(at: int) -> datetime:
    """The UTC datetime that is `at` microseconds after 1970, or the last there is: the other way of `instant`."""
    try:
        return EPOCH + timedelta(microseconds=at)
    except OverflowError:
        # A zone west of Greenwich, or an asyncio timer, can name a time that UTC cannot write.
        return datetime.max.replace(tzinfo=timezone.utc)


def _attempts(given: Any) -> int | None:
    if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
        raise ValueError(
            f"Retry(max_attempts={given!r}) is no number of tries. It counts the first try, so it is at least 1. "
            "Give 1 for no retries, None for unlimited ones."
        )
    return given


def _factor(given: Any) -> float:
    if not isinstance(given, (int, float)) or isinstance(given, bool) or not (1 <= given < math.inf):
        raise ValueError(
            f"Retry(factor={given!r}) cannot be used. Each wait is that many times the one before. "
            "Give a number of at least 1; 1 keeps the waits equal."
        )
    return given
