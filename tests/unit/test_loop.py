"""The deterministic loop: asyncio's own tools work in a workflow, replay alike, and reach nothing outside."""

from __future__ import annotations

import asyncio
import contextvars
import dis
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest

from perdure.core.errors import NeverRests
from perdure.runtime import loop as loop_module
from perdure.runtime.loop import RunLoop
from tests.unit.playing import Run, work


async def _gather(ctx: Any) -> Any:
    return await asyncio.gather(ctx.step.run("a", work), ctx.step.run("b", work))


async def _wait(ctx: Any) -> Any:
    tasks = {asyncio.create_task(ctx.step.run(name, work), name=name) for name in ("a", "b")}
    done, pending = await asyncio.wait(tasks)
    return [sorted(task.result() for task in done), len(pending)]


async def _shield(ctx: Any) -> Any:
    first = asyncio.shield(ctx.step.run("a", work))
    return [await first, await ctx.step.run("b", work)]


async def _queue(ctx: Any) -> Any:
    queue: asyncio.Queue[Any] = asyncio.Queue(1)

    async def produce() -> None:
        for name in ("a", "b"):
            await queue.put(await ctx.step.run(name, work))

    producer = asyncio.create_task(produce())
    found = [await queue.get(), await queue.get()]
    await producer
    return found


async def _event(ctx: Any) -> Any:
    event = asyncio.Event()

    async def act() -> Any:
        value = await ctx.step.run("a", work)
        event.set()
        return value

    task = asyncio.create_task(act())
    await event.wait()
    return [await task, await ctx.step.run("b", work)]


async def _guards(ctx: Any) -> Any:
    found: list[Any] = []
    for guard in (asyncio.Lock(), asyncio.Semaphore(1), asyncio.Condition()):
        async with guard:
            if len(found) < 2:
                found.append(await ctx.step.run("ab"[len(found)], work))
    return found


async def _generators(ctx: Any) -> Any:
    async def items() -> Any:
        for name in ("a", "b", "c"):
            yield await ctx.step.run(name, work)

    found = []
    async for item in items():
        found.append(item)
        if len(found) == 2:
            return found


async def _as_completed(ctx: Any) -> Any:
    tasks = [asyncio.create_task(ctx.step.run(name, work)) for name in ("a", "b")]
    return [await each for each in asyncio.as_completed(tasks)]


async def _wait_for(ctx: Any) -> Any:
    first = await asyncio.wait_for(ctx.step.run("a", work), 30)
    return [first, await asyncio.wait_for(ctx.step.run("b", work), None)]


FLOWS: list[Callable[..., Any]] = [
    *(_gather, _wait, _shield, _queue, _event, _guards, _generators, _as_completed, _wait_for),
]

if sys.version_info >= (3, 11):

    async def _group(ctx: Any) -> Any:
        async with asyncio.TaskGroup() as group:
            first = group.create_task(ctx.step.run("a", work))
            second = group.create_task(ctx.step.run("b", work))
        return [first.result(), second.result()]

    async def _timeout(ctx: Any) -> Any:
        async with asyncio.timeout(30):
            return [await ctx.step.run("a", work), await ctx.step.run("b", work)]

    FLOWS += [_group, _timeout]

    def test_a_timeout_that_was_due_before_an_outcome_has_won_in_life_and_on_replay() -> None:
        async def flow(ctx: Any) -> Any:
            try:
                async with asyncio.timeout(5):
                    return await ctx.step.run("a", work)
            except TimeoutError:
                return "late"

        run = Run(flow).after(5)
        assert run.result == '"late"'
        assert run.dropped == ["a"]
        assert run.again().result == '"late"'


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: str(flow.__name__).strip("_"))
def test_asyncio_tools_work_and_replay_alike(flow: Callable[..., Any]) -> None:
    run = Run(flow).value("a", "1")
    assert run.again().pending == run.pending
    run.value("b", "2")
    assert run.status == "completed"
    assert run.again().result == run.result


@pytest.mark.parametrize("delay", [0, -1])
def test_asyncio_sleep_of_nothing_only_gives_way(delay: float) -> None:
    async def flow(ctx: Any) -> Any:
        await asyncio.sleep(delay)
        return await asyncio.sleep(delay, "result")

    run = Run(flow)
    assert run.result == '"result"'
    assert run.commands == ["ended"]


def test_asyncio_sleep_counts_in_the_time_of_inputs_and_leaves_no_command() -> None:
    async def flow(ctx: Any) -> Any:
        before = asyncio.get_running_loop().time()
        await asyncio.sleep(1.5)
        return asyncio.get_running_loop().time() - before

    run = Run(flow).after(1.499999)
    assert run.status is None
    run.after(3)
    assert run.result == "4.499999"
    assert run.commands == ["ended"]


def test_a_sleep_too_short_to_count_still_rests() -> None:
    async def flow(ctx: Any) -> Any:
        for _ in range(3):
            await asyncio.sleep(1e-12)

    assert Run(flow).after(0).after(1).status == "completed"


def test_as_completed_over_bare_coroutines_is_refused_at_its_line() -> None:
    async def flow(ctx: Any) -> Any:
        async def one() -> Any:
            return await ctx.step.run("a", work)

        for each in asyncio.as_completed([one()]):
            await each

    run = Run(flow)
    assert run.status == "failed"
    assert "Pass tasks" in run.error[1]


