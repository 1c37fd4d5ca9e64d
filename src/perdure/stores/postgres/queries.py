"""The statements of the `.sql` files, by name, for one schema.

`-- name: x` begins a statement; the comment below it says what it is for. `/* columns */` stands for the fragment of
that name, so that a run's row is spelled once. `perdure.` is replaced by the store's own schema, and `$x::type` is a
parameter, whose type is said where it stands.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from hashlib import blake2b
from importlib import resources
from typing import Final, NamedTuple

from perdure.core.errors import NotAStore

_NAME: Final = re.compile(r"^-- name: (\w+)\n", re.MULTILINE)
_FRAGMENT: Final = re.compile(r"/\* (\w+) \*/")
_PARAMETER: Final = re.compile(r"\$(\w+)::(\w+(?:\[\])?)")
_OURS: Final = re.compile(r"\bperdure\.")
LONGEST: Final = 63
"""Letters of a name in the database."""
_SCHEMA: Final = re.compile(r"[a-z_][a-z0-9_]{0,62}\Z")


class Statement(NamedTuple):
    """One statement: its text with $1, $2 …, and the same with %(name)s; its parameters and their types in order."""

    name: str
    text: str
    named: str
    parameters: tuple[str, ...]
    types: tuple[str, ...]


def check_schema(schema: str) -> str:
    """The name of a schema as it may stand in a statement; `NotAStore` if it is not made of plain letters."""
    if not _SCHEMA.match(schema) or schema.startswith("pg_") or schema == "information_schema":
        raise NotAStore(
            f"schema={schema!r} is no name for a schema of Perdure's. It may have lower-case letters, digits and "
            "underscores, at most 63, must not begin with a digit, nor with pg_, nor be the server's own. Choose such "
            "a name."
        )
    return schema


def channel_of(schema: str) -> str:
    """The channel of a schema's notifications. Long names are shortened: a channel has at most 63 letters."""
    name = f"perdure_{schema}"
    return name if len(name) <= LONGEST else f"perdure_{blake2b(schema.encode(), digest_size=16).hexdigest()}"


def in_schema(text: str, schema: str) -> str:
    """The text with the schema's name, quoted, since it may be a word of SQL."""
    return _OURS.sub(f'"{check_schema(schema)}".', text)


@functools.cache
def statements(schema: str) -> Mapping[str, Statement]:
    """All statements, by name, on the tables of this schema."""
    return {name: _statement(name, in_schema(text, schema)) for name, text in _TEXTS.items() if name not in FRAGMENTS}


def _statement(name: str, text: str) -> Statement:
    types: dict[str, str] = {}
    for parameter, type in _PARAMETER.findall(text):
        if types.setdefault(parameter, type) != type:
            raise ValueError(f"${parameter} of {name} has two types")
    numbers = {parameter: number for number, parameter in enumerate(types, 1)}
    return Statement(
        name,
        _PARAMETER.sub(lambda match: f"${numbers[match.group(1)]}::{match.group(2)}", text),
        _PARAMETER.sub(lambda match: f"%({match.group(1)})s::{match.group(2)}", text.replace("%", "%%")),
        tuple(types),
        tuple(types.values()),
    )


def _load() -> dict[str, str]:
    found: dict[str, str] = {}
    for file in sorted(resources.files(__package__).iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".sql") or file.name[0].isdigit():
            continue
        _, *parts = _NAME.split(file.read_text(encoding="utf-8"))
        for name, body in zip(parts[::2], parts[1::2], strict=True):
            lines = [line for line in body.splitlines() if not line.lstrip().startswith("--")]
            if name in found:
                raise ValueError(f"two statements are named {name}")
            found[name] = "\n".join(lines).strip().rstrip(";")
    return {name: _FRAGMENT.sub(lambda match: found[match.group(1)], text) for name, text in found.items()}


FRAGMENTS: Final = frozenset({"columns", "disconnected", "message", "turn_fence", "turn_state"})
_TEXTS: Final = _load()
