"""When to try again; durations and instants without a rounded microsecond."""

from __future__ import annotations

import math
import random
from datetime import date, datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.core.errors import NonRetryable, PayloadError, RetryAfter
from perdure.core.retry import Retry, backoff, decide, duration, instant, length, micros, moment

STEADY = Retry(max_attempts=None, jitter=False)


def seconds(*waits: float) -> list[timedelta]:
    return [timedelta(seconds=each) for each in waits]


def test_the_default_is_three_attempts_from_one_second() -> None:
    retry = Retry()
    assert (retry.max_attempts, retry.factor, retry.jitter) == (3, 2.0, True)
    assert [retry.first_delay, retry.max_delay] == seconds(1, 60)
    assert [backoff(retry, attempt, spread=0.5) for attempt in (1, 2, 3)] == [*seconds(0.5, 1), None]


def test_delays_grow_to_the_cap_and_stay_there() -> None:
    delays = [backoff(STEADY, attempt, spread=0.9) for attempt in (1, 2, 6, 7, 8, 5000)]
    assert delays == seconds(1, 2, 32, 60, 60, 60)


@given(st.integers(1, 5000), st.floats(0, 1, exclude_max=True), st.floats(1, 1e300))
def test_full_jitter_stays_between_nothing_and_the_delay(attempt: int, spread: float, factor: float) -> None:
    drawn = backoff(Retry(max_attempts=None, factor=factor), attempt, spread=spread)
    whole = backoff(Retry(max_attempts=None, factor=factor, jitter=False), attempt, spread=spread)
    assert drawn is not None
    assert whole is not None
    assert timedelta(0) <= drawn <= whole <= timedelta(seconds=60)


def test_a_first_delay_above_the_cap_is_capped() -> None:
    assert backoff(Retry(first_delay=100, max_delay=5, jitter=False), 1, spread=0) == timedelta(seconds=5)


def test_one_attempt_is_none_again_and_unlimited_never_ends() -> None:
    assert backoff(Retry(max_attempts=1), 1, spread=0.5) is None
    assert backoff(STEADY, 10**9, spread=0.5) == timedelta(seconds=60)


class Gone(LookupError):
    pass


@pytest.mark.parametrize(
    ("retry", "error", "delay"),
    [
        (STEADY, ValueError(), 1),
        (STEADY, NonRetryable("x"), None),
        (STEADY, RetryAfter(300), 300),
        (STEADY, RetryAfter(0), 0),
        (STEADY, KeyboardInterrupt(), None),
        (STEADY, PayloadError("x"), 1),
        (Retry(give_up_on=LookupError, jitter=False), Gone(), None),
        (Retry(give_up_on=(KeyError, OSError), jitter=False), Gone(), 1),
        (Retry(retry_if=lambda error: isinstance(error, OSError), jitter=False), OSError(), 1),
        (Retry(retry_if=lambda error: isinstance(error, OSError), jitter=False), ValueError(), None),
        (Retry(retry_if=lambda error: False), RetryAfter(7), 7),
        (Retry(give_up_on=RetryAfter), RetryAfter(7), None),
        (Retry(max_attempts=1), RetryAfter(7), None),
    ],
)
def test_who_decides_whether_to_try_again(retry: Retry, error: BaseException, delay: float | None) -> None:
    assert decide(retry, error, 1, 0.5) == (None if delay is None else timedelta(seconds=delay))


def test_an_async_retry_if_is_refused() -> None:
    async def wanted(error: Exception) -> bool:
        return False

    with pytest.raises(TypeError, match="async"):
        Retry(retry_if=wanted)


