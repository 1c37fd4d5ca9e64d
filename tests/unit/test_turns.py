"""Turns of a run in a worker's memory, with a store that answers when it is told to."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from perdure.core import events as ev
from perdure.core import stored
from perdure.core.errors import StepTimedOut
from perdure.core.retry import Retry
from perdure.runtime.registry import Workflow
from perdure.testing.programs import Program
from perdure.testing.service import Service
from perdure.testing.tape import SECOND, START
from perdure.worker.executing import current_step


class Flow(Program):
    """A program that is a function."""

    fn: Any = None

    def workflow(self, work: Any, name: str = "program") -> Workflow[Any, Any]:
        return Workflow(type(self).fn, name=name)


def serving(flow: Any) -> Service:
    """A service with one run of this workflow, taken up."""
    kind = type("Flow", (Flow,), {"fn": staticmethod(flow)})
    service = Service([kind(seed=1, style="async", body=())], 1)
    service.look()
    return service


def history(service: Service) -> list[ev.Event]:
    return [stored.decode(text) for text in service.store.history(1)]


async def slow() -> str:
    await asyncio.sleep(5)
    return "done"


def test_a_run_whose_last_step_is_given_up_while_its_turn_is_written_parks() -> None:
    async def quick() -> str:
        return "quick"

    async def flow(ctx: Any) -> Any:
        first = ctx.step.start("slow", slow)
        await ctx.step.run("quick", quick)
        await first.cancel()
        await ctx.step.wait_signal("go")

    service = serving(flow)
    service.flush()
    service.go_on(5 * SECOND)
    service.quiet()
    for _ in range(3):
        service.go_on(5 * SECOND)
        service.quiet()
    row = service._rows()[1]
    assert row.status == "waiting"
    service.close()


def test_a_timer_that_comes_due_while_a_commit_is_under_way_has_its_own_time() -> None:
    async def flow(ctx: Any) -> Any:
        await ctx.step.sleep("first", 1)
        await asyncio.sleep(2)
        await ctx.step.wait_signal("go")

    service = serving(flow)
    service.quiet()
    service.go_on(SECOND)  # The first sleep ends; its turn is not written yet.
    service.go_on(2 * SECOND)
    service.go_on(7 * SECOND)
    service.quiet()
    times = [event.at - START for event in history(service) if isinstance(event, ev.Time)]
    assert times == [SECOND, 3 * SECOND]
    service.close()


def test_a_step_that_ends_by_its_total_timeout_no_longer_executes() -> None:
    async def flow(ctx: Any) -> Any:
        try:
            await ctx.step.options(total_timeout=2).run("slow", slow)
        except TimeoutError:
            await ctx.step.wait_signal("go")

    service = serving(flow)
    service.quiet()
    (resident,) = service.shift.residents.values()
    assert list(resident.executions) == ["slow"]
    service.go_on(2 * SECOND)
    service.quiet()
    assert not resident.executions
    assert service._rows()[1].status == "waiting"
    service.close()


def test_a_timer_that_comes_due_during_a_rebuild_is_set_again() -> None:
    async def flow(ctx: Any) -> Any:
        await asyncio.sleep(5)
        return "woken"

    service = serving(flow)
    service.quiet()
    (resident,) = service.shift.residents.values()
    resident.rebuilding = True
    service.go_on(5 * SECOND)
    resident.rebuilding = False
    resident.settle()
    service.go_on(SECOND)
    service.quiet()
    assert service._rows()[1].status == "completed"


def test_a_history_that_the_code_no_longer_bears_out_blocks_the_run_even_where_it_ends() -> None:
    async def flow(ctx: Any) -> Any:
        await ctx.step.sleep("cool-off", 3600)

    async def changed(ctx: Any) -> Any:
        return "at once"

    service = serving(flow)
    service.quiet()
    service.known["program-1"].fn = changed
    service.store.written = lambda batch, verdicts: None
    service.crash()
    service.signal("run-1", "wake up", 1)
    service.look()
    service.flush()
    row = service._rows()[1]
    assert row.status == "blocked"
    assert "recorded: event 2, sleep" in row.waits
    service.close()


def test_an_outcome_is_not_dropped_before_the_commit_that_gave_its_step_up_is_acknowledged() -> None:
    began: list[str] = []

    async def lasting(name: str, seconds: int) -> str:
        began.append(name)
        await asyncio.sleep(seconds)
        return name

    async def flow(ctx: Any) -> Any:
        third = ctx.step.start("third", lasting, "third", 3)
        first = ctx.step.start("first", lasting, "first", 5)
        try:
            await ctx.step.run("second", lasting, "second", 4)
        except asyncio.CancelledError:
            return await first.result()
        await first.cancel()
        await asyncio.sleep(2)
        return await third.result()

    service = serving(flow)
    service.quiet()
    service.go_on(3 * SECOND)  # The third step ends: its commit is under way until we flush.
    service.go_on(1 * SECOND)  # The second one ends, the first is given up.
    service.go_on(1 * SECOND)  # The first one ends all the same.
    service.go_on(1 * SECOND)  # The run ends.
    service.flush()
    service.cancel("run-1")  # It comes before the end is written: the end is thrown away.
    service.quiet()
    row = service._rows()[1]
    assert (row.status, row.result) == ("completed", '"first"')
    assert sorted(began) == ["first", "second", "third"]
    service.close()


def test_only_newer_mail_thrice_in_a_row_ends_a_run_with_unread_mail() -> None:
    async def quick() -> str:
        return "quick"

    async def flow(ctx: Any) -> Any:
        got = 0
        while True:
            await ctx.step.run(f"step {got}", quick)
            try:
                await ctx.step.wait_signal(f"wait {got}", name="go", timeout=0)
            except TimeoutError:
                return got
            got += 1

    service = serving(flow)
    for count in range(8):
        service.signal("run-1", "go", count)
        service.flush()  # The end is refused: there is newer mail.
        service.acknowledge()
        service.read()
        service.flush()  # The run went on instead, and its next step brings it to its end again.
        service.acknowledge()
    service.quiet()
    row = service._rows()[1]
    assert (row.status, row.result) == ("completed", "8")
    assert not any(isinstance(event, ev.Ended) and event.unread for event in history(service))
    service.close()


def test_only_a_step_that_runs_longer_than_a_second_is_named_in_a_commit_of_its_own() -> None:
    async def flow(ctx: Any) -> Any:
        await ctx.step.run("slow", slow)

    service = serving(flow)
    service.quiet()
    (resident,) = service.shift.residents.values()
    named = []
    for _ in range(3):
        service.clock += SECOND // 2
        resident.name_long_steps()
        service.quiet()
        named.append("slow" in service._rows()[1].waits)
    assert named == [False, True, True]
    service.close()


def test_an_end_that_is_refused_tells_nothing_of_exceptions_nobody_retrieved(caplog: pytest.LogCaptureFixture) -> None:
    async def quick() -> str:
        return "quick"

    async def flow(ctx: Any) -> None:
        async def fail() -> None:
            raise ValueError("nobody looks")

        task = asyncio.create_task(fail())
        await ctx.step.run("a", quick)
        assert task.done()

    service = serving(flow)
    service.signal("run-1", "late", 1)
    service.quiet()
    assert service._rows()[1].status == "completed"
    assert service.sometimes["MoreMail"] == 1
    assert [record.getMessage() for record in caplog.records] == [
        "run run-1: an exception in a task was never retrieved"
    ]
    service.close()


def test_an_attempt_that_ran_out_of_time_is_cancelled_once_its_failure_is_recorded() -> None:
    did: list[str] = []

    async def hangs() -> str:
        did.append(f"began {current_step().attempt}")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            did.append(f"cancelled {current_step().attempt}")
            raise
        return ""

    async def flow(ctx: Any) -> Any:
        retry = Retry(max_attempts=2, first_delay=1, jitter=False)
        try:
            await ctx.step.options(timeout=1, retry=retry).run("hangs", hangs)
        except StepTimedOut:
            return "late"

    service = serving(flow)
    service.quiet()
    assert did == ["began 1"]
    service.go_on(SECOND)
    assert did == ["began 1"]
    service.flush()
    service.loop.settle()
    assert did == ["began 1"]
    service.acknowledge()
    assert did == ["began 1", "cancelled 1"]
    row = service._rows()[1]
    # One commit: it says that the run waits.
    assert (row.status, row.version) == ("waiting", 1)
    assert service.shift.executing == 0
    service.quiet()
    service.go_on(SECOND)
    service.quiet()
    assert did[2:] == ["began 2"]
    service.go_on(SECOND)
    assert did[3:] == []
    service.quiet()
    assert did[3:] == ["cancelled 2"]
    assert service._rows()[1].result == '"late"'
    service.close()


def test_an_attempt_that_returns_after_its_time_but_before_its_record_failed() -> None:
    async def late() -> str:
        await asyncio.sleep(1.5 if current_step().attempt == 1 else 0)
        return f"attempt {current_step().attempt}"

    async def flow(ctx: Any) -> Any:
        retry = Retry(max_attempts=2, first_delay=5, jitter=False)
        return await ctx.step.options(timeout=1, retry=retry).run("late", late)

    service = serving(flow)
    service.quiet()
    service.go_on(SECOND)
    service.go_on(SECOND)
    assert service.shift.executing == 0
    for _ in range(4):
        service.quiet()
        service.go_on(5 * SECOND)
    service.quiet()
    assert service._rows()[1].result == '"attempt 2"'
    service.close()


def test_a_resumed_that_is_thrown_away_comes_again_with_its_time() -> None:
    new_code = False

    async def flow(ctx: Any) -> Any:
        added = [asyncio.create_task(ctx.step.sleep("added", 0))] if new_code else []
        await ctx.step.wait_signal("go")
        await asyncio.gather(*added)

    service = serving(flow)
    service.quiet()
    new_code = True
    service.crash()
    service.signal("run-1", "go", 1)
    service.look()
    at = service.clock
    service.signal("run-1", "late", 1)
    service.flush()
    service.acknowledge()
    assert service.sometimes["MoreMail"] == 1
    service.clock += 2 * SECOND
    service.quiet()
    assert service._rows()[1].status == "completed"
    inputs = [event for event in history(service)[2:] if isinstance(event, (ev.Resumed, ev.Signal))]
    assert [(type(event), event.at - at) for event in inputs] == [(ev.Resumed, 0), (ev.Signal, 0)]
    service.close()


def test_an_error_of_a_callback_is_told_once_though_its_turn_is_thrown_away(caplog: pytest.LogCaptureFixture) -> None:
    async def quick() -> str:
        return "quick"

    def fails() -> None:
        raise ValueError("nobody looks")

    async def flow(ctx: Any) -> None:
        await ctx.step.run("a", quick)
        asyncio.get_running_loop().call_soon(fails)
        await asyncio.sleep(0)

    service = serving(flow)
    service.signal("run-1", "late", 1)
    service.quiet()
    assert service._rows()[1].status == "completed"
    assert service.sometimes["MoreMail"] == 1
    assert [record.getMessage() for record in caplog.records] == ["run run-1: a callback failed"]
    service.close()
