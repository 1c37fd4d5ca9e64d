"""A run that is asked to stop: the request arrives where it waits, and its cleanup steps still run."""

import asyncio

from perdure import Cancelled, Context, Engine, RunCancelled, workflow


def reserve(room: str) -> str:
    return f"reservation of {room}"


def release(reservation: str, reason: str) -> str:
    print(f"released the {reservation}: {reason}")
    return reservation


@workflow
async def stay(ctx: Context, room: str) -> str:
    reservation = await ctx.step.run("reserve", reserve, room)
    try:
        await ctx.step.sleep("stay", days=3)
    except Cancelled:
        # A `finally` is not the place: it also runs when the run only leaves memory. Cleanup is a step.
        await ctx.step.run("release", release, reservation, ctx.cancel_reason)
        raise
    return reservation


async def main() -> None:
    async with Engine("sqlite:///stay.db", workflows=[stay]) as engine:
        run = await engine.start(stay, "room 7")
        while await run.status() != "waiting":  # the room is reserved, and the guest stays
            await asyncio.sleep(0.01)
        await run.cancel("the guest is ill")
        try:
            await run.result()
        except RunCancelled as error:
            print(f"cancelled: {error.reason}")


if __name__ == "__main__":
    asyncio.run(main())
