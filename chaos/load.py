"""Runs that are started and signalled all the while, and what of that was acknowledged."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from chaos.flows import ORDERS, result_of
from chaos.stage import Stage, Violated
from perdure import Client, RunFinished, StoreError

T = TypeVar("T")
EVERY: Final = 4
"""One run in so many is an order, which takes some 15 commits; one is a transfer, the others are quick."""


class Load:
    """A client as a user writes one: what is refused with a `StoreError` is tried again with the same ids.

    Only what returned counts as acknowledged. Any other error is a violation: a driver's has no business here.
    """

    def __init__(self, stage: Stage, client: Client) -> None:
        self.stage = stage
        self.client = client
        self.number = 0
        self.latencies: list[tuple[float, float]] = []
        """(when a start was asked for, seconds until it was acknowledged)"""

    async def run(self, seconds: float, per_second: float) -> None:
        """Start runs for so long, whatever happens, and wait until all are acknowledged."""
        deadline = time.monotonic() + seconds
        running: set[asyncio.Task[None]] = set()
        while time.monotonic() < deadline:
            task = asyncio.create_task(self.one())
            running.add(task)
            await asyncio.sleep(1 / per_second)
        await asyncio.wait_for(asyncio.gather(*running), 600)

    async def one(self) -> None:
        """Start one run; if it is an order, send it its signal: at once, or late, or twice."""
        self.number += 1
        number, chance, promised = self.number, self.stage.chance, self.stage.promised
        workflow = "quick"
        args: list[Any] = [number]
        if number % EVERY == 0:
            workflow = ORDERS[number // EVERY % 3]
        elif number % EVERY == 2:
            workflow = "transfer"
            args.append(self.stage.base.names["rows"])
        run = f"{workflow}-{number}"
        asked = time.monotonic()
        handle = await self.insist(lambda: self.client.options(id=run).start(workflow, *args))
        self.latencies.append((asked, time.monotonic() - asked))
        promised.started.append(run)
        promised.results[run] = json.dumps(result_of(workflow, number))
        if workflow not in ORDERS:
            return
        await asyncio.sleep(chance.choice((0, 0, 0.05, 0.3)))
        message = f"go-{number}"
        for _ in range(chance.choice((1, 1, 2))):
            try:
                await self.insist(lambda: handle.signal("go", number, message_id=message))
            except RunFinished:
                return  # The answer to an earlier try was lost: it was taken, and the run went on to its end.
        promised.signalled.append((run, message))

    async def insist(self, act: Callable[[], Awaitable[T]]) -> T:
        """Try until it is acknowledged."""
        pause = 0.05
        while True:
            try:
                return await act()
            except StoreError as error:
                self.stage.report.refusals[type(error).__name__] += 1
                if type(error) is StoreError:
                    raise Violated(f"an error without a type of its own: {error}") from error
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)

    async def start(self, workflow: str, *args: Any, id: str) -> Any:
        """Start one run of a scenario's own."""
        handle = await self.insist(lambda: self.client.options(id=id).start(workflow, *args))
        self.stage.promised.started.append(id)
        return handle

    async def signal(self, run: str, name: str, *args: Any, message: str) -> None:
        """Signal a run of a scenario's own."""
        await self.insist(lambda: self.client.handle(run).signal(name, *args, message_id=message))
        self.stage.promised.signalled.append((run, message))
