"""What the network between workers and a PostgreSQL server does."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

from chaos.load import Load
from chaos.postgres import PostgresBase
from chaos.proxy import Proxy
from chaos.stage import Stage, Violated
from perdure import Client


def server_of(stage: Stage) -> PostgresBase:
    """The stage's store, which is one with a server."""
    if not isinstance(stage.base, PostgresBase):
        raise Violated("this scenario is one of a server")
    return stage.base


async def proxied(stage: Stage, number: int, stack: AsyncExitStack, **settings: object) -> list[Proxy]:
    """So many workers, each behind a proxy of its own."""
    base = server_of(stage)
    proxies = [Proxy(base.connect, stage.chance) for _ in range(number)]
    for proxy in proxies:
        await proxy.open()
        stack.push_async_callback(proxy.close)
    await stage.serving([stage.worker(url=base.url_at(proxy.port), **settings) for proxy in proxies])
    return proxies


async def cut(stage: Stage) -> None:
    """Connections are cut when a commit has happened and nobody has been told: it is found out, nothing is repeated."""
    async with AsyncExitStack() as stack:
        proxies = await proxied(stage, 2, stack, lease=5)
        own = Proxy(server_of(stage).connect, stage.chance)
        await own.open()
        stack.push_async_callback(own.close)
        async with Client(server_of(stage).url_at(own.port)) as client:
            load = Load(stage, client)
            for proxy in (*proxies, own):
                proxy.cut_share = 0.05
            await load.run(stage.pick(2.0, 30.0, 600.0), stage.pick(30, 50, 100))
            for proxy in (*proxies, own):
                proxy.cut_share = 0.0
            await stage.healed()
            await stage.leave()
        stage.did("cut acknowledgements", sum(proxy.cuts for proxy in (*proxies, own)))
    if not stage.report.did["cut acknowledgements"]:
        stage.violated("no acknowledgement was cut: the scenario did nothing")


async def half_open(stage: Stage) -> None:
    """Connections stay open and nothing passes any more: others take the runs over, the worker comes back."""
    async with AsyncExitStack() as stack:
        proxies = await proxied(stage, 2, stack, lease=1)
        async with Client(stage.base.url) as client:
            load = Load(stage, client)
            await load.start("long_step", 1.0, id="late")
            for turn in range(stage.pick(1, 4, 30)):
                running = asyncio.create_task(load.run(stage.pick(2.5, 10.0, 30.0), 30))
                await asyncio.sleep(0.5)
                stage.did("half-open connections", proxies[turn % 2].swallow())
                await running
                at = time.monotonic()
                proxies[turn % 2].reset()
                lives = stage.base.ask("SELECT count(*) FROM {workers} WHERE dead = 0")[0][0]
                await stage.until(
                    lambda: stage.base.ask("SELECT count(*) FROM {workers} WHERE dead = 0")[0][0] >= 2, "the worker"
                )
                stage.note(f"{lives} lived meanwhile; both again {time.monotonic() - at:.2f} s after the reset")
            await stage.healed()
            await stage.leave()


async def held(stage: Stage) -> None:
    """Packets of one worker are held past its takeover and delivered then: its late commits change nothing."""
    async with AsyncExitStack() as stack:
        proxies = await proxied(stage, 2, stack, lease=1)
        async with Client(stage.base.url) as client:
            load = Load(stage, client)
            for turn in range(stage.pick(1, 8, 100)):
                running = asyncio.create_task(load.run(stage.pick(2.0, 5.0, 5.0), 30))
                for n in range(6):
                    # Some of them are in flight in the worker that is cut off.
                    await load.start("long_step", 1.0, id=f"late-{turn}-{n}")
                await asyncio.sleep(0.5)
                proxies[turn % 2].hold()
                await asyncio.sleep(stage.chance.uniform(1.3, 2.5))
                proxies[turn % 2].release()
                stage.did("holds")
                await running
            await stage.healed()
            await stage.leave()
    lost, reborn = (stage.log().count(text) for text in ("its lease was lost", "was taken for dead"))
    stage.note(f"{lost} commits came too late and were fenced; {reborn} times a worker began a new life")
    if not lost + reborn:
        stage.violated("INV-9: no worker was taken over: the scenario did nothing")
