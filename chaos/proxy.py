"""A small TCP proxy of ours between a worker and its server: it cuts, holds and swallows what passes.

It knows one thing of the protocol: how a server says that a transaction is committed. So a connection can be cut when
the commit has happened and nobody has been told.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final

COMMITTED: Final = b"C\x00\x00\x00\x0bCOMMIT\x00"
"""PostgreSQL's CommandComplete of a COMMIT."""
PIECE: Final = 65536

Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class Proxy:
    """Listens on a free port of the loopback; `connect` reaches the server. Begin with `await open()`."""

    def __init__(self, connect: Connect, chance: random.Random) -> None:
        self.port = 0
        self.accepted = 0
        self.cuts = 0
        self.cut_share = 0.0
        """The share of commits whose acknowledgement is cut off, with its connection."""
        self._connect = connect
        self._chance = chance
        self._flows = asyncio.Event()
        self._flows.set()
        self._reset = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._open: dict[int, tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = {}
        self._swallowed: set[int] = set()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.reset()
        while self._open:
            await asyncio.sleep(0.01)

    def hold(self) -> None:
        """Keep what comes from now on, in both directions, until `release`."""
        self._flows.clear()

    def release(self) -> None:
        """Let what was kept pass, in its order, and all that follows."""
        self._flows.set()

    def swallow(self) -> int:
        """Half-open: the connections that are open now stay so, and nothing passes any more; how many they are."""
        self._swallowed |= set(self._open)
        return len(self._open)

    def reset(self) -> None:
        """Cut all connections."""
        self._reset.set()
        self._reset = asyncio.Event()
        for ends in list(self._open.values()):
            for end in ends:
                end.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        number = self.accepted
        try:
            there, to_there = await self._connect()
        except OSError:
            writer.transport.abort()
            return
        self._open[number] = (writer, to_there)
        pumps = {
            asyncio.create_task(self._pump(number, reader, to_there)),
            asyncio.create_task(self._pump(number, there, writer, answers=True)),
        }
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            self._open.pop(number, None)
            self._swallowed.discard(number)
            writer.transport.abort()
            to_there.transport.abort()

    async def _pump(
        self, number: int, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, answers: bool = False
    ) -> None:
        """Pass on what comes, until one side has ended."""
        try:
            while piece := await source.read(PIECE):
                await self._flows.wait()
                if answers and self.cut_share and COMMITTED in piece and self._chance.random() < self.cut_share:
                    self.cuts += 1
                    return
                if number in self._swallowed:
                    continue
                target.write(piece)
                await target.drain()
        except OSError:
            pass
        if number in self._swallowed and target.transport.is_closing() is False:
            await self._reset.wait()  # whoever still is there is not told
