"""Errors say what, why, what to do; recorded ones raise the same in life and on replay."""

from __future__ import annotations

import asyncio
import copy
import inspect
import pickle
import sys
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from perdure.core import errors
from perdure.core.codec import wrap
from perdure.core.errors import (
    CallFailed,
    ChildFailed,
    DuplicateStepId,
    IdempotencyConflict,
    LimitExceeded,
    NonDeterminismError,
    NonRetryable,
    PayloadError,
    PerdureError,
    RetryAfter,
    RunCancelled,
    RunFailed,
    RunFinished,
    RunNotFound,
    RunTerminated,
    RunTimedOut,
    StepFailed,
    StepTimedOut,
    StoreError,
    StoreLocked,
    StoreUnavailable,
    UnknownWorkflow,
    Unwinding,
    UpdateRejected,
    timed_out,
)
from perdure.core.failure import RecordedError, raised, record, type_name
from perdure.core.limits import Limits, check_id, check_message_id, check_name

MADE: list[BaseException] = [
    StepFailed("charge", "orders.CardDeclined", "no funds", attempts=3, traceback="…", cause=StepFailed("a", "T", "m")),
    StepTimedOut("charge", "TimeoutError", "30 s passed"),
    ChildFailed("notify", "ValueError", "no mail", status="failed", run_id="o-1/notify"),
    CallFailed("call", "perdure.CallFailed", "", status=503, headers={"a": "b"}, body=b"busy"),
    RunFailed("o-1", cause=StepFailed("a", "ValueError", "x")),
    RunCancelled("o-1", reason="no longer wanted"),
    RunTerminated("o-1"),
    RunTimedOut("o-1"),
    RunNotFound("o-1"),
    errors.RunExists("o-1"),
    RunFinished("o-1", status="completed"),
    UnknownWorkflow("procss", ["process", "refund"]),
    IdempotencyConflict("key-1", run_id="o-1"),
    IdempotencyConflict("o-1", run_id="o-1", differs="workflow"),
    DuplicateStepId("page", sites=["flows.py:3", "flows.py:9"]),
    UpdateRejected("o-1", "add", "the cart is closed"),
]


@pytest.mark.parametrize("error", MADE, ids=lambda each: type(each).__name__)
def test_every_error_says_what_why_and_what_to_do(error: BaseException) -> None:
    sentences = str(error).replace("?", ".").count(". ") + 1
    assert sentences >= 3 or ": " in str(error)
    assert str(error)[-1] in ".?"
    assert "self." not in str(error), "a text shows how it is made"


def test_a_quarantined_run_is_not_said_to_have_raised() -> None:
    cause = RecordedError(type="Quarantined", message="It killed its worker 3 times, the last time executed alone.")
    text = str(RunFailed("o 1", info=SimpleNamespace(status="quarantined"), cause=cause))
    assert text == (
        'Run "o 1" is quarantined. It killed its worker 3 times, the last time executed alone. Mend its code, then end '
        "it with `perdure terminate 'o 1'` and start a new run."
    )


def test_every_error_is_in_the_tree_drawn_at_the_top() -> None:
    named = [name for name in errors.__all__ if inspect.isclass(getattr(errors, name)) and name != "Cancelled"]
    tree = errors.__doc__ or ""
    assert [name for name in named if name not in tree] == []
    for name in named:
        assert issubclass(getattr(errors, name), (PerdureError, Unwinding))


def test_except_exception_does_not_stop_what_stops_user_code() -> None:
    for kind in (errors.Suspended, errors.Evicted, errors.NeverRests, errors.Cancelled):
        assert not issubclass(kind, Exception)
    assert errors.Cancelled is asyncio.CancelledError


@pytest.mark.parametrize("error", [*MADE, NonRetryable("no"), RetryAfter(5, "later")], ids=lambda e: type(e).__name__)
def test_an_error_comes_back_from_pickle_and_copy(error: BaseException) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is type(error)
        assert (str(again), again.args) == (str(error), error.args)
        assert {name: str(value) for name, value in vars(again).items()} == {
            name: str(value) for name, value in vars(error).items()
        }


