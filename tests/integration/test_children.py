"""Children: their ids, their ends, and what happens to them when their parent ends."""

# ruff: noqa: PT017  # what is asserted in an `except` block here is inside a workflow

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

import pytest

from perdure import (
    Cancelled,
    ChildFailed,
    Context,
    RunCancelled,
    RunFailed,
    RunTerminated,
    RunTimedOut,
    StepFailed,
    workflow,
)
from perdure.runtime.context import SyncContext
from tests.integration.helpers import ONCE, ask, engine, kinds, status_of, until


@workflow
async def double(ctx: Context, n: int) -> int:
    return int(await ctx.step.run("double", lambda: n * 2))


@workflow
async def waiting(ctx: Context) -> Any:
    return await ctx.step.wait_signal("go")


@workflow
async def fails(ctx: Context) -> None:
    def fail() -> None:
        raise LookupError("not here")

    await ctx.step.options(retry=ONCE).run("fail", fail)


async def test_a_child_by_name_has_the_input_that_its_workflow_gives_it(tmp_path: Path) -> None:
    @workflow
    async def by_name(ctx: Context) -> int:
        return int(await ctx.step.options(idempotency_key="K").run_workflow("c", "double", 5))

    @workflow
    async def wrong(ctx: Context) -> Any:
        return await ctx.step.run_workflow("c", "double", 5, m=6)

    async with engine(tmp_path, double) as there, engine(tmp_path, by_name, wrong, queues=["here"]) as here:
        parent = await here.options(queue="here", id="p").start(by_name)
        assert await parent.result(timeout=60) == 10
        assert ask(tmp_path, "SELECT input FROM perdure_runs WHERE id = 'p/c'") == [('[[],{"n":5}]',)]
        assert (await there.options(idempotency_key="K").start(double, 5)).id == "p/c"
        with pytest.raises(RunFailed, match="no parameter"):
            await (await here.options(queue="here").start(wrong)).result(timeout=60)


async def test_a_child_that_nobody_waits_for_and_whose_id_is_taken_is_told_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @workflow
    async def emits(ctx: Context) -> None:
        await ctx.step.options(id="mine").emit_workflow("a", double, 1)
        await ctx.step.options(id="taken").emit_workflow("b", double, 2)
        await ctx.step.options(idempotency_key="free").emit_workflow("c", double, 3)
        await ctx.step.options(idempotency_key="K").emit_workflow("d", double, 4)
        await ctx.step.wait_signal("go")

    async with engine(tmp_path, emits, double, waiting) as it:
        await it.options(id="taken").start(waiting)
        await it.options(idempotency_key="K").start(double, 4)
        await it.options(id="p").start(emits)
        await until(lambda: caplog.text.count("run p: its child was not started") == 2)
        assert await it.handle("mine").result(timeout=60) == 2
        assert await it.handle("p/c").result(timeout=60) == 6
        assert caplog.text.count("was not started") == 2
        assert 'Run "taken" exists already' in caplog.text
        assert 'The idempotency key "K" or the id "p/d" was used before' in caplog.text


async def test_a_child_whose_key_is_taken_fails_with_that_reason(tmp_path: Path) -> None:
    @workflow
    async def parent(ctx: Context) -> Any:
        return await ctx.step.options(idempotency_key="K").run_workflow("c", double, 4)

    async with engine(tmp_path, parent, double) as it:
        assert await (await it.options(id="a").start(parent)).result(timeout=60) == 8
        with pytest.raises(RunFailed, match='key "K" or the id "b/c" was used before'):
            await (await it.options(id="b").start(parent)).result(timeout=60)


async def test_every_run_below_knows_the_one_above_all(tmp_path: Path) -> None:
    @workflow
    async def lowest(ctx: Context) -> list[str]:
        await ctx.step.wait_signal("go")
        return [ctx.run.root]

    @workflow
    async def lower(ctx: Context) -> list[str]:
        return [ctx.run.root, *await ctx.step.run_workflow("deep", lowest)]

    @workflow
    async def top(ctx: Context) -> list[str]:
        own = ctx.step.options(id="own").start("named", lower)
        derived = await ctx.step.run_workflow("derived", lower)
        return [ctx.run.root, *derived, *await own.result()]

    async with engine(tmp_path, lowest, lower, top) as first:
        handle = await first.options(id="orders/1").start(top)
        for deep in ("orders/1/derived/deep", "own/deep"):
            await until(functools.partial(ask, tmp_path, f"SELECT 1 FROM perdure_runs WHERE id = '{deep}'"))
    # Also where they are claimed again.
    async with engine(tmp_path, lowest, lower, top) as second:
        for deep in ("orders/1/derived/deep", "own/deep"):
            await second.handle(deep).signal("go")
        assert await second.handle(handle.id).result(timeout=60) == ["orders/1"] * 5


