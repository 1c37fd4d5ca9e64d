"""What one run writes to SQLite, commit by commit, learned by watching instead of copied by hand.

`watch` looks at every table after each commit of two runs that do the same. What differs between the two belongs to
the run (its key, id, seed, times, payload) and is bound anew for every run of the floor; what is equal is written as
it was. So the floor follows the engine's schema, indexes, columns and payloads without a line to keep in step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import msgspec

Row = dict[str, Any]
Tables = dict[str, dict[Any, Row]]
WIDTH = 8
"""Digits by which the floor tells its runs apart inside a text."""


@dataclass(frozen=True, kw_only=True)
class Write:
    """One row inserted or updated in each run: `head` + as many `row`s as there are runs in the batch + `tail`."""

    head: str
    row: str
    tail: str
    values: Callable[[int, str], tuple[Any, ...]]
    columns: int


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The tables, and what each commit of a run writes into them."""

    schema: tuple[str, ...]
    commits: tuple[tuple[Write, ...], ...]

    @property
    def rows(self) -> int:
        """Rows inserted or updated by one run."""
        return sum(map(len, self.commits))


class Watch:
    """Call `look()` before a run starts and after each of its commits, for two runs; then `shape()`."""

    def __init__(self, db: Any) -> None:
        self.db = db
        self.looks: list[Tables] = []

    def look(self) -> None:
        self.looks.append({name: dict(self._rows(name)) for name in self._tables()})

    def shape(self) -> Shape:
        half = len(self.looks) // 2
        first, second = self.looks[:half], self.looks[half:]
        pairs = zip(zip(first, first[1:]), zip(second, second[1:]), strict=True)  # noqa: B905, RUF007
        both = [list(zip(changes(*one), changes(*two), strict=True)) for one, two in pairs]
        inserted = [one[0] for commit in both for one, _ in commit if one[2] is None]
        commits = tuple(tuple(self._write(*pair, inserted) for pair in commit) for commit in both)
        made = self.db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite_%'")
        return Shape(schema=tuple(sql for (sql,) in made), commits=commits)

    def _tables(self) -> list[str]:
        return [
            name
            for (name,) in self.db.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name"
            )
        ]

    def _key(self, table: str) -> list[str]:
        """The columns that name a row: the primary key, or the hidden rowid."""
        keyed = [(pk, name) for _, name, _, _, _, pk in self.db.execute(f"PRAGMA table_info({table})") if pk]
        return [name for _, name in sorted(keyed)] or ["rowid"]

    def _rows(self, table: str) -> Iterator[tuple[Any, Row]]:
        key = self._key(table)
        found = self.db.execute(f"SELECT {', '.join(key)}, * FROM {table}")
        names = [name for name, *_ in found.description][len(key) :]
        for values in found:
            yield values[: len(key)], dict(zip(names, values[len(key) :], strict=True))

    def _write(self, one: Change, two: Change, inserted: list[str]) -> Write:
        table, row, changed = one
        key = self._key(table)
        if changed is None:
            # A table that takes several rows per run numbers them itself: n would not be theirs alone.
            own = [name for name in row if inserted.count(table) == 1 or [name] != key]
            return _compiled([(row[name], two[1][name]) for name in own], insert=(table, own))
        if not row.keys() >= set(key):
            raise ValueError(f"{table} is updated but has no primary key; the floor cannot name its rows")
        names = [*key, *changed]
        return _compiled([(row[name], two[1][name]) for name in names], update=(table, key, changed))


Change = tuple[str, Row, "list[str] | None"]


def changes(before: Tables, after: Tables) -> list[Change]:
    """Rows that are new (None), or the columns that were changed, in the order of tables and keys."""
    found: list[Change] = []
    for table, rows in after.items():
        for key, row in sorted(rows.items()):
            old = before.get(table, {}).get(key)
            if old is None:
                found.append((table, row, None))
            elif old != row:
                found.append((table, row, [name for name in row if row[name] != old[name]]))
    return found


def _compiled(
    pairs: list[tuple[Any, Any]],
    *,
    insert: tuple[str, list[str]] | None = None,
    update: tuple[str, list[str], list[str]] | None = None,
) -> Write:
    """The statement of one write, and a function from the run's number to what is bound in it.

    The function is compiled from text, because a floor that spends its time in our loops would be too low.
    """
    # NULL is no data; every other column is bound, equal or not, as a program that does not know its values must.
    slots = ["NULL" if one is None and two is None else "?" for one, two in pairs]
    bound = [expression(one, two) for one, two in pairs if one is not None or two is not None]
    values = eval(f"lambda n, s: ({''.join(each + ', ' for each in bound)})", {"encode": msgspec.json.encode})
    if insert:
        table, names = insert
        head, tail = f"INSERT INTO {table} ({', '.join(names)}) VALUES ", ""
    else:
        assert update
        table, key, changed = update
        numbered = {name: f"column{place}" for place, name in zip(count(1), [*key, *changed])}
        sets = ", ".join(f"{name} = v.{numbered[name]}" for name in changed)
        head = f"UPDATE {table} SET {sets} FROM (VALUES "
        tail = ") AS v WHERE " + " AND ".join(f"{table}.{name} = v.{numbered[name]}" for name in key)
    return Write(head=head, row=f"({', '.join(slots)})", tail=tail, values=values, columns=len(bound))


def expression(one: Any, two: Any) -> str:
    """Python for the column's value in run number n (s: the same as a text), as long as the one that was seen.

    JSON is built and encoded for each run, never pasted: no program is spared that.
    """
    parsed = json_in(one), json_in(two)
    if all(isinstance(each, (dict, list)) for each in parsed):
        encoded = f"encode({_inside(*parsed)})"
        return f"{encoded}.decode()" if isinstance(one, str) else encoded
    return _inside(one, two)


def json_in(value: Any) -> Any:
    try:
        return msgspec.json.decode(value) if isinstance(value, (str, bytes)) else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _inside(one: Any, two: Any) -> str:
    if isinstance(one, dict) and isinstance(two, dict) and list(one) == list(two):
        return "{" + ", ".join(f"{name!r}: {_inside(one[name], two[name])}" for name in one) + "}"
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        return "[" + ", ".join(map(_inside, one, two)) + "]"
    if one == two or type(one) is not type(two):
        return repr(one)
    if isinstance(one, int):
        return f"{one} + n"
    if not isinstance(one, (str, bytes)):
        return repr(one)
    place = differing(one, two)
    number = "s" if isinstance(one, str) else "s.encode()"
    return f"{one[:place]!r} + {number} + {one[place + WIDTH :]!r}"


def differing(one: str | bytes, two: str | bytes) -> int:
    """Where in a text the number of its run is put: at the first difference, or as far behind as it fits."""
    place = next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), 0)  # noqa: B905
    return max(0, min(place, len(one) - WIDTH))
