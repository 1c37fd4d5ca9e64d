"""How every connection of ours is made and set, and what the server is asked first."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from perdure.core.errors import NO_THREAD, NotAStore, StoreError, StoreReadOnly, StoreUnavailable
from perdure.stores.postgres.queries import statements

log = logging.getLogger(__name__)

OLDEST: Final = 130000
FIRST_PAUSE, LAST_PAUSE = 0.05, 2.0
"""Seconds between two tries to connect, of all threads together, while the server is away."""
ASKED_AGAIN: Final = 60_000_000_000
"""Nanoseconds after which the server is asked again what time it is."""

DEFAULTS: Final[Mapping[str, str]] = {
    "application_name": "perdure",
    "connect_timeout": "10",
    # A connection whose other end is gone without a word is found out in 15 s, not in two hours.
    "keepalives_idle": "10",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
    "client_encoding": "UTF8",
}

SETTINGS: Final[Mapping[str, str]] = {
    # Every statement of ours finds its rows by an index, one after the other, and shall do so also where the planner
    # knows nothing of a table yet, or believes it to be small. A plan that reads a table of runs costs 3 to 4 times.
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
    "default_transaction_isolation": "read committed",
    "lock_timeout": "10s",
    "statement_timeout": "60s",
    # Our transactions are a few statements long. One that stands still belongs to a process that is stopped, and what
    # it has locked nobody else can take over.
    "idle_in_transaction_session_timeout": "5s",
    # The server's side of the same: a machine that is gone without a word gives its locks back.
    "tcp_keepalives_idle": "10",
    "tcp_keepalives_interval": "2",
    "tcp_keepalives_count": "3",
}
"""Of every session of ours; behind a pooler of every transaction that writes."""


class Server(NamedTuple):
    """What a server says of itself and of the connection."""

    version: int
    durability: str
    pooled: bool
    """Whether somebody stands between: then sessions are not ours, only transactions are."""


class Address:
    """Where the database is, and how to connect to it."""

    def __init__(self, url: str, *, password: str | Callable[[], str] | None, shown: Mapping[str, str]) -> None:
        try:
            self.parameters: Final[dict[str, Any]] = conninfo_to_dict(url)
        except psycopg.ProgrammingError:
            # Its text may repeat the URL, password and all.
            unknown = _unknown(url)
            why = (
                f"The driver knows no parameter {', '.join(unknown)}."
                if unknown
                else "Perhaps a character in it must be percent-encoded."
            )
            raise NotAStore(
                f"The store URL cannot be read as one of PostgreSQL. {why} It is written "
                "postgresql://user@host:5432/database?sslmode=verify-full."
            ) from None
        for name in ("port", "connect_timeout"):
            for number in str(self.parameters.get(name) or "0").split(","):
                if not (number.isascii() and number.isdigit()) or int(number) > 65535:
                    raise NotAStore(
                        f"The store URL has {name}={number}. That is no number between 0 and 65535. "
                        "It is written postgresql://user@host:5432/database?connect_timeout=10."
                    )
        encoding = str(self.parameters.get("client_encoding") or "UTF8")
        if encoding.upper() not in ("UTF8", "UTF-8", "UNICODE"):
            raise NotAStore(
                f"The store URL has client_encoding={encoding}. Perdure's texts are UTF-8, and its connections speak "
                "it. Leave that parameter out."
            )
        self._password = password
        self._trying = threading.Lock()
        self._pause = 0.0
        self._next_try = 0.0
        self._last_error: psycopg.OperationalError | StoreUnavailable = psycopg.OperationalError()
        self.url: Final = _shown(self.parameters, shown)
        """Without a password."""

    def secret(self, more: Mapping[str, str]) -> str:
        """A URL with everything, also the password as it is now, and these parameters. Not to be shown."""
        password = self._password_now()
        return _url({**self.parameters, **({} if password is None else {"password": password})}, more)

    def connect(self, *, autocommit: bool = True, name: str = "") -> psycopg.Connection[Any]:
        """A new connection; a password that is a function is asked each time.

        While the server is away, only one try in a while goes out, for all threads: between two of them the answer is
        the error of the last.
        """
        with self._trying:
            left = self._next_try - time.monotonic()
            if left > 0:
                text = f"{str(self._last_error).strip()} (tried again in {left:.1f} s)"
                if isinstance(self._last_error, StoreUnavailable):
                    raise StoreUnavailable(text, store=self.url)
                raise psycopg.OperationalError(text)
            if self._pause:
                # This try is the one; others wait for what comes of it.
                self._next_try = time.monotonic() + self._pause
        try:
            db = self._connect(autocommit=autocommit, name=name)
        except (psycopg.OperationalError, StoreUnavailable) as error:
            with self._trying:
                self._pause = min(max(self._pause * 2, FIRST_PAUSE), LAST_PAUSE)
                self._next_try = time.monotonic() + self._pause
                self._last_error = error
            raise
        self._pause = self._next_try = 0.0
        return db

    def forget(self) -> None:
        """In a forked child: a thread of the parent's may have been connecting."""
        self._trying = threading.Lock()

    def _password_now(self) -> str | None:
        if not callable(self._password):
            return self._password
        try:
            password: Any = self._password()  # Callers are not all type-checked.
        except Exception as error:
            raise StoreUnavailable(
                f"The store {self.url} could not be connected to. The function given as password= raised "
                f"{type(error).__name__}: {error}. It is asked again at the next try.",
                store=self.url,
            ) from error
        if not isinstance(password, str):
            raise NotAStore(
                f"The store {self.url} could not be connected to. The function given as password= returned a value of "
                f"type {type(password).__name__}, which is no password. Return a str.",
                store=self.url,
            )
        return password

    def _connect(self, *, autocommit: bool, name: str) -> psycopg.Connection[Any]:
        given = {name: value for name, value in self.parameters.items() if value is not None}
        settings = {**DEFAULTS, **({"application_name": f"perdure {name}"} if name else {}), **given}
        if "PGAPPNAME" in os.environ and "application_name" not in given:
            del settings["application_name"]
        password = self._password_now()
        if password is not None:
            settings["password"] = password
        return psycopg.connect(make_conninfo(**settings), autocommit=autocommit, prepare_threshold=None)