def test_the_report_of_a_difference_shows_both_sides() -> None:
    report = NonDeterminismError(
        "order-o-1",
        "cool-off",
        recorded='event 4, run activity "charge"',
        recorded_site="orders/flows.py:31",
        asked="sleep 1:00:00",
        asked_site="orders/flows.py:29",
        patch="cool-off-first",
    )
    assert str(report) == (
        'run order-o-1 cannot be replayed at step "cool-off".\n'
        '  recorded: event 4, run activity "charge"  (orders/flows.py:31)\n'
        "  now asks: sleep 1:00:00                   (orders/flows.py:29)\n"
        "The code changed under a run that had started. The run is blocked, not failed: keep the old path for\n"
        'runs that had passed this line with `if ctx.patched("cool-off-first")`, and it goes on by itself.'
    )


def test_only_a_store_that_may_come_back_is_retryable() -> None:
    retryable = {kind for kind in StoreError.__subclasses__() if kind("x").retryable}
    assert retryable == {StoreUnavailable, StoreLocked}


def test_waiting_too_long_is_the_built_in_timeout_error() -> None:
    assert isinstance(timed_out("still running"), TimeoutError)
    assert isinstance(timed_out("still running"), asyncio.TimeoutError)
    assert isinstance(StepTimedOut("a", "TimeoutError", ""), asyncio.TimeoutError)


def test_ids_are_shown_without_their_control_characters() -> None:
    assert "\x1b" not in str(RunNotFound("\x1b[31mred"))


# --- ids and limits


@pytest.mark.parametrize("text", ["a", "x" * 255, "order é 日本 😀/1", "perdure"])
def test_printable_ids_are_accepted(text: str) -> None:
    assert check_id(text, "the run id") == check_name(text, "the name") == check_message_id(text) == text


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("", ValueError, "The run id is empty"),
        ("a\0b", ValueError, "U+0000 at position 1"),
        ("a\n", ValueError, "U+000A"),
        ("\ud800", ValueError, "U+D800"),
        ("a\u202eb", ValueError, "U+202E"),
        ("x" * 256, LimitExceeded, "256 characters"),
        (5, TypeError, "must be a str"),
        (None, TypeError, "must be a str"),
    ],
)
def test_other_ids_are_refused(text: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as caught:
        check_id(text, "the run id")
    assert words in str(caught.value)


def test_the_engines_own_message_ids_are_reserved() -> None:
    with pytest.raises(ValueError, match="reserved"):
        check_message_id("perdure:cancel")


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "1", float("nan")])
def test_a_limit_is_a_positive_whole_number(wrong: Any) -> None:
    with pytest.raises(ValueError, match="payload="):
        Limits(payload=wrong)
    assert Limits(busy=0.5).busy == 0.5


# --- recorded errors


class CardDeclined(Exception):
    """Has an `__init__` of its own, an attribute that can be stored and one that cannot."""

    def __init__(self, code: str, *, cents: int) -> None:
        super().__init__(f"declined: {code}")
        self.code = code
        self.cents = cents
        self.session = object()


class Chatty(ValueError):
    message = "the class's own"

    @property
    def step(self) -> str:
        return "mine"


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Stubborn(Exception):
    def __new__(cls, *args: Any) -> Stubborn:
        if cls is not Stubborn:
            raise TypeError("only itself")
        return super().__new__(cls, *args)


class Final(Exception):
    def __init_subclass__(cls) -> None:
        raise TypeError("no subclasses")


class Halt(BaseException):
    pass


