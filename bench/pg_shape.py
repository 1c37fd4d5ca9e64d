"""What one run writes to PostgreSQL, commit by commit, learned by watching as `shape.py` does it for SQLite.

The rows of a batch travel as the engine's do: one statement per table, its columns as packed binary arrays, taken
apart by `unnest`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
import psycopg
from psycopg.adapt import Dumper
from psycopg.pq import Format
from shape import WIDTH, Change, Row, Watch, changes, differing, expression, json_in

NOT_OF_A_RUN = "worker"
"""Tables with this word in their name hold heartbeats; they change at any time and belong to no run."""

FIRST = 1000
"""Runs of the floor are counted from here: the watched ones keep their keys."""

Values = Callable[[int, str], tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class Column:
    name: str
    type: str
    has_default: bool

    @property
    def travels_as(self) -> str:
        """The element type of the array that carries it; what has no binary form here goes as text and is cast."""
        return self.type if self.type in PACKERS else "text"


@dataclass(frozen=True, kw_only=True)
class Write:
    """One row inserted or updated in each run, in the statement `sql`; its columns travel as `types`."""

    sql: bytes
    types: tuple[str, ...]
    values: Values
    inserts: bool


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What each commit of a run writes, and one statement that leaves many finished runs (`%(runs)s` of them)."""

    commits: tuple[tuple[Write, ...], ...]
    fill: tuple[str, ...]

    def bare(self) -> tuple[tuple[Write, ...], ...]:
        """Only the rows that are inserted: nothing is updated."""
        return tuple(tuple(write for write in commit if write.inserts) for commit in self.commits)


class PostgresWatch(Watch):
    """Call `look()` before a run starts and after each of its commits, for two runs; then `postgres_shape()`."""

    def __init__(self, db: psycopg.Connection[Any]) -> None:
        super().__init__(db)
        self.columns = {table: self._columns(table) for table in self._tables()}
        self.keys = {table: self._key(table) for table in self.columns}

    def postgres_shape(self) -> Shape:
        half = len(self.looks) // 2
        first, second = self.looks[:half], self.looks[half:]
        pairs = zip(zip(first, first[1:]), zip(second, second[1:]), strict=True)  # noqa: B905, RUF007
        both = [list(zip(changes(*one), changes(*two), strict=True)) for one, two in pairs]
        inserted = [one[0] for commit in both for one, _ in commit if one[2] is None]
        commits = tuple(tuple(self._written(*pair, inserted) for pair in commit) for commit in both)
        left = zip(changes(first[0], first[-1]), changes(second[0], second[-1]), strict=True)
        fill = tuple(self._filled(*pair, inserted) for pair in left if pair[0][2] is None)
        return Shape(commits=commits, fill=fill)

    def _tables(self) -> list[str]:
        found = self.db.execute(
            """
            SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
            WHERE c.relkind = 'r' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema' ORDER BY 1
            """
        )
        return [name for (name,) in found if NOT_OF_A_RUN not in name]

    def _columns(self, table: str) -> list[Column]:
        found = self.db.execute(
            """
            SELECT attname, format_type(atttypid, atttypmod), atthasdef OR attidentity <> '' FROM pg_attribute
            WHERE attrelid = %s::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum
            """,
            [table],
        )
        return [Column(name=name, type=kind, has_default=given) for name, kind, given in found]

    def _key(self, table: str) -> list[str]:
        """The columns that name a row: the primary key, else another unique index over the whole table, else none."""
        found = self.db.execute(
            """
            SELECT array(SELECT attname::text FROM pg_attribute WHERE attrelid = indrelid AND attnum = ANY (indkey))
            FROM pg_index WHERE indrelid = %s::regclass AND indisunique AND indpred IS NULL AND indexprs IS NULL
            ORDER BY indisprimary DESC LIMIT 1
            """,
            [table],
        ).fetchone()
        return list(found[0]) if found else []

    def _rows(self, table: str) -> Iterator[tuple[Any, Row]]:
        columns, key = self.columns[table], self.keys[table]
        wanted = [f"{each.name}::{each.travels_as}" for each in columns]
        # Without a key only inserted rows can be told apart, by where they lie.
        for place, *values in self.db.execute(f"SELECT ctid::text, {', '.join(wanted)} FROM {table}"):
            row = dict(zip((each.name for each in columns), values, strict=True))
            yield tuple(row[name] for name in key) if key else place, row

    def _written(self, one: Change, two: Change, inserted: list[str]) -> Write:
        table, row, changed = one
        known = {each.name: each for each in self.columns[table]}
        if changed is None:
            names = [each.name for each in self._given(table, inserted)]
        else:
            names = [*self.keys[table], *changed]
        # NULL is no data; every other column is bound, equal or not, as a program that does not know it must.
        bound = [known[name] for name in names if row[name] is not None or two[1][name] is not None]
        arrays = ", ".join(f"%b::{each.travels_as}[]" for each in bound)
        source = f"unnest({arrays}) AS v ({', '.join(each.name for each in bound)})"
        cast = {each.name: f"v.{each.name}::{each.type}" for each in bound}
        if changed is None:
            sql = f"{_insert(table, cast)} SELECT {', '.join(cast.values())} FROM {source}"
        else:
            sets = ", ".join(f"{name} = {cast.get(name, 'NULL')}" for name in changed)
            same = " AND ".join(f"t.{name} = {cast[name]}" for name in self.keys[table])
            sql = f"UPDATE {table} AS t SET {sets} FROM {source} WHERE {same}"
        values = ", ".join(_in_python(row[each.name], two[1][each.name], each.type) for each in bound)
        return Write(
            sql=sql.encode(),
            types=tuple(each.travels_as for each in bound),
            values=eval(f"lambda n, s: ({values},)", {"encode": msgspec.json.encode}),
            inserts=changed is None,
        )

    def _filled(self, one: Change, two: Change, inserted: list[str]) -> str:
        """A statement that inserts this row for many runs that ended before: their numbers go down from the first."""
        table, row, _ = one
        columns = [each for each in self._given(table, inserted) if row[each.name] is not None]
        selected = [f"({_in_sql(row[each.name], two[1][each.name], each.type)})::{each.type}" for each in columns]
        numbers = "generate_series(1, %(runs)s::bigint) AS g"
        return f"{_insert(table, [each.name for each in columns])} SELECT {', '.join(selected)} FROM {numbers}"

    def _given(self, table: str, inserted: list[str]) -> list[Column]:
        """The columns that an insert names: a table that takes several rows per run numbers them itself."""
        itself = self.keys[table] if inserted.count(table) > 1 else []
        return [each for each in self.columns[table] if not (each.has_default and each.name in itself)]


