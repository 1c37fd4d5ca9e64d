"""What the integration tests share: an engine on a fresh SQLite file, waiting for events, looking into the tables."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

from perdure import Engine, Event, Retry
from perdure.core.turn import Announced, Announcement, Batch, Send, Start, Verdict
from perdure.stores.contract import Store

PATIENCE = 60.0
"""Seconds after which what a test waits for is taken as never coming."""

AT_ONCE = Retry(first_delay=0.001, jitter=False)
ONCE = Retry(max_attempts=1)

TABLES = ("runs", "inputs", "history", "mail", "idempotency")


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder}/runs.db"


@asynccontextmanager
async def engine(folder: Path, *workflows: Any, **settings: Any) -> AsyncIterator[Engine]:
    """An engine on the folder's store; queue "far" is served too."""
    settings.setdefault("queues", ("default", "far"))
    async with Engine(url_of(folder), workflows=workflows, **settings) as engine:
        yield engine


def ask(folder: Path, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Rows of the database, by a connection of our own."""
    with closing(sqlite3.connect(folder / "runs.db")) as db:
        return db.execute(query, parameters).fetchall()


def contents(folder: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Everything that is kept of runs: to show that a refusal changed nothing."""
    return {table: ask(folder, f"SELECT * FROM perdure_{table} ORDER BY 1, 2") for table in TABLES}


async def until(found: Callable[[], Any], what: str = "it", seconds: float = PATIENCE) -> Any:
    """Wait for a value that is true, also of a coroutine function."""
    deadline = time.monotonic() + seconds
    while True:
        value = found()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come within {seconds:g} s"
        await asyncio.sleep(0.002)


async def status_of(handle: Any, *wanted: str) -> str:
    """Wait until a run has one of these statuses."""

    async def look() -> str:
        status = str(await handle.status())
        return status if status in wanted else ""

    return str(await until(look, f"status {wanted}"))


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]


def fill(store: Store) -> None:
    """A worker, and runs of its own and of nobody, each with unread mail: what plans are looked at for."""
    store.announce(
        Announcement(
            incarnation="w", name="w", namespace="n", queues=["default"], serves=[Announced(name="orders")], ttl=10**9
        )
    )
    for owner in ("w", None):
        verdicts = begin(store, owner)
        store.write(Batch(sends=[Send(to=begun.run, id="m", kind="signal") for begun in verdicts]))  # type: ignore[union-attr]


def begin(store: Store, owner: str | None) -> list[Verdict]:
    """Fifty runs of this owner, with idempotency keys and deadlines."""
    starts = [
        Start(
            namespace="n", id=f"{owner}-{n}", workflow="orders", input="[[],{}]", digest="d", seed=f"{owner}-{n}",
            event="{}", owner=owner, idempotency_key=f"{owner}-{n}", deadline_at=n + 1,
        )
        for n in range(50)
    ]  # fmt: skip
    return store.write(Batch(starts=starts))
