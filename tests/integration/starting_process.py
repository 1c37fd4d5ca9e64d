"""Starts a run with a given idempotency key many times at once; prints the ids it got. Arguments: URL, key, number."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

from perdure import Client


async def main(url: str, key: str, number: int) -> set[str]:
    async with Client(url) as client:
        view: Any = client.options(idempotency_key=key)
        print("ready", flush=True)
        sys.stdin.readline()
        handles = await asyncio.gather(*(view.start("echo", 5) for _ in range(number)))
        return {handle.id for handle in handles}


if __name__ == "__main__":
    print(*asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