def _insert(table: str, names: Iterable[str]) -> str:
    # Keys are given, also where the table would draw them itself.
    return f"INSERT INTO {table} ({', '.join(names)}) OVERRIDING SYSTEM VALUE"


def _in_python(one: Any, two: Any, kind: str) -> str:
    if kind == "uuid":
        return f"{one[:-WIDTH]!r} + s"
    return expression(one, two) if _is_own(one, two, kind) else repr(one)


def _in_sql(one: Any, two: Any, kind: str) -> str:
    """SQL for the column's value in the run number g of those that fill the table."""
    if not _is_own(one, two, kind) or json_in(one) is not None:
        # Nobody looks into the documents of these runs; ids and keys are what must differ.
        return _literal(one)
    if isinstance(one, int):
        return f"{one} - {FIRST} - g"
    place = len(one) - WIDTH if kind == "uuid" else differing(one, two)
    digits = f"lpad(g::text, {WIDTH}, '0')"
    if isinstance(one, bytes):
        digits = f"convert_to({digits}, 'UTF8')"
    return f"{_literal(one[:place])} || {digits} || {_literal(one[place + WIDTH :])}"


def _is_own(one: Any, two: Any, kind: str) -> bool:
    """Whether each run has its own value. Of what travels as text, only text itself can be made up."""
    if isinstance(one, bool) or not isinstance(one, (int, str, bytes)):
        return False
    return bool(one != two) and (not isinstance(one, str) or kind in ("text", "json", "jsonb", "uuid"))


def _literal(value: Any) -> str:
    if isinstance(value, bytes):
        return rf"'\x{value.hex()}'::bytea"
    if isinstance(value, str):
        quoted = value.replace("'", "''").replace("%", "%%")
        return f"'{quoted}'"
    return str(value)


# ---- packing


class Packed(bytes):
    """An array in PostgreSQL's binary form."""

    oid = 0


def fixed(element: int, array: int, code: str) -> Callable[[Sequence[Any]], Packed]:
    kind = packed_type(array)
    size = struct.calcsize(f">{code}")

    def pack(values: Sequence[Any]) -> Packed:
        flat: list[Any] = [size] * (2 * len(values))
        flat[1::2] = values
        return kind(_head(element, len(values)) + _alternating(code, len(values)).pack(*flat))

    return pack


def varying(element: int, array: int) -> Callable[[Sequence[Any]], Packed]:
    kind = packed_type(array)

    def pack(values: Sequence[Any]) -> Packed:
        data = [value.encode() if isinstance(value, str) else value for value in values]
        parts = [b""] * (2 * len(data))
        parts[::2] = map(_length, map(len, data))
        parts[1::2] = data
        return kind(_head(element, len(data)) + b"".join(parts))

    return pack


def _head(element: int, length: int) -> bytes:
    return struct.pack(">iiiii", 1, 0, element, length, 1)


@cache
def _alternating(code: str, length: int) -> struct.Struct:
    return struct.Struct(f">{f'i{code}' * length}")


@cache
def _length(length: int) -> bytes:
    return struct.pack(">i", length)


@cache
def packed_type(array: int) -> type[Packed]:
    """A type of its own for each kind of array, because psycopg chooses the type that it names by ours."""
    made = type(f"Packed{array}", (Packed,), {"oid": array})
    dumper = type(f"Dumper{array}", (PackedDumper,), {"oid": array})
    psycopg.adapters.register_dumper(made, dumper)
    return made


class PackedDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: Any) -> bytes:
        return bytes(obj)


PACKERS: dict[str, Callable[[Sequence[Any]], Packed]] = {
    "bigint": fixed(20, 1016, "q"),
    "integer": fixed(23, 1007, "i"),
    "smallint": fixed(21, 1005, "h"),
    "boolean": fixed(16, 1000, "?"),
    "double precision": fixed(701, 1022, "d"),
    "bytea": varying(17, 1001),
    "text": varying(25, 1009),
}


def packed(write: Write, rows: Iterable[tuple[Any, ...]]) -> list[Packed]:
    return [PACKERS[kind](column) for kind, column in zip(write.types, zip(*rows, strict=True), strict=True)]
