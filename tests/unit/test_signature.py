"""Inputs in one normal form, checked at the call; results by their annotation."""

from __future__ import annotations

import functools
import typing
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perdure.core.errors import LimitExceeded, PayloadError
from perdure.core.limits import Limits
from perdure.core.signature import Parameter, Signature, result_plan, signature_of

if TYPE_CHECKING:
    from decimal import Decimal as OnlyForCheckers

T = TypeVar("T")


@dataclass
class Order:
    id: str
    cents: int


async def process(ctx: Any, order: Order, note: str = "", *, at: datetime | None = None) -> Order:
    return order


def everything(ctx: Any, a: int, b: int = 2, /, c: int = 3, *rest: float, d: int, e: int = 5, **more: str) -> None: ...


def bound(function: Any, *args: Any, **kwargs: Any) -> str:
    """The stored form of a call."""
    return signature_of(function).encode(args, kwargs).decode()


ORDER = Order("o-1", 4200)


def test_what_can_go_by_name_does_and_defaults_are_left_out() -> None:
    by_position, by_name = bound(process, ORDER, "x"), bound(process, note="x", order=ORDER)
    assert by_position == by_name == '[[],{"order":{"id":"o-1","cents":4200},"note":"x"}]'
    assert bound(process, ORDER) == '[[],{"order":{"id":"o-1","cents":4200}}]'


@pytest.mark.parametrize(
    ("args", "kwargs", "stored"),
    [
        ((1,), {"d": 1}, '[[1],{"d":1}]'),
        ((1, 2, 3), {"d": 1, "e": 4}, '[[1,2],{"c":3,"d":1,"e":4}]'),
        ((1,), {"e": 4, "d": 1, "c": 0}, '[[1],{"c":0,"d":1,"e":4}]'),
        ((1, 2, 3, 4, 5), {"d": 1}, '[[1,2,3,4.0,5.0],{"d":1}]'),
        ((1,), {"z": "1", "y": "2", "d": 1, "a": "3"}, '[[1],{"d":1,"a":"3","y":"2","z":"1"}]'),
    ],
)
def test_every_kind_of_parameter_has_its_place(args: Any, kwargs: Any, stored: str) -> None:
    assert bound(everything, *args, **kwargs) == stored
    positional, by_name = signature_of(everything).decode(stored)
    assert seen(*positional, **by_name) == seen(*args, **kwargs)


def seen(a: int, b: int = 2, /, c: int = 3, *rest: float, d: int, e: int = 5, **more: str) -> Any:
    return a, b, c, rest, d, e, more


@given(st.lists(st.integers(0, 9), max_size=6), st.dictionaries(st.sampled_from("abcdeyz"), st.integers(0, 9)))
def test_the_normal_form_accepts_what_python_accepts(args: list[int], numbers: dict[str, int]) -> None:
    kwargs: dict[str, Any] = {name: str(n) if name in "abyz" else n for name, n in numbers.items()}
    try:
        expected = seen(*args, **kwargs)
    except TypeError:
        with pytest.raises(TypeError, match="arguments that do not fit"):
            signature_of(everything).encode(args, kwargs)
        return
    signature = signature_of(everything)
    stored = signature.encode(args, kwargs)
    positional, by_name = signature.decode(stored)
    assert seen(*positional, **by_name) == expected
    assert signature.encode(positional, by_name) == stored


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((), {}, '"order" is missing'),
        ((ORDER, "", None), {}, "2 by position at most, 3 were given"),
        ((ORDER,), {"order": ORDER}, '"order" was given twice'),
        ((ORDER,), {"notes": ""}, 'there is no parameter "notes". It takes order, note (optional), at (optional). '),
        ((ORDER,), {"notes": ""}, 'Write "note" if you meant that'),
        ((ORDER,), {"ctx": 1}, 'no parameter "ctx"'),
    ],
)
def test_a_call_that_does_not_fit_names_the_argument(args: Any, kwargs: Any, words: str) -> None:
    with pytest.raises(TypeError) as caught:
        bound(process, *args, **kwargs)
    assert words in str(caught.value)
    assert str(caught.value).startswith("process was given")


def test_a_positional_only_parameter_has_no_name() -> None:
    def narrow(ctx: Any, a: int, /) -> None: ...

    with pytest.raises(TypeError, match='"a" goes by position only'):
        bound(narrow, 1, a=1)


def test_types_are_checked_at_the_call() -> None:
    with pytest.raises(PayloadError, match='Argument "order" of process cannot be stored as Order'):
        bound(process, {"id": "o-1", "cents": 1})
    with pytest.raises(PayloadError, match='Argument "note" of process'):
        bound(process, ORDER, 5)
    with pytest.raises(PayloadError, match="Argument 1 of everything"):
        bound(everything, "x", d=1)
    with pytest.raises(PayloadError, match="Argument 4 of everything"):
        bound(everything, 1, 2, 3, "x", d=1)
    with pytest.raises(PayloadError, match='Argument "zebra" of everything'):
        bound(everything, 1, d=1, zebra=5)


def test_the_whole_input_has_one_limit() -> None:
    def two(ctx: Any, a: str, b: str) -> None: ...

    with pytest.raises(LimitExceeded, match="The input of two"):
        signature_of(two, name="two").encode(("x" * 60, "y" * 60), {}, limits=Limits(payload=100))


