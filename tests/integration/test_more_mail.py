"""Messages that come while a run ends send its last turn back; each is still taken once, and in its order."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from perdure import Client, Context, Engine, PostgresStore, SQLiteStore, workflow
from perdure.core.errors import StoreLocked
from perdure.core.turn import Address, Batch, Send
from tests import servers
from tests.integration.helpers import engine, until, url_of


def signals(history: Any) -> list[str]:
    return [event.data["message"] for event in history if event.kind == "signal"]


async def test_messages_that_nobody_takes_are_listed_once(tmp_path: Path) -> None:
    @workflow
    async def takes_one(ctx: Context) -> Any:
        return await ctx.step.wait_signal("a")

    async with engine(tmp_path, takes_one):
        pass
    async with Client(url_of(tmp_path)) as client:
        handle = await client.start(takes_one)
        for number in range(4):
            await handle.signal("a", number, message_id=f"m{number}")
    async with engine(tmp_path, takes_one) as it:
        here = it.handle(handle.id)
        assert await here.result(timeout=60) == 0
        history = await here.history()
        assert signals(history) == ["m0"]
        assert list(history[-1].data["unread"]) == ["m1", "m2", "m3"]


@workflow
async def hears(ctx: Context) -> list[Any]:
    """Ends at "end", unless it has heard "go on" before."""
    heard: list[Any] = []
    while True:
        try:
            heard.append(await ctx.step.wait_signal(f"w{len(heard)}", name="s", timeout=1))
        except TimeoutError:
            return heard
        if heard[-1] == "end" and "go on" not in heard:
            return heard


@pytest.fixture(params=servers.versions())
def database(request: pytest.FixtureRequest) -> servers.Database:
    return servers.needed(request.param)


@pytest.fixture
def store(database: servers.Database) -> Iterator[Callable[[], PostgresStore]]:
    opened: list[PostgresStore] = []

    def another() -> PostgresStore:
        opened.append(PostgresStore(database.url, schema=schema))
        return opened[-1]

    with servers.schema(database) as schema:
        yield another
        for each in opened:
            each.close()


async def test_one_that_was_committed_late_comes_before_those_that_were_sent_behind_it(
    database: servers.Database, store: Callable[[], PostgresStore]
) -> None:
    async with Engine(store(), workflows=[hears]):
        pass
    async with Client(store()) as client:
        handle = await client.start(hears)
        await handle.signal("s", "first", message_id="m1")
        with psycopg.connect(database.url) as db:
            await asyncio.to_thread(
                lambda: client.sync.options(connection=db).handle(handle.id).signal("s", "go on", message_id="m2")
            )
            await handle.signal("s", "end", message_id="m3")
            await handle.signal("s", "last", message_id="m4")
            async with Engine(store(), workflows=[hears]) as it:
                # It asks for its end again and again, as somebody may still send to it.
                committer = it._core.committer
                assert committer is not None
                await until(lambda: committer._added > 5)
                db.commit()
                here = it.handle(handle.id)
                heard = await here.result(timeout=60)
                assert sorted(heard) == ["end", "first", "go on", "last"]
                assert heard.index("end") < heard.index("last")
                assert sorted(signals(await here.history())) == ["m1", "m2", "m3", "m4"]


class Slow(SQLiteStore):
    """Only delays: reads that take a while, a writer that waits for its lock, a look for mail that misses it."""

    blind = False
    busy = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.read = threading.Event()

    def mail(self, incarnation: str) -> Any:
        return [] if self.blind else super().mail(incarnation)

    def mailbox(self, run: int) -> Any:
        found = super().mailbox(run)
        self.read.set()
        time.sleep(0.5)
        return found

    def write(self, batch: Batch) -> Any:
        if self.busy:
            time.sleep(0.7)
        return super().write(batch)

    def write_at_once(self, batch: Batch) -> Any:
        if self.busy:
            raise StoreLocked("busy", store=self.url)
        return super().write_at_once(batch)

    def wait(self, incarnation: str, queues: Any, timeout: float) -> bool:
        return super().wait(incarnation, queues, min(timeout, 0.1))


async def test_one_that_comes_while_the_mailbox_is_read_again_is_taken_once_and_in_its_order(tmp_path: Path) -> None:
    slow, other = Slow(tmp_path / "runs.db"), SQLiteStore(tmp_path / "runs.db")

    def send(id: str, value: str) -> None:
        to = Address(namespace="default", id="r")
        other.write(Batch(sends=[Send(to=to, id=id, kind="signal", name="s", data=f'"{value}"')]))

    def step() -> None:
        slow.blind = True
        send("m1", "keep")

    @workflow
    async def ends_unless_it_heard(ctx: Context) -> list[Any]:
        heard: list[Any] = []

        async def listen() -> None:
            while True:
                heard.append(await ctx.step.wait_signal(f"w{len(heard)}", name="s"))

        listening = asyncio.create_task(listen())
        await ctx.step.run("s", step)
        if heard:
            await ctx.step.sleep("while", 3)
        listening.cancel()
        return heard

    async with Engine(slow, workflows=[ends_unless_it_heard]) as it:
        handle = await it.options(id="r").start(ends_unless_it_heard)
        assert await asyncio.to_thread(slow.read.wait, 60)
        slow.blind, slow.busy = False, True
        await asyncio.to_thread(send, "m2", "five")
        assert await handle.result(timeout=60) == ["keep", "five"]
        assert signals(await handle.history()) == ["m1", "m2"]
    other.close()
    slow.close()