async def test_children_in_all_three_styles(tmp_path: Path) -> None:
    @workflow
    async def in_async(ctx: Context) -> list[int]:
        both = await asyncio.gather(ctx.step.run_workflow("a", double, 1), ctx.step.run_workflow("b", double, n=2))
        return [*both, await ctx.step.run_workflow("c", "double", 3)]

    @workflow
    def in_sync(ctx: SyncContext) -> list[int]:
        started = [ctx.step.start(f"s{n}", double, n) for n in range(3)]
        _done, left = ctx.step.wait(started)
        assert not left
        return [*(handle.result() for handle in started), ctx.step.run_workflow("c", double, 3)]

    @workflow
    def in_generator(ctx: Context) -> Any:
        both = yield [ctx.step.run_workflow("a", double, 1), ctx.step.run_workflow("b", double, 2)]
        return [*both, (yield ctx.step.run_workflow("c", double, 3))]

    async with engine(tmp_path, in_async, in_sync, in_generator, double) as it:
        for each, result in ((in_async, [2, 4, 6]), (in_sync, [0, 2, 4, 6]), (in_generator, [2, 4, 6])):
            handle = await it.options(id=each.name).start(each)
            assert await handle.result(timeout=60) == result
        child = await it.handle("in_async/c").info()
        assert (child.parent, child.workflow, child.status) == ("in_async", "double", "completed")
        assert len((await it.list_runs(parent="in_async")).items) == 3


async def test_a_childs_id_comes_from_its_parent_and_is_always_an_id(tmp_path: Path) -> None:
    @workflow
    async def nests(ctx: Context, depth: int) -> str:
        if depth == 0:
            return ctx.run.id
        below = ctx.step.options(id="chosen" if depth == 1 else None)
        return str(await below.run_workflow("a" * 100, nests, depth - 1))  # type: ignore[call-overload]  # recursive

    async with engine(tmp_path, nests) as it:
        handle = await it.options(id="top").start(nests, 4)
        assert await handle.result(timeout=60) == "chosen"
        ids = [id for (id,) in ask(tmp_path, "SELECT id FROM perdure_runs ORDER BY key")]
        assert ids[:2] == ["top", "top/" + "a" * 100]
        assert all(len(id) <= 255 for id in ids)
        assert len(set(ids)) == 5
        # The same parent in another store has the same children.
    other = tmp_path / "other"
    other.mkdir()
    async with engine(other, nests) as it:
        handle = await it.options(id="top").start(nests, 4)
        await handle.result(timeout=60)
    assert ids == [id for (id,) in ask(other, "SELECT id FROM perdure_runs ORDER BY key")]


async def test_a_child_whose_id_is_taken_fails_its_step_and_leaves_the_other_run_alone(tmp_path: Path) -> None:
    @workflow
    async def parent(ctx: Context) -> list[str]:
        said = []
        try:
            await ctx.step.run_workflow("taken", double, 5)
        except ChildFailed as error:
            said.append(f"{error.type} {error.run_id}")
        said.append(await ctx.step.emit_workflow("emitted", double, 5))
        return said

    async with engine(tmp_path, parent, waiting, double) as it:
        await it.options(id="p/taken").start(waiting)
        await it.options(id="p/emitted").start(waiting)
        handle = await it.options(id="p").start(parent)
        assert await handle.result(timeout=60) == ["RunExists p/taken", "p/emitted"]
        for taken in ("p/taken", "p/emitted"):
            other = it.handle(taken)
            assert (await other.info()).parent is None
            assert await other.status() == "waiting"
            await other.signal("go", 1)
            assert await other.result(timeout=60) == 1