def ask_server(db: psycopg.Connection[Any], url: str) -> tuple[Server, int]:
    """What the server says, and its clock; an error with a sentence if it cannot be a store."""
    asked = statements("perdure")["server"].named
    row = db.execute(asked.encode()).fetchone()
    if row is None:
        raise StoreUnavailable(f"The store {url} answered nothing. Check what is behind its URL.", store=url)
    now, pid, recovering, read_only, synchronous, fsync, version, encoding = row
    if version < OLDEST:
        raise NotAStore(
            f"The store {url} is PostgreSQL {version // 10000}, and Perdure needs 13 or newer. "
            "Older ones lack what its statements use. Upgrade the server.",
            store=url,
        )
    if recovering or read_only == "on":
        what = "is a standby that repeats another server" if recovering else "has default_transaction_read_only = on"
        raise StoreReadOnly(
            f"The store {url} can only be read. The server {what}. Name the primary in the URL, or several hosts with "
            "target_session_attrs=read-write.",
            store=url,
        )
    if encoding != "UTF8":
        raise NotAStore(
            f"The store {url} keeps its text as {encoding}. Perdure's texts are UTF-8 and need a database of that "
            "encoding. Create one with ENCODING 'UTF8'.",
            store=url,
        )
    durability = "D3" if synchronous != "off" and fsync == "on" else "D2"
    # A pooler has process ids of its own.
    return Server(version, durability, pooled=pid != db.info.backend_pid), now


def set_session(db: psycopg.Connection[Any], *, local: bool) -> None:
    """Set a session as all of ours are; `local`: only the transaction that is open."""
    db.execute(settings_text(local=local).encode())


def settings_text(*, local: bool, **changed: str) -> str:
    """The statement that sets a session, or a transaction."""
    settings = {**SETTINGS, **changed}
    one = ", ".join(f"set_config('{name}', '{value}', {str(local).lower()})" for name, value in settings.items()
                    if not (local and name == "default_transaction_isolation"))  # fmt: skip
    return f"SELECT {one}"


class ServerClock:
    """The server's clock, here: what it said last, and the time since then, also asleep.

    ask: has the server asked again and `set` called; done in a thread where nobody else has for a minute, because two
    clocks drift apart and the server's may be put right.
    """

    def __init__(self, ask: Callable[[], None]) -> None:
        self._ask = ask
        self._asked = 0
        self._said = (0, 0)

    def set(self, now: int) -> None:
        """The server has just answered that this is the time."""
        self._said = (now, _clock_ns())

    def __call__(self) -> int:
        now, at = self._said
        here = _clock_ns()
        if here - max(at, self._asked) > ASKED_AGAIN:
            self._asked = here
            try:
                threading.Thread(target=self._ask_again, name="perdure-clock", daemon=True).start()
            except NO_THREAD as error:
                log.debug("there is no thread to ask the server for the time: %s", error)
        return now + (here - at) // 1000

    def _ask_again(self) -> None:
        try:
            self._ask()
        except StoreError as error:
            log.debug("the server was not asked for the time: %s", error)


def _clock_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic_ns()


SECRETS: Final = ("password", "sslpassword", "passfile", "sslkey", "oauth_client_secret", "scram_client_key",
                  "scram_server_key")  # fmt: skip


def _unknown(url: str) -> list[str]:
    """The names of parameters in a URL that the driver does not know."""
    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()}
    named = [part.partition("=")[0] for part in url.partition("?")[2].split("&")]
    return sorted({name for name in map(unquote, named) if name and name not in known})


def _shown(parameters: Mapping[str, Any], more: Mapping[str, str]) -> str:
    """A URL with everything but secrets."""
    return _url({name: value for name, value in parameters.items() if name not in SECRETS}, more)


def _url(parameters: Mapping[str, Any], more: Mapping[str, str]) -> str:
    left = {name: str(value) for name, value in parameters.items() if value is not None}
    user = left.pop("user", None)
    hosts = left.pop("host", "").split(",")
    ports = left.pop("port", "").split(",")
    database = left.pop("dbname", "")
    if any("/" in host or not host for host in hosts) or len(ports) > 1:
        # A socket's folder, or several hosts: as parameters.
        host = ""
        for name, values in (("host", hosts), ("port", ports)):
            if any(values):
                left[name] = ",".join(values)
    else:
        named = ",".join(f"[{host}]" if ":" in host else host for host in hosts)
        host = f"{named}:{ports[0]}" if ports[0] else named
    authority = f"{quote(user, safe='')}@{host}" if user else host
    query = "&".join(f"{name}={quote(value, safe='/,:')}" for name, value in {**left, **more}.items())
    return f"postgresql://{authority}/{quote(database, safe='')}{'?' if query else ''}{query}"
