"""A run that leaves memory: its code is closed, begins nothing, and what will not be closed is kept and counted."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from typing import Any

import pytest

from perdure.core.errors import Evicted, NeverRests
from perdure.runtime import context
from perdure.runtime.drive_async import survivors
from perdure.worker.watchdog import Watchdog, Watched
from tests.unit.playing import Run, work


def test_finally_blocks_run_and_begin_nothing() -> None:
    seen: list[str] = []

    async def flow(ctx: Any) -> Any:
        try:
            await ctx.step.run("a", work)
        finally:
            try:
                ctx.step.start("late", work)
            except Evicted:
                seen.append("refused")
            try:
                await ctx.step.run("later", work)
            except Evicted:
                seen.append("refused too")
                raise

    run = Run(flow)
    run.close()
    assert seen == ["refused", "refused too"]
    assert not run.play.take().commands
    assert run.pending == ["a"]


def test_except_exception_does_not_see_the_eviction() -> None:
    seen: list[str] = []

    async def flow(ctx: Any) -> Any:
        try:
            try:
                await ctx.step.run("a", work)
            finally:
                ctx.step.start("late", work)
        except Exception:
            seen.append("swallowed")

    Run(flow).close()
    assert not seen


def test_all_tasks_are_closed_and_cancel_nothing() -> None:
    seen: list[str] = []

    async def branch(ctx: Any, name: str) -> None:
        try:
            await ctx.step.run(name, work)
        finally:
            seen.append(name)

    async def flow(ctx: Any) -> Any:
        await asyncio.gather(branch(ctx, "a"), branch(ctx, "b"))

    run = Run(flow)
    run.close()
    assert sorted(seen) == ["a", "b"]
    assert run.commands == []
    assert not run.play.take().commands


def test_a_loop_with_a_bare_except_survives_and_is_counted() -> None:
    async def flow(ctx: Any) -> Any:
        n = 0
        while True:
            try:
                n += 1
                await ctx.step.run(f"a{n}", work)
            except BaseException:
                continue

    run = Run(flow)
    before = len(survivors)
    run.close()
    assert len(survivors) == before + 1


def test_a_generator_that_will_not_close_survives_and_is_counted() -> None:
    def flow(ctx: Any) -> Any:
        n = 0
        while True:
            try:
                n += 1
                yield ctx.step.run(f"a{n}", work)
            except BaseException:
                continue

    before = len(survivors)
    Run(flow).close()
    assert len(survivors) > before


def test_an_abandoned_async_generator_is_never_finalized_behind_the_code() -> None:
    seen: list[str] = []

    async def flow(ctx: Any) -> Any:
        async def items() -> Any:
            try:
                yield 1
            finally:
                seen.append("finalized")

        async for _ in items():
            break
        await ctx.step.run("a", work)

    run = Run(flow)
    gc.collect()
    run.value("a")
    run.close()
    del run
    gc.collect()
    assert not seen


@pytest.mark.parametrize("shape", ["main", "task"])
def test_code_that_does_not_rest_is_interrupted(shape: str) -> None:
    async def spin() -> None:
        while True:
            pass

    async def flow(ctx: Any) -> Any:
        await ctx.step.run("a", work)
        await (spin() if shape == "main" else asyncio.create_task(spin()))

    class Inside:
        """What the watchdog asks of a resident."""

        gone = False

    run = Run(flow)
    inside: Any = Inside()
    inside.play = run.play
    inside.this = run.play.run
    watched = Watched()
    watched.resident = inside
    watchdog = Watchdog(watched, 0.2)
    try:
        with watched:
            try:
                run.value("a")
            except NeverRests:
                pytest.fail("it left the run")
    finally:
        watchdog.stop()
    assert "spin" in run.play.restless
    assert threading.current_thread().is_alive()


def test_code_is_left_while_the_watchdog_looks_only_when_it_has_looked() -> None:
    watched = Watched()
    left: list[float] = []

    def leave() -> None:
        watched.leave()
        left.append(watched.since)

    with watched.lock:
        watched.since = 1.0
        thread = threading.Thread(target=leave)
        thread.start()
        while watched.since:
            time.sleep(0.001)
        assert left == []
        watched.since = 2.0
    thread.join()
    assert left == [0.0]


def test_an_interruption_that_comes_while_code_is_left_holds_up_nobody() -> None:
    class Lock:
        """The watchdog has it for one look, in which it raises."""

        looks = 0

        def locked(self) -> bool:
            self.looks += 1
            if self.looks == 1:
                raise NeverRests
            return False

        def __getattr__(self, name: str) -> Any:
            raise AssertionError("it was taken, and might never be given back")

    watched = Watched()
    lock: Any = Lock()
    watched.lock = lock
    watched.since = 1.0
    with pytest.raises(NeverRests):
        watched.leave()
    assert watched.since == 0.0
    watched.leave()


def test_callbacks_without_rest_are_code_that_does_not_rest() -> None:
    async def spins() -> None:
        while True:
            await asyncio.sleep(0)

    async def flow(ctx: Any) -> Any:
        await spins()

    run = Run(flow)
    assert "test_eviction.py" in run.play.restless
    assert run.play.restless.endswith("in spins")
    run.close()


def test_timers_without_rest_are_code_that_does_not_rest() -> None:
    async def flow(ctx: Any) -> Any:
        while True:
            await asyncio.sleep(1e-12)

    run = Run(flow).after(1)
    assert run.play.restless.endswith("in flow")
    run.close()


def test_an_interrupted_collector_leaves_no_thread_marked() -> None:
    """What unmarks it is no code of Python's: the watchdog's exception cannot arrive there."""
    assert not context._collecting
    context._collector("start", {})
    assert context._collecting == {"stop": threading.get_ident()}
    for callback in gc.callbacks:
        if not hasattr(callback, "__code__"):
            callback("stop", {})
    assert not context._collecting


def keeps_async(kept: list[Any]) -> Any:
    async def flow(ctx: Any) -> Any:
        kept.extend((ctx, ctx.step.start("a", work)))

    return flow


def keeps_sync(kept: list[Any]) -> Any:
    def flow(ctx: Any) -> Any:
        kept.extend((ctx, ctx.step.start("a", work)))

    return flow


def asks_async(ask: Any) -> Any:
    async def flow(ctx: Any) -> Any:
        await ctx.step.run("first", work)
        try:
            await ask(ctx)
        except (RuntimeError, ValueError) as error:
            return str(error)

    return flow


def asks_in_a_generator(ask: Any) -> Any:
    def flow(ctx: Any) -> Any:
        yield ctx.step.run("first", work)
        try:
            yield ask(ctx)
        except (RuntimeError, ValueError) as error:
            return str(error)

    return flow


def asks_sync(ask: Any) -> Any:
    def flow(ctx: Any) -> Any:
        ctx.step.run("first", work)
        try:
            ask(ctx)
        except (RuntimeError, ValueError) as error:
            return str(error)

    return flow


@pytest.mark.parametrize(
    ("keeps", "asks"), [(keeps_async, asks_async), (keeps_async, asks_in_a_generator), (keeps_sync, asks_sync)]
)
def test_what_a_run_left_behind_is_refused_in_the_body_of_another(keeps: Any, asks: Any) -> None:
    kept: list[Any] = []
    Run(keeps(kept)).close()
    old, pending = kept
    for ask in (lambda ctx: old.step.run("b", work), lambda ctx: old.now(), lambda ctx: pending.result()):
        other = Run(asks(ask)).value("first")
        assert "which has ended or left memory, was used in the code of run run-1" in other.result
    other = Run(asks(lambda ctx: ctx.step.wait([pending]))).value("first")
    assert "of run run-1. A run waits for what it has started itself." in other.result


def test_what_another_run_has_begun_and_still_runs_cannot_be_waited_for() -> None:
    kept: list[Any] = []

    async def flow(ctx: Any) -> Any:
        kept.append(ctx.step.start("a", work))
        await kept[0].result()

    Run(flow)
    other = Run(asks_async(lambda ctx: ctx.step.wait([kept[0]]))).value("first")
    assert "A run waits for what it has started itself." in other.result
