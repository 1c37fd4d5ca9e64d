"""The workflows of the demo: an order is validated, charged, approved, packed by a child workflow, and shipped."""

import json
import os
import urllib.request
from dataclasses import dataclass

from perdure import Context, NonRetryable, Retry, activity, current_step, workflow


@dataclass
class Order:
    id: str
    cents: int


@dataclass
class Receipt:
    order: str
    charge: int
    cents: int


@dataclass
class Approval:
    by: str


def validate(order: Order) -> None:
    if order.cents <= 0:
        raise NonRetryable("an order has a price")


@activity(retry=Retry(max_attempts=10, first_delay=0.2, max_delay=1), timeout=60)
def charge(order: Order) -> Receipt:
    """One attempt to charge. Its key is the same on every attempt, also in another process after a crash."""
    request = urllib.request.Request(
        f"{os.environ['PAYMENTS']}/charges",
        data=json.dumps({"order": order.id, "cents": order.cents}).encode(),
        headers={"Idempotency-Key": current_step().key},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        booked = json.load(answer)
    return Receipt(order=booked["order"], charge=booked["charge"], cents=booked["cents"])


@workflow
async def pack(ctx: Context, order: Order) -> str:
    return await ctx.step.run("box", lambda: f"box of {order.id}")


@workflow
async def fulfil(ctx: Context, order: Order) -> str:
    await ctx.step.run("validate", validate, order)
    receipt = await ctx.step.run("charge", charge, order)
    await ctx.step.sleep("cool-off", seconds=1)
    approval = await ctx.step.wait_signal("approval", returns=Approval)
    box = await ctx.step.run_workflow("pack", pack, order)
    return await ctx.step.run("ship", lambda: f"{box}, paid by charge {receipt.charge}, approved by {approval.by}")
