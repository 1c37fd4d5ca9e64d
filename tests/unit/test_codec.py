"""Values come back equal and of the same types, or are refused with a sentence: nothing in between."""

# Naive datetimes and both spellings of a union are what is tested here.
# ruff: noqa: DTZ001, DTZ901, UP007, UP045

from __future__ import annotations

import base64
import dataclasses
import enum
import json
import math
import subprocess
import sys
import typing
import zlib
from collections import Counter, OrderedDict, defaultdict
from datetime import date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from typing import Any, Generic, Literal, NamedTuple, NewType, Optional, TypedDict, TypeVar, Union
from uuid import UUID
from zoneinfo import ZoneInfo

import attrs
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.core.codec import Plan, check, decode, digest64, digest128, encode, plan, roundtrip, unwrap, wrap
from perdure.core.errors import LimitExceeded, PayloadError
from perdure.core.limits import Limits

UTC = timezone.utc
T = TypeVar("T")


@dataclasses.dataclass
class Line:
    sku: str
    price: Decimal


@dataclasses.dataclass
class Order:
    id: str
    lines: list[Line]
    at: datetime
    note: str | None = None
    extra: Any = None


@dataclasses.dataclass
class BigOrder(Order):
    weight: int = 0


@dataclasses.dataclass
class Tree:
    value: int
    children: list[Tree]


@dataclasses.dataclass
class Box(Generic[T]):
    inside: T


@dataclasses.dataclass(eq=False)
class Unequal:
    x: float


@dataclasses.dataclass
class Hidden:
    x: int
    secret: Any = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass
class Doubling:
    x: int

    def __post_init__(self) -> None:
        self.x *= 2


@dataclasses.dataclass
class Computed:
    x: int
    y: int = dataclasses.field(init=False, default=0)


@attrs.define
class Parcel:
    weight: float
    _seal: str = "none"


class Point(msgspec.Struct, frozen=True):
    x: int
    y: float = 0.0


class Cash(msgspec.Struct, tag=True):
    cents: int


class Card(msgspec.Struct, tag=True):
    number: str
    seen: set[int] = set()


class Row(msgspec.Struct, array_like=True, tag="r"):
    a: int
    b: tuple[str, ...] = ()


class Renamed(msgspec.Struct, rename="camel", omit_defaults=True):
    first_name: str
    last_name: Any = None


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Mixed(enum.Enum):
    NUMBER = 1
    WORD = "x"
    PAIR = (1, 2)
    DAY = date(2020, 1, 1)


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Word(str, enum.Enum):
    A = "a"


class Pair(NamedTuple):
    left: int
    right: str = "r"


class Movie(TypedDict):
    title: str
    year: int


class MyStr(str):
    pass


class MyInt(int):
    pass


class MyList(list):  # type: ignore[type-arg]  # a subclass as users write it
    pass


UserId = NewType("UserId", int)


class Away(tzinfo):
    """A zone that gives no offset."""

    def utcoffset(self, _: Any) -> None:
        return None

    def dst(self, _: Any) -> None:
        return None

    def tzname(self, _: Any) -> str:
        return "away"


def same(left: Any, right: Any) -> bool:
    """Equal, and of the same types at every level; knows NaN, -0.0, and fold where it means something."""
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(map(type, left)) == list(map(type, right)) and same(list(left.items()), list(right.items()))
    if isinstance(left, (set, frozenset)):
        # Equal sets may still hold 1 in one and True in the other.
        return left == right and Counter(map(type, left)) == Counter(map(type, right))
    if isinstance(left, float):
        return repr(left) == repr(right)
    if isinstance(left, Decimal):
        return repr(left) == repr(right)
    if isinstance(left, (datetime, time)):
        return left.isoformat() == right.isoformat() and bool(left.tzinfo or left.fold == right.fold)
    return bool(left == right)


def back(value: Any, annotation: Any = Any) -> Any:
    """What code sees of `value`: the first time, and once more from the stored text."""
    data, first = roundtrip(value, annotation, what="the value")
    json.loads(data)
    again = decode(data, annotation, what="the value")
    assert type(first) is type(again)
    assert dataclasses.is_dataclass(first) or same(first, again)
    assert encode(again, annotation=annotation, what="the value") == data
    return again


