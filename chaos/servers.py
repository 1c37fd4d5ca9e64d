"""The PostgreSQL server itself is killed, stopped for a while, or has no room left; and a transaction stays open."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

from chaos.load import Load
from chaos.network import proxied, server_of
from chaos.stage import Stage
from perdure import Client


async def crash(stage: Stage) -> None:
    """The server is killed with SIGKILL and started again under load: what was acknowledged is there, all goes on."""
    base = server_of(stage)
    await stage.workers(2)
    async with Client(base.url) as client:
        load = Load(stage, client)
        seconds = stage.pick(3.5, 60.0, 1200.0)
        running = asyncio.create_task(load.run(seconds, stage.pick(30, 50, 100)))
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline - stage.pick(2.5, 5.0, 40.0):
            await asyncio.sleep(stage.pick(1.0, stage.chance.uniform(3, 10), stage.chance.uniform(5, 40)))
            await asyncio.to_thread(base.server.kill)
            stage.did("kills of the server")
            await asyncio.sleep(stage.chance.uniform(0, 0.5))
            await asyncio.to_thread(base.server.start)
        await running
        await stage.healed()


async def outage(stage: Stage) -> None:
    """The server is stopped for a while: typed errors, less than one try per second and worker; then all goes on."""
    base = server_of(stage)
    down = stage.pick(2.5, 40.0, 600.0)
    async with AsyncExitStack() as stack:
        proxies = await proxied(stage, 2, stack)
        async with Client(base.url) as client:
            load = Load(stage, client)
            running = asyncio.create_task(load.run(down + stage.pick(1.0, 5.0, 30.0), 10))
            await asyncio.sleep(stage.pick(0.7, 3.0, 10.0))
            await asyncio.to_thread(base.server.stop)
            before = [proxy.accepted for proxy in proxies]
            await asyncio.sleep(down)
            tries = [proxy.accepted - old for proxy, old in zip(proxies, before, strict=True)]
            await asyncio.to_thread(base.server.start)
            stage.did("seconds without a server", round(down))
            await running
            await stage.healed()
            await stage.leave()
    rate = sum(tries) / len(tries) / down
    stage.note(f"{rate:.2f} tries per second and worker while the server was away ({tries} in {down:g} s)")
    # Back-off begins at 50 ms: in a few seconds its first, quick tries are a large share.
    if rate >= stage.pick(4.0, 1.0, 1.0):
        stage.violated(f"INV-23: {rate:.2f} tries per second and worker while the server was away")