async def test_how_a_child_ended_is_known_to_its_parent(tmp_path: Path) -> None:
    @workflow
    async def parent(ctx: Context) -> list[Any]:
        said: list[Any] = []
        for step, target, timeout in (
            ("failed", fails, None),
            ("cancelled", waiting, None),
            ("terminated", waiting, None),
            ("late", waiting, 0.2),
        ):
            try:
                await ctx.step.options(timeout=timeout).run_workflow(step, target)
            except ChildFailed as error:
                assert isinstance(error, StepFailed)
                said.append((error.status, error.run_id, isinstance(error, LookupError)))
        return said

    async with engine(tmp_path, parent, fails, waiting) as it:
        handle = await it.options(id="p").start(parent)
        await until(lambda: ask(tmp_path, "SELECT 1 FROM perdure_runs WHERE id = 'p/cancelled'"), "the second child")
        await it.handle("p/cancelled").cancel("by hand")
        await until(lambda: ask(tmp_path, "SELECT 1 FROM perdure_runs WHERE id = 'p/terminated'"), "the third child")
        await it.handle("p/terminated").terminate()
        result = await handle.result(timeout=60)
        assert [tuple(each)[:2] for each in result] == [
            ("failed", "p/failed"),
            ("cancelled", "p/cancelled"),
            ("terminated", "p/terminated"),
            ("timed_out", "p/late"),
        ]
        with pytest.raises(RunFailed):
            await it.handle("p/failed").result(timeout=60)
        with pytest.raises(RunTimedOut):
            await it.handle("p/late").result(timeout=60)


async def test_a_cancel_reaches_children_and_theirs_with_its_reason(tmp_path: Path) -> None:
    reasons: list[str] = []

    @workflow
    async def leaf(ctx: Context) -> None:
        try:
            await ctx.step.wait_signal("never")
        except Cancelled:
            await ctx.step.run("note", reasons.append, ctx.cancel_reason)
            raise

    @workflow
    async def middle(ctx: Context) -> None:
        await asyncio.gather(ctx.step.run_workflow("x", leaf), ctx.step.run_workflow("y", leaf))

    @workflow
    async def top(ctx: Context) -> None:
        # An explicit cancel reaches a child whatever its parent_close.
        await ctx.step.options(parent_close="abandon").run_workflow("middle", middle)

    async with engine(tmp_path, top, middle, leaf) as it:
        handle = await it.options(id="t").start(top)
        for leaf_id in ("t/middle/x", "t/middle/y"):
            await until(lambda id=leaf_id: ask(tmp_path, "SELECT 1 FROM perdure_runs WHERE id = ?", id), leaf_id)  # type: ignore[misc]
        await handle.cancel("the shop is closed")
        with pytest.raises(RunCancelled, match="the shop is closed"):
            await handle.result(timeout=60)
        for child in ("t/middle", "t/middle/x", "t/middle/y"):
            with pytest.raises(RunCancelled, match="the shop is closed"):
                await it.handle(child).result(timeout=60)
    assert reasons == ["the shop is closed"] * 2


@pytest.mark.parametrize("end", ["completes", "fails", "is cancelled", "is terminated", "times out"])
async def test_at_the_end_of_a_parent_its_children_end_or_go_on_as_was_said(tmp_path: Path, end: str) -> None:
    @workflow
    async def parent(ctx: Context) -> str:
        step = ctx.step
        step.start("awaited", waiting)
        step.options(parent_close="abandon").start("abandoned", waiting)
        await step.emit_workflow("emitted", waiting)
        await step.options(parent_close="cancel").emit_workflow("tied", waiting)
        await step.wait_signal("end")
        if end == "fails":
            raise ValueError("as it was told")
        return "done"

    async with engine(tmp_path, parent, waiting) as it:
        handle = await it.options(id="p", timeout=1.0 if end == "times out" else None).start(parent)
        for step in ("awaited", "abandoned", "emitted", "tied"):
            await until(lambda s=step: ask(tmp_path, "SELECT 1 FROM perdure_runs WHERE id = ?", f"p/{s}"), step)  # type: ignore[misc]
        if end in ("completes", "fails"):
            await handle.signal("end")
        elif end == "is cancelled":
            await handle.cancel("r")
        elif end == "is terminated":
            await handle.terminate("r")
        expected = {
            "completes": None,
            "fails": RunFailed,
            "is cancelled": RunCancelled,
            "is terminated": RunTerminated,
            "times out": RunTimedOut,
        }[end]
        if expected is None:
            assert await handle.result(timeout=60) == "done"
        else:
            with pytest.raises(expected):
                await handle.result(timeout=60)
        for step in ("awaited", "tied"):
            with pytest.raises(RunCancelled):
                await it.handle(f"p/{step}").result(timeout=60)
        for step in ("abandoned", "emitted"):
            child = it.handle(f"p/{step}")
            await child.signal("go", 7)
            assert await child.result(timeout=60) == 7