def refusal(value: Any, annotation: Any = Any, **limits: int) -> str:
    with pytest.raises((PayloadError, LimitExceeded)) as caught:
        roundtrip(value, annotation, what="argument 'order'", limits=Limits(**limits))
    assert vars(caught.value)["what"] == "argument 'order'"
    assert str(caught.value).startswith("Argument 'order'")
    return str(caught.value)


# --- plain values, without an annotation

offsets = st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(
    lambda offset: timezone(timedelta(minutes=offset // timedelta(minutes=1)))
)
odd_offsets = st.integers(-80_000, 80_000).map(lambda seconds: timezone(timedelta(seconds=seconds)))
zones = st.none() | st.just(UTC) | offsets | odd_offsets
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["$tuple", "$escape", "$map", "$encoded", "$new", "data", "\0", '"$set"', "\\u0024"]
)
numbers = (
    st.integers() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
)
decimals = st.decimals(allow_nan=True, allow_infinity=True)
hashables = st.recursive(
    st.none() | numbers | texts | st.binary() | st.uuids() | st.dates() | st.timedeltas(),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
scalars = (
    hashables
    | decimals
    | st.datetimes(timezones=zones)
    | st.datetimes().map(lambda moment: moment.replace(fold=1))
    | st.times(timezones=zones)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(texts, inner)
        | st.dictionaries(hashables, inner, max_size=4)
        | st.sets(hashables)
    ),
    max_leaves=20,
)


@given(values)
@settings(max_examples=150, deadline=None)
def test_a_plain_value_comes_back_equal_and_of_the_same_types(value: Any) -> None:
    assert same(back(value), value)


@given(values)
@settings(max_examples=80, deadline=None)
def test_an_annotation_of_any_inside_a_type_keeps_plain_values(value: Any) -> None:
    order = Order("o", [], datetime(2030, 1, 1, tzinfo=UTC), extra=value)
    assert same(back(order, Order).extra, value)
    assert same(back({"a": value}, dict[str, Any])["a"], value)
    assert same(back([value], list), [value])
    assert same(back({"a": value}, dict), {"a": value})
    assert same(back((value,), tuple[Any, ...]), (value,))


documents = st.recursive(
    st.none() | numbers | texts,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(texts, inner)
        | st.builds(
            lambda tag, inside: {tag: inside},
            st.sampled_from(
                "$tuple $set $frozenset $bytes $datetime $date $time $timedelta $decimal $uuid $map $escape".split()
            ),
            inner,
        )
    ),
    max_leaves=10,
)


@given(documents)
@settings(max_examples=150, deadline=None)
def test_json_from_elsewhere_is_read_as_one_value_or_refused(document: Any) -> None:
    data = msgspec.json.encode(document)
    try:
        value = decode(data, what="it")
    except PayloadError:
        return
    assert same(back(value), value)


@pytest.mark.parametrize(
    "text",
    [
        '{"$set":[1,1]}', '{"$frozenset":[1,1.0]}', '{"$map":[[1,2],[1,3]]}', '{"$map":[[1]]}', '{"$map":[[[],1]]}',
        '{"$set":[[1]]}', '{"$tuple":{}}', '{"$bytes":"!"}', '{"$bytes":1}', '{"$datetime":5}',
        '{"$date":"2030-02-30"}',
        '{"$datetime":"2030-01-01T00:00:00Z[fold=1]"}', '{"$uuid":"x"}', '{"$decimal":1.5}', '{"$decimal":"x"}',
        '{"$timedelta":"1 day"}', '{"$escape":{"a":1}}', '{"$escape":{"a":1,"b":2}}', '{"$escape":[1]}', "nan", "",
    ],
)  # fmt: skip
def test_a_broken_tag_is_refused(text: str) -> None:
    with pytest.raises(PayloadError):
        decode(text, what="it")


def test_a_tag_written_with_escapes_is_a_tag() -> None:
    for text in ('{"\\u0024tuple":[1]}', b'[{"\\u0024tuple":[1]}]'):
        assert decode(text, what="it") in ((1,), [(1,)])


def test_an_unknown_tag_is_a_plain_object() -> None:
    assert decode('{"$oid":"5"}', what="it") == {"$oid": "5"}


