"""A generator: `yield` waits, and a list waits for several at once."""

import asyncio
from collections.abc import Generator
from typing import Any

from perdure import Context, Engine, workflow


def price(item: str) -> int:
    return 100 * len(item)


@workflow
def quote(ctx: Context, items: list[str]) -> Generator[Any, Any, int]:
    prices = yield [ctx.step.run(f"price-{item}", price, item) for item in items]
    yield ctx.step.sleep("breath", 0.1)
    return sum(prices)


async def main() -> None:
    async with Engine("sqlite:///quote.db", workflows=[quote]) as engine:
        run = await engine.start(quote, ["tea", "cake"])
        print(await run.result())


if __name__ == "__main__":
    asyncio.run(main())
