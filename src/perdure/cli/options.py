"""What every subcommand takes, and how one asks a store that must exist."""

from __future__ import annotations

import asyncio
import functools
import os
import re
import shlex
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import click

from perdure.cli.command import exit_code
from perdure.cli.words import Wrong, complain
from perdure.client import Client
from perdure.core.errors import NotAStore, PerdureError
from perdure.core.ids import typed
from perdure.core.retry import duration
from perdure.core.status import Status
from perdure.info import RunInfo
from perdure.stores.opening import DEFAULT, VARIABLE

T = TypeVar("T")
_COMMAND: Final = re.compile(
    r"""`(?P<words>perdure (?:[^`'"]|'[^']*'|"[^"]*")+?)(?P<last> -- (?:[^`'"]|'[^']*'|"[^"]*")+)?`"""
)
"""One in a sentence; what is quoted in it may hold anything. last: what must stay behind all options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """Which store, which namespace, and whether output is for programs."""

    store: str | None
    namespace: str
    json: bool

    @property
    def url(self) -> str:
        """The store's URL, from wherever it was said."""
        return self.store if self.store is not None else os.environ.get(VARIABLE, DEFAULT)

    @property
    def existing(self) -> str:
        """The URL for those who must not create what they read."""
        url = self.url
        path, _, query = url.partition("?")
        # A URL that names no file is better complained about as it was written.
        if path.startswith("sqlite:///") and path[10:]:
            return f"{path}?{query}&create=false" if query else f"{path}?create=false"
        if path.startswith(("postgresql:", "postgres:")) and "migrate=" not in query:
            return f"{path}?{query}&migrate=check" if query else f"{path}?migrate=check"
        return url

    def same(self) -> str:
        """The options that name the same store and namespace again, for commands we propose."""
        said = "" if self.store is None else f" --store {shlex.quote(self.store)}"
        return said + ("" if self.namespace == "default" else f" --namespace {shlex.quote(self.namespace)}")

    def typed(self, text: str) -> str:
        """The text with its commands as they are to be typed for this store and namespace."""
        return _COMMAND.sub(lambda found: f"`{found['words']}{self.same()}{found['last'] or ''}`", text)


def common(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--store`, `--namespace` and `--json`; the function gets them as one `Where`, first. Its errors are told here."""

    @click.option("--store", metavar="URL", help="Which store. [default: PERDURE_STORE, else sqlite:///perdure.db]")
    @click.option("--namespace", metavar="NAME", default="default", show_default=True, help="Which namespace of it.")
    @click.option("--json", "as_json", is_flag=True, help="Print JSON: one object, lists one object per line.")
    @functools.wraps(function)
    def command(store: str | None, namespace: str, as_json: bool, **rest: Any) -> Any:
        where = Where(store=store, namespace=namespace, json=as_json)
        try:
            return function(where, **rest)
        except (PerdureError, TimeoutError) as error:
            complain(where.typed(str(error)))
            return exit_code(error)

    return command


def never_read(where: Where, info: RunInfo) -> str:
    """What else to say to one who has sent a message to this run."""
    if info.status != Status.QUARANTINED:
        return ""
    return where.typed(f" But it is quarantined, so nothing of it reads that: `perdure terminate {typed(info.id)}`.")


class Seconds(click.FloatRange):
    """A length of time."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        try:
            duration(seconds, "it")
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return seconds


@contextmanager
def usage() -> Iterator[None]:
    """Inside, a wrong value is the user's mistake and no traceback."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise Wrong(str(error)) from error


def ask(where: Where, question: Callable[[Client], Awaitable[T]], *, create: bool = False) -> T:
    """What a client of this store answers. create: whether the store may be made for it."""
    with usage():
        client = Client(where.url if create else where.existing, namespace=where.namespace)

    async def asked() -> T:
        async with client:
            return await question(client)

    try:
        return asyncio.run(asked())
    except NotAStore as error:
        # The URL is shown as it was written, without what `existing` added.
        text = str(error).replace("&create=false", "").replace("?create=false", "")
        raise NotAStore(text, store=error.store) from error