@given(st.binary(max_size=60))
def test_garbage_is_refused_or_is_json(data: bytes) -> None:
    try:
        value = decode(data, what="it")
    except PayloadError:
        return
    assert same(back(value), value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ((1, 2), '{"$tuple":[1,2]}'),
        ({2, 1}, '{"$set":[1,2]}'),
        (frozenset("ba"), '{"$frozenset":["a","b"]}'),
        (b"ab", '{"$bytes":"YWI="}'),
        (datetime(2030, 1, 2, 3, 4, 5, 6, UTC), '{"$datetime":"2030-01-02T03:04:05.000006Z"}'),
        (datetime(2030, 1, 2), '{"$datetime":"2030-01-02T00:00:00"}'),
        (date(2030, 1, 2), '{"$date":"2030-01-02"}'),
        (time(3, 4), '{"$time":"03:04:00"}'),
        (timedelta(days=1, seconds=2), '{"$timedelta":"P1DT2S"}'),
        (Decimal("1.50"), '{"$decimal":"1.50"}'),
        (UUID(int=1), '{"$uuid":"00000000-0000-0000-0000-000000000001"}'),
        ({1: "a"}, '{"$map":[[1,"a"]]}'),
        ({"$tuple": [1]}, '{"$escape":{"$tuple":[1]}}'),
        ({"$new": 1}, '{"$escape":{"$new":1}}'),
        ({"$encoded": ["x"], "data": ""}, '{"$escape":{"$encoded":["x"],"data":""}}'),
        ({"$tuple": 1, "b": 2}, '{"$tuple":1,"b":2}'),
    ],
)
def test_the_stored_form_of_plain_types(value: Any, text: str) -> None:
    assert encode(value, what="it").decode() == text
    assert same(back(value), value)


@pytest.mark.parametrize(
    "value",
    [
        True, 1, 1.0, 0.0, -0.0, 5e-324, 1e22, 2**63, -(2**64) - 1, 10**400, "\0", "é\u2028😀",
        [True, 1, 1.0], {"a": True}, (True,), {1: True}, {True: 1}, {1.5: 0}, {None: 0}, {(1, "a"): b""},
        {"1": "a", 1: "b"}, timedelta.max, timedelta.min, -timedelta(microseconds=1),
        datetime.min, datetime.max, datetime.max.replace(tzinfo=UTC), datetime(2030, 11, 1, 1, 30, fold=1),
        datetime(1900, 1, 1, tzinfo=timezone(timedelta(minutes=19, seconds=32))), time(1, fold=1), time(1, tzinfo=UTC),
        Decimal("NaN"), Decimal("sNaN12"), Decimal("-Infinity"), Decimal("-0"), Decimal("1E+400"), Decimal("1.00"),
    ],
    ids=repr,
)  # fmt: skip
def test_values_at_the_edge_come_back(value: Any) -> None:
    assert same(back(value), value)


def test_a_zone_name_becomes_its_offset() -> None:
    summer = datetime(2030, 7, 1, 12, tzinfo=ZoneInfo("Europe/Berlin"))
    second_time = datetime(2030, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1)
    for moment in (summer, second_time):
        for annotation in (Any, datetime):
            kept = back(moment, annotation)
            assert kept.utcoffset() == moment.utcoffset()
            assert kept.timestamp() == moment.timestamp()


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (MyStr("a"), "a"),
        (MyInt(3), 3),
        (MyList([MyInt(1)]), [1]),
        (OrderedDict(a=1), {"a": 1}),
        (defaultdict(int, a=1), {"a": 1}),
        (Counter({MyStr("a"): 1}), {"a": 1}),
        (Level.HIGH, 2),
        (Word.A, "a"),
        ({Word.A: 1}, {"a": 1}),
        (Pair(1), (1, "r")),
    ],
)
def test_a_subclass_of_a_built_in_type_becomes_that_type(value: Any, plain: Any) -> None:
    assert same(back(value), plain)