async def test_an_emitted_child_is_started_once_and_tells_nobody(tmp_path: Path) -> None:
    @workflow
    async def parent(ctx: Context) -> str:
        child = await ctx.step.emit_workflow("child", double, 4)
        await ctx.step.wait_signal("go")
        return child

    async with engine(tmp_path, parent, double) as first:
        handle = await first.options(id="p").start(parent)
        await until(lambda: ask(tmp_path, "SELECT 1 FROM perdure_runs WHERE id = 'p/child'"), "the child")
        assert await first.handle("p/child").result(timeout=60) == 8
        await status_of(handle, "waiting")
    async with engine(tmp_path, parent, double) as second:
        await second.handle("p").signal("go")
        assert await second.handle("p").result(timeout=60) == "p/child"
        assert kinds(await second.handle("p").history()) == [
            *("started", "child", "signal_wait", "signal", "signal_taken", "ended"),
        ]
    assert ask(tmp_path, "SELECT count(*) FROM perdure_runs") == [(2,)]


async def test_a_child_of_a_workflow_nobody_serves_waits_and_says_so(tmp_path: Path) -> None:
    @workflow
    async def parent(ctx: Context) -> Any:
        return await ctx.step.run_workflow("child", "elsewhere", 1, colour="red")

    @workflow
    async def elsewhere(ctx: Context, n: int, *, colour: str) -> str:
        return f"{n} {colour}"

    async with engine(tmp_path, parent) as it:
        handle = await it.options(id="p").start(parent)
        await status_of(handle, "waiting")
        assert "nobody has ever announced" in await it.handle("p/child").why()
        async with engine(tmp_path, elsewhere):
            assert await handle.result(timeout=60) == "1 red"


async def test_children_survive_a_restart_of_everything(tmp_path: Path) -> None:
    @workflow
    async def parent(ctx: Context) -> list[Any]:
        return list(await asyncio.gather(*(ctx.step.run_workflow(f"c{n}", waiting) for n in range(5))))

    async with engine(tmp_path, parent, waiting) as first:
        await first.options(id="p").start(parent)
        await until(lambda: ask(tmp_path, "SELECT count(*) FROM perdure_runs WHERE status = 'waiting'") == [(6,)])
    async with engine(tmp_path, waiting) as second:
        for n in range(5):
            await second.handle(f"p/c{n}").signal("go", n)
            assert await second.handle(f"p/c{n}").result(timeout=60) == n
    async with engine(tmp_path, parent, waiting) as third:
        assert await third.handle("p").result(timeout=60) == [0, 1, 2, 3, 4]


async def test_the_idempotency_key_of_a_child_is_taken_for_seven_days(tmp_path: Path) -> None:
    @workflow
    async def parent(ctx: Context) -> int:
        return await ctx.step.options(idempotency_key="once").run_workflow("child", double, 2)

    async with engine(tmp_path, parent, double) as running:
        assert await (await running.start(parent)).result(timeout=60) == 4
    columns = [name for _, name, *_ in ask(tmp_path, "PRAGMA table_info(perdure_idempotency)")]
    (row,) = (dict(zip(columns, row, strict=True)) for row in ask(tmp_path, "SELECT * FROM perdure_idempotency"))
    (started,) = ask(tmp_path, "SELECT created_at FROM perdure_runs WHERE key = ?", row["run"])
    assert 0 <= started[0] + 7 * 86_400_000_000 - row["expires_at"] < 60_000_000


async def test_a_child_by_name_gets_the_queue_and_the_timeout_that_its_workers_announced(tmp_path: Path) -> None:
    @workflow(name="elsewhere", queue="fast", timeout=60)
    async def elsewhere(ctx: Context, n: int) -> int:
        return n + 1

    @workflow
    async def parent(ctx: Context) -> list[int]:
        return [
            await ctx.step.run_workflow("plain", "elsewhere", 1),
            await ctx.step.options(queue="slow", timeout=5).run_workflow("other", "elsewhere", 2),
        ]

    async with (
        engine(tmp_path, elsewhere, queues=["fast", "slow"]),
        engine(tmp_path, parent, queues=["default"]) as opened,
    ):
        handle = await opened.options(id="p").start(parent)
        assert await handle.result(timeout=60) == [2, 3]
    rows = ask(tmp_path, "SELECT id, queue, deadline_at - created_at FROM perdure_runs WHERE id LIKE 'p/%' ORDER BY id")
    assert [(id, queue, round(length / 1e6)) for id, queue, length in rows] == [
        ("p/other", "slow", 5),
        ("p/plain", "fast", 60),
    ]