def test_a_retry_if_that_raises_ends_the_trying_and_is_shown() -> None:
    def broken(error: Exception) -> bool:
        return bool(1 / 0)

    error = ValueError("the original")
    assert decide(Retry(retry_if=broken), error, 1, 0.5) is None
    (note,) = vars(error)["__notes__"]
    assert "retry_if raised ZeroDivisionError: division by zero" in note
    assert "test_retry.py:" in note


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0}, {"max_attempts": -1}, {"max_attempts": 2.5}, {"max_attempts": True},
        {"first_delay": -1}, {"first_delay": math.nan}, {"first_delay": "1"}, {"first_delay": True},
        {"max_delay": math.inf}, {"factor": 0.5}, {"factor": math.nan}, {"factor": math.inf}, {"factor": "2"},
        {"give_up_on": "ValueError"}, {"give_up_on": [ValueError()]}, {"give_up_on": int}, {"retry_if": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_setting_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        Retry(**wrong)


def test_a_policy_is_a_value() -> None:
    assert Retry(first_delay=1) == Retry(first_delay=timedelta(seconds=1))
    assert hash(Retry()) == hash(Retry())
    with pytest.raises(AttributeError):
        Retry().factor = 3  # type: ignore[misc]


# --- durations and instants


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0, timedelta(0)),
        (1.5, timedelta(seconds=1, microseconds=500_000)),
        (0.1, timedelta(microseconds=100_000)),
        (86_400 * 3650, timedelta(days=3650)),
        (timedelta.max, timedelta.max),
    ],
)
def test_a_duration_is_seconds_or_a_timedelta(given: Any, expected: timedelta) -> None:
    assert duration(given, "timeout=") == expected


@pytest.mark.parametrize(
    ("span", "told"),
    [(-1, "0 ms"), (0, "0 ms"), (0.0504, "50 ms"), (1, "1 s"), (3.44, "3.4 s"), (59.96, "60 s"), (60, "1 min"),
     (310.9, "5 min 10 s"), (3600, "1 h"), (2 * 86_400 + 3 * 3600 + 59, "2 d 3 h")],
)  # fmt: skip
def test_a_duration_is_told_in_its_two_largest_units(span: float, told: str) -> None:
    assert length(timedelta(seconds=span)) == told


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1, timedelta(-1), True, "5", None, 1e300, 10**20])
def test_what_is_no_length_of_time_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"^timeout= "):
        duration(wrong, "timeout=")


def test_negative_and_zero_where_they_make_sense() -> None:
    assert duration(-1, "sleep", negative=True) == timedelta(seconds=-1)
    with pytest.raises(ValueError, match="is 0"):
        duration(0, "lease=", zero=False)


@given(st.timedeltas(max_value=timedelta(days=3_650_000)))
def test_microseconds_are_exact(length: timedelta) -> None:
    assert timedelta(microseconds=micros(length)) == length


def test_the_longest_time_from_the_last_instant_is_an_integer_of_64_bits() -> None:
    assert instant(datetime.max.replace(tzinfo=timezone.utc), "at=") + micros(timedelta.max) < 2**63


@given(st.datetimes(timezones=st.just(timezone.utc)))
def test_an_instant_is_exact_to_the_year_9999(when: datetime) -> None:
    assert moment(instant(when, "at=")) == when


def test_an_instant_knows_its_zone() -> None:
    summer = datetime(2030, 7, 1, 12, tzinfo=ZoneInfo("Europe/Berlin"))
    assert instant(summer, "at=") == instant(datetime(2030, 7, 1, 10, tzinfo=timezone.utc), "at=")
    last = datetime.max.replace(tzinfo=timezone(timedelta(hours=-12)))
    assert instant(last, "at=") - instant(datetime.max.replace(tzinfo=timezone.utc), "at=") == 12 * 3_600_000_000


def test_a_naive_datetime_is_refused_with_the_line_that_mends_it() -> None:
    with pytest.raises(ValueError, match=r"at= has no time zone.*tzinfo=timezone\.utc.*\.astimezone\(\)"):
        instant(datetime(2030, 1, 1), "at=")  # noqa: DTZ001
    for wrong in (date(2030, 1, 1), "2030-01-01", 5, None):
        with pytest.raises(TypeError, match="aware datetime"):
            instant(wrong, "at=")  # type: ignore[arg-type]


def test_the_core_draws_nothing_itself() -> None:
    random.seed(1)
    before = random.getstate()
    decide(Retry(), ValueError(), 1, 0.5)
    assert random.getstate() == before
