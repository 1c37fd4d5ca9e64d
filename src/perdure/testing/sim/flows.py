"""The canonical workflows of the simulation, in all three styles, and the step functions whose effects it watches."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from perdure.core.retry import Retry
from perdure.runtime.registry import Activity, Workflow, activity, workflow
from perdure.testing.programs import leaf
from perdure.worker.executing import StepInfo, current_step

# --- steps ---------------------------------------------------------------------------------------------

WORLD: Any = None
"""The universe that is being simulated; step functions report to it."""

LENGTHS: Final = (0.0, 0.01, 0.3, 1.5, 6.0)
QUICK: Final = Retry(max_attempts=4, first_delay=0.5, max_delay=8)
TWICE: Final = Retry(max_attempts=2, first_delay=0.2)
ONCE: Final = Retry(max_attempts=1)
DEFAULT: Final = 3
"""Attempts that a step has whose policy says nothing else."""
MOST_ATTEMPTS: Final = {
    **dict.fromkeys(("charge", "first", "far-0", "far-1", "extra"), 4),
    **dict.fromkeys(("last", "double-2", "slow", "slower", "vain", "far-vain"), 2),
    "double-1": 1,
}
"""Attempts that the policies below give to each step which has one: said twice, so that the engine is not asked."""


@contextmanager
def _effect() -> Iterator[StepInfo]:
    info = current_step()
    token = WORLD.effects.begins(info)
    try:
        yield info
    except asyncio.CancelledError:
        WORLD.effects.cancelled(token)
        raise
    finally:
        WORLD.effects.ends(token)


async def work(value: Any, fail: int = 0) -> Any:
    """A step that takes a while and fails at its first `fail` attempts."""
    with _effect() as info:
        length = LENGTHS[WORLD.tape.choose(len(LENGTHS), "work")]
        if length:
            await asyncio.sleep(length)
        if info.attempt <= fail:
            raise ValueError(f"attempt {info.attempt} of {info.id}")
    return value


async def slow(value: Any) -> Any:
    with _effect():
        await asyncio.sleep(20.0)
    return value


def now(value: Any, fail: int = 0) -> Any:
    """The same in a thread."""
    with _effect() as info:
        if info.attempt <= fail:
            raise ValueError(f"attempt {info.attempt} of {info.id}")
    return value


def tell(value: Any) -> Any:
    """A step that sends its own run a signal."""
    with _effect() as info:
        WORLD.effects.tells(info, "word")
    return value


async def poison() -> None:
    """A step that kills its worker."""
    with _effect():
        WORLD.kill_here()


async def program_work(id: str) -> Any:
    """The step of random programs: it takes a while, and may fail."""
    with _effect():
        length = LENGTHS[WORLD.tape.choose(len(LENGTHS), "work")]
        if length:
            await asyncio.sleep(length)
        if WORLD.tape.choose(4, "fails?") == 3:
            raise ValueError(f"no luck with {id}")
    return 7


@activity(queue="remote", retry=QUICK)
async def remote(value: int, fail: int = 0) -> int:
    with _effect() as info:
        length = LENGTHS[WORLD.tape.choose(3, "work")]
        if length:
            await asyncio.sleep(length)
        if info.attempt <= fail:
            raise ValueError(f"attempt {info.attempt}")
    return value + 1


# --- async ---------------------------------------------------------------------------------------------


@workflow
async def order(ctx: Any, n: int) -> Any:
    """Steps, a retry that waits, a sleep."""
    got = [await ctx.step.run("reserve", work, n)]
    got.append(await ctx.step.options(retry=QUICK).run("charge", work, n + 1, fail=n % 3))
    await ctx.step.sleep("settle", seconds=n % 5)
    got.append(await ctx.step.run("ship", now, n + 2))
    return got


@workflow
async def approval(ctx: Any, n: int) -> Any:
    """Signals with timeouts, one after the other; a late one is escalated."""
    got: list[Any] = []
    for i in range(2):
        try:
            got.append(await ctx.step.wait_signal(f"wait-{i}", name="go", timeout=3 + n % 7))
        except TimeoutError:
            got.append(await ctx.step.run(f"escalate-{i}", work, -i))
    return got


@workflow
async def collector(ctx: Any, n: int) -> Any:
    """Three signals in the order in which they were accepted, each followed by a step."""
    got: list[Any] = []
    for i in range(3):
        got.append(await ctx.step.wait_signal(f"next-{i}", name="go"))
        got.append(await ctx.step.run(f"keep-{i}", work, i))
    return got


@workflow
async def child(ctx: Any, n: int) -> int:
    await ctx.step.sleep("pause", seconds=n % 4)
    if n % 2:
        return int(await ctx.step.options(retry=TWICE).run("double-2", work, n * 2, fail=1))
    return int(await ctx.step.options(retry=ONCE).run("double-1", work, n * 2, fail=1))


@workflow
async def parent(ctx: Any, n: int) -> Any:
    """A child awaited for a while, one abandoned, one that ends with its parent."""
    got: list[Any] = [
        await ctx.step.options(parent_close="abandon").emit_workflow("left", child, n),
        await ctx.step.options(parent_close="cancel").emit_workflow("led", collector, n),
    ]
    try:
        got.append(await ctx.step.options(timeout=2 + n % 9).run_workflow("own", child, n))
    except Exception as error:
        got.append(type(error).__name__)
    return got


@workflow
async def racing(ctx: Any, n: int) -> Any:
    """The first of three wins, the others are given up; then a wait that is given up by its timer."""
    pending = [ctx.step.start(f"lane-{i}", work if i else slow, i) for i in range(3)]
    done, left = await ctx.step.wait(pending, return_when="FIRST_COMPLETED")
    for each in left:
        await each.cancel()
    first = done[0].id
    try:
        await asyncio.wait_for(ctx.step.run("long", slow, n), 1 + n % 4)
    except (asyncio.TimeoutError, TimeoutError):
        first += "!"
    after = await ctx.step.run("after", work, n)
    return [first, after]


@workflow
async def waiting(ctx: Any, n: int) -> Any:
    """Two branches, timers without a record, a signal that may give a step up."""

    async def stepping() -> Any:
        got = []
        for i in range(3):
            got.append(await ctx.step.run(f"tick-{i}", work, i))
            await asyncio.sleep(0.5 * (i + n % 2))
        return got

    task = asyncio.create_task(stepping())
    signal = asyncio.create_task(ctx.step.wait_signal("stop", name="go", timeout=2 + n % 9))
    await asyncio.wait([task, signal], return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
        task.cancel()
    if not signal.done():
        signal.cancel()
    results = await asyncio.gather(task, signal, return_exceptions=True)
    return [type(each).__name__ if isinstance(each, BaseException) else each for each in results]


@workflow
async def cleaning(ctx: Any, n: int) -> Any:
    """Cancelled at a wait, it runs its cleanup steps."""
    try:
        await ctx.step.run("prepare", work, n)
        await ctx.step.wait_signal("go", timeout=30)
        await ctx.step.run("finish", work, n)
    except asyncio.CancelledError:
        await ctx.step.run("undo", work, -n)
        if n % 3:
            raise
        return "undone"
    except TimeoutError:
        return "late"
    return "finished"


@workflow
async def dispatching(ctx: Any, n: int) -> Any:
    """Activities on a queue of their own, one of them given up."""
    pending = [ctx.step.start(f"far-{i}", remote, n + i, fail=i) for i in range(2)]
    extra = ctx.step.start("extra", remote, n, fail=3)
    await ctx.step.sleep("a-while", seconds=n % 3)
    await extra.cancel()
    return [await each.result() for each in pending]


@workflow
async def trying(ctx: Any, n: int) -> Any:
    """A step and an activity in vain: they fail at every attempt they have."""
    got: list[Any] = []
    twice = ctx.step.options(retry=TWICE)
    for each in (twice.start("vain", now, n, fail=9), twice.start("far-vain", remote, n, fail=9)):
        try:
            got.append(await each.result())
        except Exception as error:
            got.append(type(error).__name__)
    return got


@workflow
async def ending(ctx: Any, n: int) -> Any:
    """Ends by the outcome of a step while signals arrive: its closing turn meets newer mail."""
    heard = ctx.step.start("hear", slow, n)
    a = ctx.step.start("a", work, 1)
    b = ctx.step.start("b", work, 2)
    got = [await a.result(), await b.result()]
    await heard.cancel()
    return got


@workflow
async def listening(ctx: Any, n: int) -> Any:
    """Steps and a timer race with a mailbox: what came first decides, also after a closing turn was refused."""
    got: list[Any] = []

    async def mail() -> None:
        for i in range(5):
            got.append(await ctx.step.wait_signal(f"m-{i}", name="go"))

    reader = asyncio.create_task(mail())
    limit = ctx.step.start("limit", work, 0)
    other = ctx.step.start("other", work, 1)
    done, left = await ctx.step.wait([limit, other], return_when="FIRST_COMPLETED", timeout=1.0)
    for each in left:
        if not got:
            await each.cancel()
        else:
            got.append(await each.result())
    reader.cancel()
    return [sorted(each.id for each in done), got]


@workflow
async def regretting(ctx: Any, n: int) -> Any:
    """Gives a step up whose outcome comes all the same; a signal that is newer than its end makes it want that step."""
    word = asyncio.create_task(ctx.step.wait_signal("word"))
    before, second, third, last = (
        ctx.step.start(id, act, n) for id, act in (("before", now), ("second", now), ("third", now), ("send", tell))
    )
    await second.result()
    if word.done():
        return await third.result()
    await third.cancel()
    await last.result()
    word.cancel()
    return await before.result()


@workflow
async def killing(ctx: Any, n: int) -> None:
    """Kills whoever runs it."""
    await ctx.step.run("die", poison)


# --- generators and plain functions ----------------------------------------------------------------------


@workflow
def fan(ctx: Any, n: int) -> Any:
    """A generator: steps side by side, a sleep, one more."""
    got = yield [ctx.step.run(f"part-{i}", work, i) for i in range(3)]
    yield ctx.step.sleep("rest", seconds=1 + n % 3)
    try:
        twice = ctx.step.options(retry=Retry(max_attempts=2, first_delay=0.1))
        got.append((yield twice.run("last", work, n, fail=n % 3)))
    except Exception as error:
        got.append(type(error).__name__)
    return got


@workflow
def plain(ctx: Any, n: int) -> Any:
    """A plain function: steps, a wait with a timeout, a sleep, a step that is waited for later."""
    later = ctx.step.start("later", work, n)
    got = [ctx.step.options(retry=QUICK).run("first", now, n, fail=n % 2)]
    try:
        got.append(ctx.step.wait_signal("go", timeout=2 + n % 5))
    except TimeoutError:
        got.append("late")
    ctx.step.sleep("nap", seconds=n % 3)
    got.append(later.result())
    return got


@workflow
def plain_parent(ctx: Any, n: int) -> Any:
    """A plain function with a child and a cleanup."""
    try:
        got = [ctx.step.run_workflow("own", child, n * 2)]
    except asyncio.CancelledError:
        ctx.step.run("undo", now, 0)
        raise
    except Exception as error:
        got = [type(error).__name__]
    done, _ = ctx.step.wait([ctx.step.start(f"p-{i}", work, i) for i in range(2)], return_when="FIRST_COMPLETED")
    return [*got, len(done) > 0]


# --- small ones, of which pairs of crashes are tried, and one whose attempts run out of time ---------------------


@workflow
async def one_step(ctx: Any, n: int) -> Any:
    return await ctx.step.run("one", now, n)


@workflow
async def one_signal(ctx: Any, n: int) -> Any:
    return await ctx.step.wait_signal("one", name="go", timeout=30)


@workflow
async def one_child(ctx: Any, n: int) -> Any:
    return await ctx.step.run_workflow("one", one_step, n)


@workflow
async def hurried(ctx: Any, n: int) -> Any:
    """Attempts that are given up by their timeout, one in the end; an activity that is, too."""
    quick = ctx.step.options(timeout=2, retry=Retry(max_attempts=2, first_delay=0.5))
    got: list[Any] = []
    for name in ("slow", "slower"):
        try:
            got.append(await quick.run(name, slow, n))
        except TimeoutError:
            got.append("late")
    return [*got, await ctx.step.run("after", now, n)]


# --- two versions of one workflow --------------------------------------------------------------------------


async def _old(ctx: Any, n: int) -> Any:
    await ctx.step.run("one", work, 1)
    await ctx.step.sleep("between", seconds=2)
    await ctx.step.run("two", work, 2)
    return 0


async def _new(ctx: Any, n: int) -> Any:
    await ctx.step.run("one", work, 1)
    if ctx.patched("check-first"):
        await ctx.step.run("check", work, 3)
    await ctx.step.sleep("between", seconds=2)
    await ctx.step.run("two", work, 2)
    return 0


changing_old: Final[Workflow[Any, Any]] = Workflow(_old, name="changing")
changing_new: Final[Workflow[Any, Any]] = Workflow(_new, name="changing")

CANONICAL: Final[tuple[Workflow[Any, Any], ...]] = (
    order,
    approval,
    collector,
    parent,
    racing,
    waiting,
    cleaning,
    dispatching,
    trying,
    ending,
    listening,
    regretting,
    fan,
    plain,
    plain_parent,
    changing_new,
)
"""What clients start: every crash point of each is tried."""
SMALL: Final[tuple[Workflow[Any, Any], ...]] = (one_step, one_signal, one_child)
"""Small enough for every pair of crash points."""
# Behind the others and in no client's draw: a tape would mean something else with each one that is added there.
OTHERS: Final[tuple[Workflow[Any, Any], ...]] = (child, killing, leaf(program_work), *SMALL, hurried)
ACTIVITIES: Final[tuple[Activity[Any, Any], ...]] = (remote,)