@pytest.mark.parametrize(
    "reach",
    [
        lambda loop: loop.run_in_executor(None, print),
        lambda loop: loop.call_soon_threadsafe(print),
        lambda loop: loop.create_connection(object, "localhost", 80),
        lambda loop: loop.getaddrinfo("localhost", 80),
        lambda loop: loop.subprocess_exec(object, "true"),
        lambda loop: loop.sock_recv(None, 1),
        lambda loop: loop.add_signal_handler(2, print),
        lambda loop: loop.run_until_complete(None),
        lambda loop: loop.set_task_factory(None),
    ],
)
def test_whatever_reaches_outside_raises_with_the_hint(reach: Callable[[Any], Any]) -> None:
    async def flow(ctx: Any) -> Any:
        reach(asyncio.get_running_loop())

    run = Run(flow)
    assert run.status == "failed"
    assert "Put it in a step" in run.error[1]


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="empty")


def test_nothing_leaks_into_a_run_or_out_of_it() -> None:
    async def flow(ctx: Any) -> Any:
        found = VARIABLE.get()
        VARIABLE.set("from the run")
        await ctx.step.run("a", work)
        return [found, VARIABLE.get()]

    VARIABLE.set("from outside")
    run = Run(flow)
    assert VARIABLE.get() == "from outside"
    assert run.value("a").result == '["empty","from the run"]'


async def test_a_run_nests_in_a_running_loop_and_leaves_it_as_it_was() -> None:
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    hooks = sys.get_asyncgen_hooks()
    assert Run(_gather).value("a").value("b").status == "completed"
    assert asyncio.current_task() is task
    assert asyncio.get_running_loop() is loop
    assert sys.get_asyncgen_hooks() == hooks


def test_sets_of_tasks_have_the_order_of_their_making() -> None:
    async def flow(ctx: Any) -> Any:
        tasks = {asyncio.create_task(asyncio.sleep(0), name=str(n)) for n in range(20)}
        await asyncio.wait(tasks)
        return [task.get_name() for task in tasks]

    first = Run(flow).result
    assert Run(flow).result == first


def test_an_exception_nobody_retrieved_is_logged_once_and_not_on_replay(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> None:
        raise ValueError("unseen")

    async def flow(ctx: Any) -> Any:
        task = asyncio.create_task(broken())
        await ctx.step.run("a", work)
        return task.done()

    with caplog.at_level(logging.ERROR):
        run = Run(flow)
        again = run.again()
        again.close()
        assert not caplog.records
        run.value("a")
        run.close()
    assert [r.exc_info[1].args for r in caplog.records if r.exc_info and r.exc_info[1]] == [("unseen",)]


def test_done_tasks_are_let_go() -> None:
    async def flow(ctx: Any) -> Any:
        for _ in range(1000):
            await asyncio.create_task(asyncio.sleep(0))
        await ctx.step.run("a", work)

    run = Run(flow)
    driver: Any = run.play.driver
    assert len(driver.loop.tasks) < 100


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
def test_an_eager_task_starts_at_once() -> None:
    async def flow(ctx: Any) -> Any:
        loop: Any = asyncio.get_running_loop()
        found = []

        async def act() -> None:
            found.append("begun")

        task = loop.create_task(act(), eager_start=True)
        found.append("after")
        await task
        return found

    assert Run(flow).result == '["begun","after"]'


def test_step_failures_are_caught_by_their_own_type() -> None:
    async def flow(ctx: Any) -> Any:
        try:
            await ctx.step.run("a", work)
        except ValueError as error:
            return str(error)

    assert "no luck" in Run(flow).fails("a").result


# --- an interruption of code that does not rest may come at any instruction of its thread


@pytest.mark.parametrize("at", ["leave", "_set_running_loop", "_enter_task"])
async def test_an_interruption_that_comes_when_the_code_is_left_leaves_the_callers_loop_running(
    at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, task = asyncio.get_running_loop(), asyncio.current_task()
    place: Any = RunLoop if at == "leave" else loop_module
    real = getattr(place, at)
    came: list[str] = []

    def interrupted(*args: Any) -> None:
        if not came and not (at == "_set_running_loop" and isinstance(args[0], RunLoop)):
            came.append(at)
            raise NeverRests
        real(*args)

    async def flow(ctx: Any) -> Any:
        return await ctx.step.run("a", work)

    monkeypatch.setattr(place, at, interrupted)
    run = Run(flow)
    assert came == [at]
    assert run.play.restless
    assert asyncio.get_running_loop() is here
    assert asyncio.current_task() is task


def test_no_loop_stands_beside_the_finally_that_leaves_the_code() -> None:
    # From Python 3.12 on the instructions of a loop's jump may be outside of every `try` of their function.
    assert not _jumps_back(RunLoop.run_to_rest)
    assert _jumps_back(_jumps_back), "this test sees one"


def _jumps_back(function: Any) -> list[str]:
    found = []
    for each in dis.get_instructions(function):
        if each.opcode in dis.hasjrel + dis.hasjabs and each.argval < each.offset:
            found.append(each.opname)
    return found