class Nanoseconds(datetime):
    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = datetime.__hash__


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (math.nan, "nan is no number"),
        ([1, {"a": math.inf}], "at [1]['a']"),
        ("\ud800", "lone surrogate, U+D800"),
        ({"\udc80": 1}, "lone surrogate"),
        (("\udc80",), "lone surrogate"),
        (object(), "An object is no plain value"),
        (Line("a", Decimal(1)), "A Line is no plain value"),
        ([(1, Point(1))], "at [0][1]"),
        (Colour.RED, "A Colour is no plain value"),
        (bytearray(b""), "A bytearray"),
        ((n for n in [1]), "A generator"),
        (time(1, tzinfo=ZoneInfo("Europe/Berlin")), "gives no offset"),
        (datetime(2030, 1, 1, tzinfo=Away()), "gives no offset"),
        (Nanoseconds(2030, 1, 1), "holds more than a datetime"),
    ],
)
def test_what_cannot_come_back_is_refused_with_its_place(value: Any, words: str) -> None:
    assert words in refusal(value)


def test_an_int_that_python_will_not_print_is_refused() -> None:
    assert "int_max_str_digits" in refusal([10**5000])


def test_a_value_that_contains_itself_is_refused_by_that_name() -> None:
    items: list[Any] = [1]
    items.append({"again": items})
    assert "contains itself" in refusal(items)
    tree = Tree(1, [])
    tree.children.append(tree)
    assert "contains itself" in refusal(tree, Tree)


def test_a_set_is_written_in_the_same_order_by_every_process() -> None:
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from perdure.core.codec import encode, digest64\n"
        "words = set('abcdefgh')\n"
        "print(encode(words, what='it'), encode(words, annotation=set[str], what='it'), digest64((words,), {}))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True, text=True
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(seen) == 1


# --- limits


def test_size_is_limited_and_told_quickly() -> None:
    text = refusal("x" * 10_000_000)
    assert "10,000,002 bytes" in text
    assert "Limits(payload=)" in text
    assert refusal(("x" * 50,), payload=40)
    assert encode("x" * 38, what="it", limits=Limits(payload=40))
    with pytest.raises(LimitExceeded) as caught:
        encode("x" * 39, what="it", limits=Limits(payload=40))
    assert (caught.value.limit, caught.value.actual) == (40, 41)


def nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


@pytest.mark.parametrize("beside", [[], ["[[[{{{", "}]"], [[], [[]]] * 60])
def test_depth_is_limited_exactly(beside: Any) -> None:
    assert back([nested(99), beside]) == [nested(99), beside]
    assert "101 levels" in refusal([nested(100), beside])


def test_brackets_inside_strings_are_no_levels() -> None:
    assert back([nested(90), '\\"[' * 200])


@pytest.mark.parametrize("levels", [500, 100_000])
def test_any_depth_ends_in_a_refusal(levels: int) -> None:
    for annotation in (Any, list[Any]):
        assert "nested" in refusal([nested(levels)], annotation)
    with pytest.raises(LimitExceeded, match="nested"):
        check(b"[" * levels + b"]" * levels, "it")


def test_text_too_deep_for_the_process_is_refused_when_read() -> None:
    with pytest.raises(LimitExceeded, match="nested"):
        decode(b"[" * 100_000 + b"]" * 100_000, what="it")


def test_text_from_outside_can_be_checked() -> None:
    check('{"a": [1]}', "it", Limits(depth=2))
    with pytest.raises(LimitExceeded):
        check('{"a": [1]}', "it", Limits(depth=1))
    with pytest.raises(LimitExceeded):
        check('"ä"', "it", Limits(payload=3))


# --- with an annotation

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)

