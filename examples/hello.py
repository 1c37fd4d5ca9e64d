"""The smallest workflow: two steps and a pause. Try `perdure run examples/hello.py:hello --input '"you"'`."""

import asyncio

from perdure import Context, Engine, workflow


def greeting(name: str) -> str:
    return f"Hello, {name}!"


def shout(text: str) -> str:
    return text.upper()


@workflow
async def hello(ctx: Context, name: str) -> str:
    text = await ctx.step.run("greeting", greeting, name)
    await ctx.step.sleep("breath", 0.1)
    return await ctx.step.run("shout", shout, text)


async def main() -> None:
    async with Engine("sqlite:///hello.db", workflows=[hello]) as engine:
        run = await engine.start(hello, "world")
        print(await run.result())


if __name__ == "__main__":
    asyncio.run(main())