def test_an_input_comes_back_by_its_annotations() -> None:
    at = datetime(2030, 1, 1, tzinfo=timezone.utc)
    signature = signature_of(process)
    assert signature.decode(signature.encode((ORDER,), {"at": at})) == ([], {"order": ORDER, "at": at})


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ("{}", "no stored input"),
        ("[[]]", "no stored input"),
        ("[[],{}", "no stored input"),
        ("[[],{}]", '"order" is missing'),
        ('[[],{"order":{"id":"a","cents":1},"colour":1}]', 'no parameter "colour"'),
        ('[[],{"order":{"id":"a"}}]', "'cents' is missing"),
    ],
)
def test_an_input_that_no_longer_fits_is_a_payload_error(stored: str, words: str) -> None:
    with pytest.raises(PayloadError) as caught:
        signature_of(process).decode(stored)
    assert words in str(caught.value)


def test_a_client_without_the_code_normalises_alike() -> None:
    facts = msgspec.json.encode(signature_of(everything).parameters)
    announced = Signature("everything", msgspec.json.decode(facts, type=list[Parameter]))
    assert announced.encode((1, 2, 3), {"d": 1}) == signature_of(everything).encode((1, 2, 3), {"d": 1})
    with pytest.raises(TypeError, match='"d" is missing'):
        announced.normalise((1,), {})


# --- which function


class Flow:
    def run(self, ctx: Any, order: Order) -> int:
        return 1

    def __call__(self, order: Order) -> Order:
        return order


def test_methods_partials_and_callables_have_signatures() -> None:
    assert bound(Flow().run, ORDER) == '[[],{"order":{"id":"o-1","cents":4200}}]'
    assert signature_of(Flow(), context=False).encode((ORDER,), {}) == bound(Flow().run, ORDER).encode()
    partial = functools.partial(process, note="x")
    assert signature_of(partial).decode(signature_of(partial).encode((ORDER,), {})) == ([], {"order": ORDER})
    assert signature_of(lambda ctx, a: a).encode(((1, 2),), {}) == b'[[],{"a":{"$tuple":[1,2]}}]'
    assert signature_of(max, context=False).encode((1, 2), {}) == b"[[1,2],{}]"


def test_a_decorated_function_keeps_its_annotations() -> None:
    @functools.wraps(process)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return process(*args, **kwargs)

    with pytest.raises(PayloadError, match='Argument "order"'):
        bound(wrapped, 5)


def test_a_workflow_without_a_context_is_refused() -> None:
    for wrong in (lambda: None, lambda *, ctx: None):
        with pytest.raises(TypeError, match="no parameter for the context"):
            signature_of(wrong)
    assert signature_of(lambda *args: None).encode((1,), {}) == b"[[1],{}]"


def test_annotations_from_the_function_around_are_found() -> None:
    @dataclass
    class Local:
        x: int

    def flow(ctx: Any, value: Local) -> Local:
        return Local(value.x)

    assert signature_of(flow).decode('[[],{"value":{"x":1}}]') == ([], {"value": Local(1)})
    assert result_plan(flow).annotation is Local


def hidden(ctx: Any, price: OnlyForCheckers) -> int:
    return 1


def hidden_result(ctx: Any, price: int) -> OnlyForCheckers:
    raise NotImplementedError


def test_a_name_that_is_missing_at_run_time_spoils_only_its_own_annotation() -> None:
    with pytest.raises(PayloadError, match=r'parameter "price" of hidden cannot be resolved.*OnlyForCheckers'):
        signature_of(hidden)
    assert result_plan(hidden).annotation is int
    assert signature_of(hidden_result).encode((1,), {}) == b'[[],{"price":1}]'
    with pytest.raises(PayloadError, match="returns="):
        result_plan(hidden_result)


# --- results


async def coroutine() -> Order:
    return ORDER


def awaitable() -> Awaitable[Order]:
    return coroutine()


def passed_on() -> Coroutine[Any, Any, Order]:
    return coroutine()


def generator() -> Generator[int, str, Order]:
    yield 1
    return ORDER


def iterator() -> Iterator[int]:
    yield 1


def generic(value: T) -> T:
    return value


def nothing() -> None: ...


def never() -> typing.NoReturn:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("function", "annotation"),
    [
        (coroutine, Order),
        (awaitable, Order),
        (passed_on, Order),
        (generator, Order),
        (iterator, Any),
        (generic, Any),
        (nothing, type(None)),
        (never, Any),
        (lambda: 1, Any),
        (len, Any),
        (Order, Order),
        (int, int),
        (Flow().run, int),
        (Flow(), Order),
        (functools.partial(coroutine), Order),
    ],
)
def test_a_result_is_what_the_function_gives_at_its_end(function: Callable[..., Any], annotation: Any) -> None:
    assert result_plan(function).annotation is annotation
    assert result_plan(function) is result_plan(function)


def test_a_result_that_cannot_be_stored_is_refused_by_name() -> None:
    class Session: ...

    def login() -> Session:
        return Session()

    with pytest.raises(PayloadError, match="The result of login is annotated as Session"):
        result_plan(login)
