"""URL -> store. The same default everywhere: what is passed, else `PERDURE_STORE`, else `sqlite:///perdure.db`.

sqlite:///orders.db         a file beside the process (three slashes: relative)
sqlite:////var/lib/o.db     an absolute path (four)
sqlite:///o.db?busy_timeout=10    query parameters are the constructor's names
postgresql://me@host/orders?schema=perdure    as libpq reads it; what is no name of the constructor's is libpq's
memory://                   gone with the process
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, unquote

from perdure.core.errors import NotAStore, quoted
from perdure.stores.contract import Store
from perdure.stores.schema import Schema

if TYPE_CHECKING:
    from perdure.stores.postgres import PostgresStore

DEFAULT: Final = "sqlite:///perdure.db"
VARIABLE: Final = "PERDURE_STORE"
POSTGRES: Final = ("postgresql", "postgres")


def open_store(url_or_store: str | Store | None = None) -> Store:
    """The store that a URL names; a store object as it is.

    `NotAStore` for a URL that names none: its text says what is wrong with it and how it is written.
    """
    if url_or_store is None:
        return _opened(os.environ.get(VARIABLE, DEFAULT), said_by=f"in {VARIABLE}")
    if isinstance(url_or_store, str):
        return _opened(url_or_store, said_by="given")
    checked = check_store(url_or_store)
    assert checked is not None
    assert not isinstance(checked, str)
    return checked


def check_store(given: str | Store | None) -> str | Store | None:
    """What was given, if it can name a store or be one; `NotAStore` if it is something else."""
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, os.PathLike):
        raise NotAStore(
            f"{os.fspath(given)!r} is a path, no store URL. A store is a URL or a store object. "
            "Write sqlite:///relative.db or sqlite:////absolute.db, or pass SQLiteStore(path)."
        )
    if isinstance(given, type) or not (hasattr(given, "write") and hasattr(given, "claim")):
        what = "A list" if isinstance(given, (list, tuple)) else f"{given!r}"
        raise NotAStore(
            f"{what} is no store. A store is a URL or a store object, and comes first. "
            f'Write "{DEFAULT}", or pass SQLiteStore(path).'
        )
    return given


def _opened(url: str, *, said_by: str) -> Store:
    if not url.strip():
        raise NotAStore(
            f"The store URL {said_by} is empty. An empty one names no store. "
            f"Write {DEFAULT} or memory://, or leave it out for {DEFAULT}."
        )
    scheme, separator, rest = url.partition(":")
    if not separator or scheme not in ("sqlite", "memory", *POSTGRES):
        # Only the scheme is repeated: the rest of a URL may hold a password.
        what = f"has the scheme {quoted(scheme)}" if separator else "has no scheme"
        raise NotAStore(
            f"The store URL {said_by} {what}. The schemes are sqlite, postgresql and memory. "
            "Write sqlite:///relative.db, sqlite:////absolute.db, postgresql://user@host/database or memory://."
        )
    if scheme in POSTGRES:
        return _postgres(url)
    path, _, query = rest.partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    return _sqlite(url, path, given) if scheme == "sqlite" else _memory(url, path, given)


def schema_of(url: str) -> Schema:
    """Which migrations have made a store's tables, and which are still to come; nothing is created or changed."""
    scheme = url.partition(":")[0]
    if scheme in POSTGRES:
        return postgres_class().schema_of(*_postgres_settings(url))
    path = url.partition("?")[0]
    if scheme == "sqlite" and path.startswith("sqlite:///"):
        from perdure.stores.sqlite import migrations

        return migrations.look(os.path.realpath(unquote(path[10:])), path)
    _opened(url, said_by="given").close()
    return Schema(url=path)


def _memory(url: str, path: str, given: Mapping[str, str]) -> Store:
    from perdure.stores.memory import MemoryStore

    if path not in ("//", "///"):
        raise NotAStore(f"{quoted(url)} names something in memory. A store in memory has no name: write memory://.")
    return MemoryStore(**_settings(url, MemoryStore, given))


def _sqlite(url: str, path: str, given: Mapping[str, str]) -> Store:
    if not path.startswith("///") or path == "///":
        raise NotAStore(
            f"{quoted(url)} names no file. Three slashes come before a relative path and four before an absolute one. "
            "Write sqlite:///relative.db or sqlite:////absolute.db."
        )
    file = unquote(path[3:])
    if file == ":memory:":
        raise NotAStore(f"{quoted(url)} names no file. A store in memory is a store of its own: write memory://.")
    from perdure.stores.sqlite.store import SQLiteStore

    settings = _settings(url, SQLiteStore, given)
    try:
        return SQLiteStore(file, **settings)
    except ValueError as error:
        raise NotAStore(f"{quoted(url)} cannot be opened: {error}. Mend that parameter or leave it out.") from error


def _postgres(url: str) -> Store:
    store = postgres_class()
    address, settings = _postgres_settings(url)
    try:
        return store(address, **settings)
    except ValueError as error:
        shown = quoted(_without_password(url))
        raise NotAStore(f"{shown} cannot be opened: {error}. Mend that parameter or leave it out.") from error


def by_name(name: str) -> Any:
    """`PostgresStore`, as an attribute of the package: imported when it is first asked for."""
    if name != "PostgresStore":
        raise AttributeError(f"module 'perdure' has no attribute {name!r}")
    return postgres_class()


def postgres_class() -> type[PostgresStore]:
    """The class; `NotAStore` if its driver is not installed."""
    try:
        from perdure.stores.postgres import PostgresStore
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "psycopg":
            raise
        raise NotAStore(
            "A store in PostgreSQL was asked for, and psycopg, which speaks to it, is not installed. "
            "It is an extra of Perdure. Install it: pip install 'perdure[postgres]'"
        ) from error
    return PostgresStore


def _postgres_settings(url: str) -> tuple[str, dict[str, Any]]:
    """The URL for libpq, and the arguments for the store that stood in it."""
    store = postgres_class()
    ours = set(inspect.signature(store).parameters) - {"url", "clock", "password"}
    base, _, query = url.partition("?")
    given: dict[str, str] = {}
    theirs: list[str] = []
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        if name in ours:
            given[name] = unquote(value)
        else:
            theirs.append(part)
    direct = given.pop("direct", None)
    settings = _settings(_without_password(base), store, given)
    return f"{base}?{'&'.join(theirs)}" if theirs else base, {"direct": direct, **settings}


def _without_password(url: str) -> str:
    return url.partition("?")[0].rpartition("@")[2]


def _settings(url: str, store: type, given: Mapping[str, str]) -> dict[str, Any]:
    """The query parameters as arguments for the store's constructor, read as what its defaults are."""
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(store).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and isinstance(parameter.default, (str, int, float))
    }
    settings = {}
    for name, text in given.items():
        if name not in known:
            raise NotAStore(
                f"{quoted(url)} has the parameter {quoted(name)}, which is none of this store's. "
                f"Its parameters are: {', '.join(sorted(known)) or 'none'}. Mend its name or leave it out."
            )
        try:
            settings[name] = _read(text, like=known[name])
        except ValueError:
            raise NotAStore(
                f"{quoted(url)} has {name}={text}, which cannot be read. "
                f"The default is {known[name]!r}: write something of that kind, or leave it out."
            ) from None
    return settings


def _read(text: str, *, like: str | float) -> str | float:
    if isinstance(like, bool):
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError(text)
        return text.lower() in ("true", "1")
    if isinstance(like, (int, float)):
        try:
            return int(text)
        except ValueError:
            return float(text)  # `busy_timeout=0.5`, though its default is a whole number
    return text