TYPED: list[tuple[Any, Any]] = [
    (Order, Order("o", [Line("a", Decimal("1.50"))], NOON)),
    (Order, Order("o", [], NOON.replace(tzinfo=None), extra=(1, {2}))),
    (list[Order], [Order("o", [], NOON)]),
    (Tree, Tree(1, [Tree(2, []), Tree(3, [Tree(4, [])])])),
    (Box[int], Box(3)),
    (Box[datetime], Box(NOON)),
    (Box[Box[Mixed]], Box(Box(Mixed.DAY))),
    (Unequal, Unequal(1.5)),
    (Hidden, Hidden(1, (1, 2))),
    (Computed, Computed(1)),
    (Parcel, Parcel(1.5, "wax")),
    (Point, Point(1, 2.0)),
    (Union[Cash, Card], Card("4111", {3, 1})),
    (Union[Cash, Card, None], None),
    (Row, Row(1, ("a", "b"))),
    (Renamed, Renamed("a")),
    (Renamed, Renamed("a", (1,))),
    (Colour, Colour.RED),
    (Mixed, Mixed.NUMBER),
    (Mixed, Mixed.PAIR),
    (list[Mixed], [Mixed.WORD, Mixed.DAY]),
    (Level, Level.LOW),
    (Rights, Rights.READ | Rights.WRITE),
    (Pair, Pair(1, "x")),
    (list[Pair], [Pair(1)]),
    (Movie, {"title": "M", "year": 1931}),
    (UserId, 5),
    (Literal["a", 1, None], 1),
    (Literal[1, True], True),
    (Literal[True, 1], 1),
    (Optional[Decimal], Decimal("2.50")),
    (int | None, None),
    (int | float, 1),
    (int | float, 1.0),
    (int | str | list[int] | dict[str, int], {"a": 1}),
    (datetime | str, NOON),
    (datetime | str, "2030-01-01T12:00:00Z"),
    (datetime | date | None, date(2030, 1, 1)),
    (str | bytes | None, b"a"),
    (Decimal | float, 1.5),
    (list[datetime | str], ["x", NOON]),
    (bytes, b"\0\xff"),
    (bytearray, bytearray(b"ab")),
    (UUID, UUID(int=5)),
    (date, date(2030, 1, 1)),
    (time, time(1, 2, 3, 4, UTC)),
    (time, time(1, fold=1)),
    (timedelta, timedelta(days=-3, microseconds=1)),
    (datetime, datetime(2030, 1, 1, fold=1)),
    (datetime, datetime(1900, 1, 1, tzinfo=timezone(timedelta(minutes=19, seconds=32)))),
    (Decimal, Decimal("sNaN")),
    (float, -0.0),
    (int, 2**70),
    (tuple[int, str], (1, "a")),
    (tuple[int, ...], (1, 2)),
    (tuple[()], ()),
    (set[int], {3, 1, 2}),
    (frozenset[str], frozenset("abc")),
    (set[tuple[int, str]], {(2, "a"), (1, "b")}),
    (dict[str, int], {"$tuple": 1}),
    (dict[str, int], {"$escape": 1}),
    (dict[int, str], {1: "a", -2: "b"}),
    (dict[UUID, int], {UUID(int=1): 1}),
    (dict[date, int], {date(2030, 1, 1): 1}),
    (dict[Colour, int], {Colour.RED: 1}),
    (dict[Level, int], {Level.HIGH: 1}),
    (dict[Mixed, int], {Mixed.DAY: 1}),
    (dict[tuple[int, int], str], {(1, 2): "a"}),
    (dict[float, str], {1.5: "a"}),
    (dict[bool, str], {True: "a"}),
    (dict[datetime, str], {NOON: "a"}),
    (dict[int | str, int], {1: 1, "1": 2}),
    (dict[Any, Any], {1: 2, "a": (1,)}),
    (typing.Mapping[str, int], {"a": 1}),
    (typing.Sequence[int], [1]),
    (typing.Annotated[int, msgspec.Meta(ge=1)], 1),
    (object, (1, 2)),
    (None, None),
]


@pytest.mark.parametrize(("annotation", "value"), TYPED, ids=lambda each: repr(each)[:60])
def test_the_annotation_decides(annotation: Any, value: Any) -> None:
    kept = back(value, annotation)
    assert type(kept) is type(value)
    if isinstance(value, Unequal):
        assert kept.x == value.x
    elif isinstance(value, Hidden):
        assert same(kept.secret, value.secret)
    else:
        assert same(kept, value)


@pytest.mark.parametrize(("annotation", "value"), TYPED, ids=lambda each: repr(each)[:60])
def test_the_quick_and_the_thorough_way_write_the_same(annotation: Any, value: Any) -> None:
    made: Plan = plan(annotation)
    quick = made.roundtrip(value, "it")[0]
    thorough = made._thorough(value, "it", Limits())[0]
    if isinstance(value, (Renamed, Parcel, Computed)):
        return  # msgspec leaves out defaults and has its own order of attrs fields.
    assert quick == thorough


