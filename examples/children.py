"""A parent that starts a child per chapter, waits for all of them, and for one that it only emits does not wait."""

import asyncio

from perdure import Context, Engine, NonRetryable, workflow


def count(text: str) -> int:
    if not text:
        raise NonRetryable("an empty chapter")
    return len(text.split())


@workflow
async def chapter(ctx: Context, text: str) -> int:
    return await ctx.step.run("count", count, text)


@workflow
async def announce(ctx: Context, words: int) -> str:
    return f"a book of {words} words"


@workflow
async def book(ctx: Context, chapters: list[str]) -> int:
    counts = await asyncio.gather(
        *(ctx.step.run_workflow(f"chapter-{n}", chapter, text) for n, text in enumerate(chapters)),
        return_exceptions=True,
    )
    # A child that failed is an error of its step: ChildFailed, with the status and the cause.
    words = sum(each for each in counts if isinstance(each, int))
    await ctx.step.emit_workflow("announce", announce, words)
    return words


async def main() -> None:
    async with Engine("sqlite:///book.db", workflows=[book, chapter, announce]) as engine:
        run = await engine.options(id="book-1").start(book, ["It was a dark night", "", "The end"])
        print(await run.result())
        print(await engine.handle("book-1/announce").result())


if __name__ == "__main__":
    asyncio.run(main())