def failed(error: BaseException, raises: Any = (), **facts: Any) -> StepFailed:
    """What the workflow sees: recorded, stored, read and raised, the same from life and from the record."""
    try:
        raise error
    except BaseException as caught:
        recorded = record(caught, **facts)
    stored = msgspec.json.encode(recorded)
    read = msgspec.json.decode(stored, type=RecordedError)
    assert msgspec.json.encode(read) == stored
    live, replayed = raised(recorded, "charge", raises, attempts=3), raised(read, "charge", raises, attempts=3)
    for one in (live, replayed):
        assert isinstance(one, StepFailed)
        assert type(one) is type(live)
        assert (str(one), repr(one), one.args) == (str(live), repr(live), live.args)
        assert one.attempts == 3
        again = pickle.loads(pickle.dumps(one))
        assert type(again) is type(one)
        assert (str(again), again.args, again.attempts) == (str(one), one.args, one.attempts)
    return replayed


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x", 1),
        KeyError("a"),
        FileNotFoundError(2, "No such file", "/nope"),
        ConnectionRefusedError(111, "refused"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad byte"),
        ZeroDivisionError(),
        TimeoutError("slow"),
        ImportError("no", name="x", path="y"),
        SyntaxError("bad", ("f.py", 1, 2, "text")),
        RecursionError("deep"),
        UserWarning("careful"),
        OSError("just text"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_built_in_error_is_itself_and_step_failed(error: Exception) -> None:
    seen = failed(error)
    assert isinstance(seen, type(error))
    assert str(seen) == str(error)
    assert seen.args == error.args
    assert (seen.step, seen.type) == ("charge", type(error).__name__)
    for name in ("filename", "errno", "name", "reason", "lineno"):
        assert getattr(seen, name, None) == getattr(error, name, None)


def test_a_type_named_by_the_author_is_raised_with_its_attributes() -> None:
    seen = failed(CardDeclined("51", cents=100), CardDeclined)
    assert isinstance(seen, CardDeclined)
    assert (seen.code, seen.cents, seen.message, seen.args) == ("51", 100, "declined: 51", ("declined: 51",))
    assert not hasattr(seen, "session")
    assert type(seen).__name__ == "CardDeclined"
    assert type(failed(CardDeclined("x", cents=1), [CardDeclined])) is type(seen)


def test_without_being_named_it_is_a_plain_step_failed() -> None:
    seen = failed(CardDeclined("51", cents=100))
    assert type(seen) is StepFailed
    assert seen.type == type_name(CardDeclined)
    assert seen.type.endswith(".CardDeclined")
    assert "declined: 51" in str(seen)


def test_where_names_clash_the_users_win() -> None:
    seen = failed(Chatty("x"), Chatty)
    assert (seen.step, seen.message, seen.attempts) == ("mine", "the class's own", 3)
    error = ValueError("x")
    error.attempts = 99  # type: ignore[attr-defined]  # any attribute may be set
    with pytest.raises(AssertionError):
        failed(error)
    assert raised(record(error), "charge", attempts=3).attempts == 99


@pytest.mark.parametrize(
    ("error", "raises"),
    [
        (MemoryError("x"), ()),
        (StopIteration(1), ()),
        (StopAsyncIteration(1), ()),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(1), ()),
        (Halt("x"), Halt),
        (asyncio.CancelledError(), ()),
        (Stubborn("x"), Stubborn),
        (Final("x"), Final),
        (Unspeakable("x"), Unspeakable),
    ],
    ids=lambda each: getattr(each, "__name__", type(each).__name__),
)
def test_what_cannot_be_raised_again_is_a_plain_step_failed(error: BaseException, raises: Any) -> None:
    assert type(failed(error, raises)) is StepFailed


@pytest.mark.skipif(sys.version_info < (3, 11), reason="ExceptionGroup is 3.11")
def test_a_group_is_a_plain_step_failed() -> None:
    group = ExceptionGroup("several", [ValueError("a")])  # type: ignore[name-defined,unused-ignore]  # noqa: F821
    assert type(failed(group, type(group))) is StepFailed


def test_a_stored_name_never_imports_anything() -> None:
    before = set(sys.modules)
    for name in ("this.Zen", "antigravity.Fly", "builtins.eval", "eval", "perdure.core.errors.PerdureError", "", "int"):
        assert type(raised(RecordedError(type=name, message="x"), "a", CardDeclined)) is StepFailed
    assert set(sys.modules) == before


def test_kinds_of_failure() -> None:
    late = failed(TimeoutError("30 s"), kind="timed_out")
    assert type(late) is StepTimedOut
    assert isinstance(late, TimeoutError)
    child = failed(CardDeclined("51", cents=1), CardDeclined, kind="child", status="failed", run_id="o-1/pay")
    assert isinstance(child, ChildFailed)
    assert isinstance(child, CardDeclined)
    assert (child.status, child.run_id) == ("failed", "o-1/pay")
    for error in (PayloadError("bad", what="the result"), LimitExceeded("big", what="the result", limit=3, actual=4)):
        seen = failed(error, kind="payload")
        assert isinstance(seen, type(error))
        assert seen.what == "the result"
    assert type(failed(PayloadError("raised by the function itself"))) is StepFailed
    with pytest.raises(ValueError, match="later version"):
        raised(RecordedError(type="X", kind="new"), "a")


def test_the_chain_of_causes_is_kept() -> None:
    try:
        try:
            raise CardDeclined("51", cents=1)
        except CardDeclined as low:
            raise RuntimeError("payment") from low
    except RuntimeError as error:
        seen = failed(error, CardDeclined)
    assert isinstance(seen.cause, CardDeclined)
    assert seen.__cause__ is seen.cause
    assert seen.cause.cause is None
    hidden = RuntimeError("a")
    hidden.__context__ = ValueError("b")
    assert isinstance(failed(hidden).cause, ValueError)
    hidden.__suppress_context__ = True
    assert record(hidden).cause is None


def test_a_chain_without_end_is_bounded() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert failed(first).cause is not None
    error = top = ValueError("0")
    for n in range(1000):
        error.__cause__ = error = ValueError(str(n))
    recorded: RecordedError | None = record(top)
    length = 0
    while recorded is not None:
        recorded, length = recorded.cause, length + 1
    assert length == 10


def test_the_traceback_shows_the_users_lines() -> None:
    seen = failed(ValueError("x"))
    assert "test_errors.py" in seen.traceback
    assert seen.traceback.rstrip().endswith("ValueError: x")


def test_our_own_frames_above_the_users_are_left_out() -> None:
    class Broken:
        name = "broken"

        def encode(self, data: bytes, /) -> bytes:
            raise ValueError("x")

        def decode(self, data: bytes, /) -> bytes:
            return data

    with pytest.raises(ValueError) as caught:
        wrap(b"1", [Broken()])
    error = caught.value
    assert "codec.py" in record(error).traceback
    assert error.__traceback__ is not None
    assert "codec.py" not in record(error.with_traceback(error.__traceback__.tb_next)).traceback


def test_whatever_an_error_holds_its_record_is_small_text() -> None:
    for error in (
        ValueError("x" * 1_000_000),
        ValueError("é" * 100_000),
        ValueError("\ud800" * 50_000),
        CardDeclined("y" * 100_000, cents=1),
        Unspeakable("x"),
        ValueError(object(), [1]),
    ):
        recorded = record(error)
        assert len(msgspec.json.encode(recorded)) < 100_000
        assert len(recorded.message.encode()) <= 16 * 1024
        assert len(recorded.traceback.encode()) <= 16 * 1024
    assert "__str__ raised RuntimeError" in record(Unspeakable("x")).message
    assert record(ValueError("a\ud800b")).message == "a\\ud800b"
    assert failed(ValueError(object())).message.startswith("<object object")


def test_a_step_failure_that_leaves_the_workflow_keeps_what_failed() -> None:
    step = failed(CardDeclined("51", cents=100), CardDeclined)
    again = failed(step, CardDeclined)
    assert isinstance(again, CardDeclined)
    assert (again.code, again.type) == ("51", type_name(CardDeclined))
    assert 'Step "charge" failed after 3 attempts.' in again.traceback
    plain = record(failed(CardDeclined("51", cents=100)))
    assert plain.type == "perdure.StepFailed"
    assert plain.cause is not None
    assert plain.cause.type == type_name(CardDeclined)


def test_retry_after_keeps_a_timedelta() -> None:
    assert RetryAfter(1.5).delay == timedelta(seconds=1.5)
    for wrong in (-1, float("nan"), True, "5"):
        with pytest.raises((ValueError, TypeError)):
            RetryAfter(wrong)  # type: ignore[arg-type]
