"""An order that is charged with retries, waits for a person to approve it, and is shipped."""

import asyncio
from dataclasses import dataclass
from datetime import timedelta

from perdure import Context, Engine, Retry, activity, current_step, workflow


@dataclass
class Order:
    id: str
    cents: int


@dataclass
class Approval:
    by: str
    granted: bool


@dataclass
class Receipt:
    order: str
    cents: int
    key: str


@activity(retry=Retry(max_attempts=5, first_delay=0.05))
async def charge(order: Order) -> Receipt:
    # A payment service that gets this key twice charges once: the key is the same on every attempt.
    step = current_step()
    if step.attempt == 1:
        raise ConnectionError("the payment service does not answer")
    return Receipt(order.id, order.cents, step.key)


def ship(order: Order) -> str:
    return f"parcel-{order.id}"


def refund(receipt: Receipt) -> str:
    return f"refunded {receipt.cents}"


@workflow
async def order(ctx: Context, order: Order) -> str:
    receipt = await ctx.step.run("charge", charge, order)
    try:
        approval = await ctx.step.wait_signal("approval", returns=Approval, timeout=timedelta(days=3))
    except TimeoutError:
        approval = Approval(by="nobody", granted=False)
    if not approval.granted:
        return await ctx.step.run("refund", refund, receipt)
    return await ctx.step.run("ship", ship, order)


async def main() -> None:
    async with Engine("sqlite:///orders.db", workflows=[order], activities=[charge]) as engine:
        run = await engine.options(id="order-1").start(order, Order("o-1", 4200))
        if not (await run.status()).ended:  # the second time this program is run, the same id is the same run
            await run.signal("approval", Approval(by="finance", granted=True))
        print(await run.result())


if __name__ == "__main__":
    asyncio.run(main())
