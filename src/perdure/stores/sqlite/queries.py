"""The statements of the `.sql` files, by name.

`-- name: x` begins a statement; the comment below it says what it is for. `/* columns */` stands for the fragment of
that name, so that a run's row is spelled once.
A statement with `VALUES (?, …)` takes many rows: `Rows` repeats the bracket and runs it in few executions, since each
execution gives up the GIL and each new text is compiled anew.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from sqlite3 import Cursor
from typing import Any, Final, Protocol

_NAME: Final = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)
_FRAGMENT: Final = re.compile(r"/\* (\w+) \*/")
_BRACKET: Final = re.compile(r"VALUES (\((?:\?, )*\?\))")


def _load() -> dict[str, str]:
    statements: dict[str, str] = {}
    for file in sorted(resources.files(__package__).iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".sql") or file.name[0].isdigit():
            continue
        _, *parts = _NAME.split(file.read_text(encoding="utf-8"))
        for name, body in zip(parts[::2], parts[1::2], strict=True):
            lines = [line for line in body.splitlines() if not line.startswith("--")]
            if name in statements:
                raise ValueError(f"two statements are named {name}")
            statements[name] = "\n".join(lines).strip().rstrip(";")
    return {name: _FRAGMENT.sub(lambda match: statements[match.group(1)], text) for name, text in statements.items()}


SQL: Final = _load()

SINGLY: Final = {name: text.replace("json_group_array(", "(", 1) for name, text in SQL.items()}
"""The same with one JSON text for each row found, where one text could not hold them all."""

SIZES: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""How many rows one execution takes; the next size up is filled with nulls, which match and insert nothing."""

_NEXT_SIZE: Final = tuple(next(size for size in SIZES if size >= max(rows, 1)) for rows in range(SIZES[-1] + 1))


class Database(Protocol):
    """What statements are executed on: a connection of ours, or one that was handed in (`borrowed.Plain`)."""

    def execute(self, statement: str, parameters: Sequence[Any] = ..., /) -> Cursor:
        """As `sqlite3.Connection.execute`; rows are tuples."""


class Rows:
    """A statement over many rows of parameters."""

    def __init__(self, name: str) -> None:
        text = SQL[name]
        match = _BRACKET.search(text)
        assert match is not None, name
        bracket = match.group(1)
        self.width: Final = bracket.count("?")
        self._text: Final = {size: text.replace(bracket, ", ".join([bracket] * size), 1) for size in SIZES}

    def text(self, rows: int) -> str:
        return self._text[rows]

    def run(self, db: Database, values: list[Any], *, last: Sequence[Any] = ()) -> int:
        """Execute over flat `values`, `width` of them to a row; how many rows of the database it touched.

        last: parameters that stand behind the rows in the text.
        """
        width = self.width
        full = SIZES[-1] * width
        if len(values) <= full:
            return self._once(db, values, last)
        return sum(self._once(db, values[at : at + full], last) for at in range(0, len(values), full))

    def _once(self, db: Database, values: list[Any], last: Sequence[Any]) -> int:
        width = self.width
        rows = len(values) // width
        size = _NEXT_SIZE[rows]
        if size != rows:
            values = values + [None] * ((size - rows) * width)
        return db.execute(self._text[size], [*values, *last] if last else values).rowcount