@pytest.mark.parametrize(
    ("annotation", "given", "kept"),
    [
        (float, 1, 1.0),
        (float, MyInt(2), 2.0),
        (list[float], [1, 2.5], [1.0, 2.5]),
        (int, True, 1),
        (int, Level.HIGH, 2),
        (str, MyStr("a"), "a"),
        (str, Word.A, "a"),
        (dict[str, int], {MyStr("a"): True}, {"a": 1}),
        (list[int], (1, 2), [1, 2]),
        (tuple[int, ...], [1, 2], (1, 2)),
        (set[int], frozenset({1}), {1}),
        (bytes, bytearray(b"a"), b"a"),
        (dict[str, int], OrderedDict(a=1), {"a": 1}),
        (datetime | float, 3, 3.0),
        (tuple[int, str], Pair(1), (1, "r")),
        (Pair, (1, "r"), Pair(1)),
    ],
)
def test_what_nearly_fits_becomes_the_declared_type(annotation: Any, given: Any, kept: Any) -> None:
    assert same(back(given, annotation), kept)
    assert same(roundtrip(given, annotation, what="it")[1], kept)


def test_equal_inputs_have_equal_texts() -> None:
    assert encode(1, annotation=float, what="it") == encode(1.0, annotation=float, what="it") == b"1.0"
    assert encode([Point(1, 2)], annotation=list[Point], what="it") == b'[{"x":1,"y":2.0}]'


@pytest.mark.parametrize(
    ("annotation", "value", "words"),
    [
        (Order, BigOrder("o", [], NOON), "A BigOrder was given, a subclass of Order"),
        (list[Order], [BigOrder("o", [], NOON)], "at [0]"),
        (Order, {"id": "o", "lines": [], "at": "2030-01-01"}, "Order is expected, a dict was given"),
        (Order, Order("o", [Line("a", 1.5)], NOON), ".lines[0].price"),  # type: ignore[arg-type]  # on purpose
        (Doubling, Doubling(1), "would not come back as it was"),
        (Movie, {"title": "M", "year": 1, "stars": 5}, "no key 'stars'"),
        (Movie, {"title": "M"}, "'year' is missing"),
        (int, 1.0, "int is expected, a float was given"),
        (int, "1", "int is expected, a str was given"),
        (int, None, "None was given"),
        (str, 1, "str is expected"),
        (float, 2**53 + 1, "no equal float"),
        (float, 10**400, "no equal float"),
        (float | None, math.nan, "nan is no number"),
        (list[float | None], [math.inf], "inf is no number"),
        (Hidden, Hidden(1, math.nan), "nan is no number"),
        (date, NOON, "date is expected, a datetime was given"),
        (datetime, "2030-01-01T00:00:00Z", "datetime is expected"),
        (time, time(1, tzinfo=ZoneInfo("Europe/Berlin")), "gives no offset"),
        (datetime, datetime(2030, 1, 1, tzinfo=Away()), "gives no offset"),
        (Decimal, 1, "Decimal is expected"),
        (tuple[int, str], (1,), "2 elements are expected, there are 1"),
        (Colour, "red", "Colour is expected"),
        (Level, 1, "Level is expected, an int was given"),
        (Word, "a", "Word is expected, a str was given"),
        (Decimal | None, 1.5, "Decimal or None is expected"),
        (Literal["a"], "b", "'a' is expected"),
        (Literal[1], True, "1 is expected"),
        (datetime | str, 5, "is expected, an int was given"),
        (Union[Cash, Card], Point(1), "Cash or Card is expected"),
        (None, 5, "None is expected"),
        (list[str], ["a", "\ud800"], "lone surrogate"),
        (dict[float, int], {math.nan: 1}, "nan is no number"),
        (set[int], [1], "set is expected"),
        (typing.Annotated[int, msgspec.Meta(ge=1)], 0, ">= 1"),
    ],
)
def test_what_would_be_lost_or_does_not_fit_is_refused(annotation: Any, value: Any, words: str) -> None:
    assert words in refusal(value, annotation)


class Session:
    pass


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Union[Order, Line], "Order, Line look alike"),
        (Union[Order, Movie], "look alike"),
        (Union[Cash, Point], "look alike"),
        (list[int] | tuple[int, int], "look alike"),
        (datetime | Colour, "look alike"),
        (Session, "Session has no fields"),
        (list[Session], "Session"),
        (MyStr, "NewType"),
        (typing.Callable[[], int], "no fields"),
        (typing.Iterator[int], "no fields"),
        (complex, "complex"),
    ],
)
def test_an_annotation_that_cannot_be_stored_is_refused_when_the_plan_is_made(annotation: Any, words: str) -> None:
    with pytest.raises(PayloadError, match="cannot be stored") as caught:
        plan(annotation, what="the result of charge")
    assert words in str(caught.value)
    assert str(caught.value).startswith("The result of charge is annotated as")


