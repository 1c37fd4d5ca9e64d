"""What one call of a prune looks at and chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from perdure.core.turn import Retention
from perdure.stores.retention import LOOKED_AT, PIECE, Seen, chosen

BEFORE = 1_000_000


def asked(limit: int = 50, after: int = 0, *, dry_run: bool = False) -> Retention:
    return Retention(namespace="default", ended_before=BEFORE, limit=limit, after=after, dry_run=dry_run)


def store(goes: Sequence[bool], *, events: int = 8) -> tuple[Callable[[int, int], list[Seen]], list[int]]:
    """Runs 1, 2, 3 … that may go or not; how many were looked at, each time."""
    looks: list[int] = []

    def look(after: int, number: int) -> list[Seen]:
        seen = [(key, key, each, events, 0) for key, each in enumerate(goes, 1) if key > after][:number]
        looks.append(len(seen))
        return seen

    return look, looks


def test_where_all_may_go_one_more_than_go_is_looked_at() -> None:
    look, looks = store([True] * 10_000)
    assert chosen(look, asked()) == (list(range(1, 51)), None, 50)
    assert looks == [51]


def test_past_many_that_stay_in_few_looks_and_not_for_ever() -> None:
    look, looks = store([False] * 10_000)
    runs, piece, after = chosen(look, asked())
    assert (runs, piece, after) == ([], None, sum(looks))
    assert LOOKED_AT <= sum(looks) < 3 * LOOKED_AT
    assert len(looks) <= 4


def test_those_that_go_are_found_behind_those_that_stay() -> None:
    look, _ = store([False] * 60 + [True] * 3)
    assert chosen(look, asked()) == ([61, 62, 63], None, None)


def test_calls_that_go_on_choose_each_run_once() -> None:
    goes = [number % 7 in (1, 4) for number in range(1, 5_001)]
    look, _ = store(goes)
    found: list[int] = []
    after: int | None = 0
    while after is not None:
        runs, _, after = chosen(look, asked(limit=9, after=after))
        found += runs
    assert found == [number for number, each in enumerate(goes, 1) if each]


def test_one_that_was_created_later_ends_the_walk() -> None:
    def look(after: int, number: int) -> list[Seen]:
        return [
            (key, BEFORE if key == after + number else key, True, 1, 0) for key in range(after + 1, after + number + 1)
        ]

    runs, _, after = chosen(look, asked(limit=LOOKED_AT))
    assert (len(runs), after) == (LOOKED_AT, None)


def test_a_history_too_large_for_one_call_goes_in_pieces_after_what_is_before_it() -> None:
    look, _ = store([True, True, True], events=PIECE - 1)
    assert chosen(look, asked()) == ([1], None, 1)
    look, _ = store([True], events=PIECE + 1)
    assert chosen(look, asked()) == ([], (1, PIECE + 1, 0), 0)
    assert chosen(look, asked(dry_run=True)) == ([1], None, None)