def test_a_stored_value_that_no_longer_fits_names_its_place() -> None:
    with pytest.raises(PayloadError, match=r"at \.lines\[0\]\.price as Order"):
        decode('{"id":"o","lines":[{"sku":"a","price":[]}],"at":"2030-01-01T00:00:00"}', Order, what="it")
    with pytest.raises(PayloadError, match="'id' is missing"):
        decode("{}", Order, what="it")


def test_unknown_fields_of_a_stored_value_are_left_out() -> None:
    assert decode('{"x":1,"y":2.0,"z":3}', Point, what="it") == Point(1, 2.0)


def test_numbers_too_large_for_a_float_are_refused_when_read() -> None:
    for text in ("1e400", "[1e400]", '{"$tuple":[1e400]}'):
        with pytest.raises(PayloadError):
            decode(text, what="it")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="`type` is 3.12 syntax")
def test_a_type_alias_may_contain_itself() -> None:
    names: dict[str, Any] = {}
    exec("type Json = dict[str, Json] | list[Json] | str | int | None", names)
    assert back({"a": [1, {"b": None}]}, names["Json"]) == {"a": [1, {"b": None}]}
    assert "a float was given" in refusal({"a": [1.5]}, names["Json"])


# --- digests


def test_a_digest_of_arguments_knows_no_order_of_keys_and_sets() -> None:
    assert digest64((1, {"b": {1, 2}, "a": 1}), {"y": 1, "x": 2}) == digest64(
        (1, {"a": 1, "b": {2, 1}}), {"x": 2, "y": 1}
    )
    assert digest64((1,), {}) != digest64((2,), {})
    assert digest64((1,), {}) != digest64((), {"a": 1})
    assert len(digest64((Order("o", [], NOON),), {}) or "") == 16
    assert digest64((object(),), {}) is None
    assert digest64(("\ud800",), {}) is None
    itself: list[Any] = []
    itself.append(itself)
    assert digest64((itself,), {}) is None


def test_a_digest_of_stored_text_knows_no_blanks() -> None:
    assert digest128(b'[[],{"a":1,"b":2}]') == digest128('[ [], {"b":2, "a":1} ]')
    assert digest128(b"[[1],{}]") != digest128(b"[[1.0],{}]")
    assert len(digest128(b"[[],{}]")) == 32


# --- codec chain


class Deflate:
    name = "deflate"

    def encode(self, data: bytes, /) -> bytes:
        return zlib.compress(data)

    def decode(self, data: bytes, /) -> bytes:
        return zlib.decompress(data)


class Backwards:
    name = "backwards"

    def encode(self, data: bytes, /) -> bytes:
        return data[::-1]

    def decode(self, data: bytes, /) -> bytes:
        return data[::-1]


def test_a_chain_of_codecs_is_taken_off_in_reverse() -> None:
    text = encode({"a": (1, 2)}, what="it")
    stored = wrap(text, [Deflate(), Backwards()])
    document = json.loads(stored)
    assert document["$encoded"] == ["deflate", "backwards"]
    assert zlib.decompress(base64.b64decode(document["data"])[::-1]) == text
    assert unwrap(stored, [Backwards(), Deflate()], what="it") == text
    assert unwrap(stored.decode(), [Backwards(), Deflate()], what="it") == text
    assert wrap(text, []) is text
    assert unwrap(text, [Deflate()], what="it") is text


def test_a_codec_that_is_not_known_is_named() -> None:
    stored = wrap(b"1", [Deflate()])
    with pytest.raises(PayloadError, match='codec "deflate"'):
        unwrap(stored, what="it")
    with pytest.raises(PayloadError, match="codec that was not taken off"):
        decode(stored, what="it")


def test_a_value_that_looks_encoded_is_no_codec_output() -> None:
    value = {"$encoded": ["deflate"], "data": "eJwDAAAAAAE="}
    stored = encode(value, what="it")
    assert unwrap(stored, [Deflate()], what="it") is stored
    assert same(back(value), value)
