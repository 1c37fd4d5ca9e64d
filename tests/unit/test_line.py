"""A run's line of inputs: what is kept in which order, and how changed code is judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from msgspec import Raw

from perdure.core import events as ev
from perdure.core.errors import DuplicateStepId
from perdure.runtime.registry import workflow
from tests.unit.playing import Run, work


async def one_step(ctx: Any) -> Any:
    return await ctx.step.run("a", work)


async def two_steps(ctx: Any) -> Any:
    first = await ctx.step.run("a", work)
    second = await ctx.step.run("b", work)
    return [first, second]


# --- signals ------------------------------------------------------------------------------------------


async def three_signals(ctx: Any) -> Any:
    await ctx.step.run("before", work)
    return [await ctx.step.wait_signal(f"w{n}", name="go") for n in range(3)]


def test_signals_are_kept_before_the_wait_and_taken_in_order() -> None:
    run = Run(three_signals).signal("go", "1").signal("go", "2").value("before").signal("go", "3")
    assert run.result == "[1,2,3]"
    assert run.again().status == "completed"


def test_a_signal_that_does_not_fit_is_skipped_and_stays_skipped() -> None:
    async def flow(ctx: Any) -> Any:
        return await ctx.step.wait_signal("w", name="go", returns=int)

    run = Run(flow).signal("go", '"no number"', message="bad")
    assert run.commands == ["signal_wait", "refused"]
    run.signal("go", "7")
    assert run.result == "7"
    assert run.again().result == "7"


def test_a_signal_that_once_fitted_and_no_longer_does_is_a_difference() -> None:
    async def flow(ctx: Any) -> Any:
        await ctx.step.wait_signal("w", name="go")
        await ctx.step.run("b", work)

    async def stricter(ctx: Any) -> Any:
        await ctx.step.wait_signal("w", name="go", returns=int)
        await ctx.step.run("b", work)

    run = Run(flow).signal("go", '"text"')
    assert run.again(stricter).play.difference is not None


def test_unread_signals_are_named_in_the_end() -> None:
    run = Run(one_step).signal("go", "1", message="left").value("a")
    end = run.events[-1]
    assert isinstance(end, ev.Ended)
    assert end.unread == ("left",)


# --- sleeps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, -5])
def test_a_sleep_of_zero_or_less_goes_on_at_once_and_leaves_its_record(seconds: float) -> None:
    async def flow(ctx: Any) -> Any:
        await ctx.step.sleep("s", seconds)

    run = Run(flow)
    assert run.status == "completed"
    assert run.commands == ["sleep", "ended"]
    assert run.again().status == "completed"


def test_a_sleep_ends_at_its_time_and_no_sooner() -> None:
    async def flow(ctx: Any) -> Any:
        await ctx.step.sleep("s", 10)

    run = Run(flow).after(9.999999)
    assert run.status is None
    assert run.after(0.000001).status == "completed"


# --- ids ----------------------------------------------------------------------------------------------


def test_an_id_is_used_once_and_the_error_names_both_lines() -> None:
    async def flow(ctx: Any) -> Any:
        first = ctx.step.start("a", work)
        try:
            ctx.step.start("a", work)
        except DuplicateStepId as error:
            return str(error)
        finally:
            await first.result()

    run = Run(flow).value("a")
    assert run.result.count("test_line.py") == 2


# --- refused ------------------------------------------------------------------------------------------


def test_an_input_that_does_not_fit_fails_the_run_also_on_replay() -> None:
    async def flow(ctx: Any, count: int) -> Any:
        return count

    run = Run(flow, input='[["many"],{}]')
    assert run.status == "failed"
    assert run.commands == ["refused", "ended"]
    assert run.again().status == "failed"


def test_an_input_that_no_longer_fits_blocks_the_run() -> None:
    async def flow(ctx: Any, count: Any) -> Any:
        await ctx.step.run("a", work)
        await ctx.step.run("b", work)

    async def stricter(ctx: Any, count: int) -> Any:
        await ctx.step.run("a", work)
        await ctx.step.run("b", work)

    run = Run(flow, input='[["many"],{}]').value("a")
    difference = run.again(stricter).play.difference
    assert difference is not None
    assert "no longer fits" in difference.asked


# --- differences --------------------------------------------------------------------------------------


async def inserted(ctx: Any) -> Any:
    await ctx.step.run("fraud", work)
    return await two_steps(ctx)


async def renamed(ctx: Any) -> Any:
    await ctx.step.run("other", work)
    await ctx.step.run("b", work)


async def removed(ctx: Any) -> Any:
    return await ctx.step.run("b", work)


async def other_kind(ctx: Any) -> Any:
    await ctx.step.sleep("a", 5)
    await ctx.step.run("b", work)


async def other_function(ctx: Any) -> Any:
    def work_hard() -> None: ...

    await ctx.step.run("a", work_hard)
    await ctx.step.run("b", work)


async def emits_first(ctx: Any) -> Any:
    await ctx.step.emit_workflow("e", "elsewhere")
    return await two_steps(ctx)


async def raises_first(ctx: Any) -> Any:
    raise ValueError("new code")


async def returns_first(ctx: Any) -> Any:
    return 1


@pytest.mark.parametrize(
    ("changed", "asked"),
    [
        (inserted, 'run step "fraud" (work)'),
        (renamed, 'run step "other" (work)'),
        (removed, 'run step "b" (work)'),
        (other_kind, 'sleep "a" 0:00:05'),
        (other_function, 'run step "a" (work_hard)'),
        (emits_first, 'child workflow "e" (elsewhere)'),
        (raises_first, "the run's end (failed)"),
        (returns_first, "the run's end (completed)"),
    ],
)
def test_changed_code_before_a_recorded_outcome_is_a_difference(changed: Callable[..., Any], asked: str) -> None:
    run = Run(two_steps).value("a", "1")
    play = run.again(changed).play
    assert play.difference is not None
    assert play.end is None
    assert play.difference.recorded == 'run step "a" (work)'
    assert "test_line.py:" in play.difference.recorded_site
    assert play.difference.asked == asked
    assert "test_line.py:" in play.difference.asked_site
    if changed is raises_first:
        line = raises_first.__code__.co_firstlineno + 1
        assert play.difference.asked_site.endswith(f":{line}"), "the line that raised"
    assert play.difference.number == 2


def test_a_lambda_matches_any_name() -> None:
    async def with_lambda(ctx: Any) -> Any:
        await ctx.step.run("a", lambda: None)
        await ctx.step.run("b", work)

    run = Run(two_steps).value("a", "1")
    assert run.again(with_lambda).play.difference is None


def test_a_pending_local_step_that_left_no_record_may_disappear() -> None:
    async def shorter(ctx: Any) -> Any:
        return await ctx.step.run("a", work)

    again = Run(two_steps).value("a", "1").again(shorter)
    assert again.play.difference is None
    assert again.result == "1"
    # The end is written behind the last recorded input.
    assert again.events[-1] == ev.Ended(status="completed")


async def waits_and_starts(ctx: Any) -> Any:
    await ctx.step.run("a", work)
    await ctx.step.wait_signal("go")
    await ctx.step.emit_workflow("k", "child")
    await ctx.step.wait_signal("more")


async def ends_early(ctx: Any) -> Any:
    return await ctx.step.run("a", work)


async def waits_for_another(ctx: Any) -> Any:
    await ctx.step.run("a", work)
    await ctx.step.wait_signal("go", name="other")


async def starts_another(ctx: Any) -> Any:
    await ctx.step.run("a", work)
    await ctx.step.wait_signal("go")
    await ctx.step.emit_workflow("k", "another")


async def raises_late(ctx: Any) -> Any:
    await ctx.step.run("a", work)
    await ctx.step.wait_signal("go")
    await ctx.step.emit_workflow("k", "child")
    raise ValueError("late")


@pytest.mark.parametrize(
    ("changed", "number", "recorded", "asked"),
    [
        (ends_early, 3, 'wait "go"', "the run's end (completed)"),
        (waits_for_another, 3, 'wait "go"', 'wait "go" for signal "other"'),
        (starts_another, 6, 'child workflow "k"', 'child workflow "k" (another)'),
        (raises_late, 7, 'wait "more"', "the run's end (failed)"),
    ],
)
def test_the_report_names_the_recorded_command_itself(
    changed: Callable[..., Any], number: int, recorded: str, asked: str
) -> None:
    difference = Run(waits_and_starts).value("a").signal("go", "1").again(changed).play.difference
    assert difference is not None
    assert difference.number == number
    assert difference.recorded.startswith(recorded)
    assert difference.asked.startswith(asked)
    assert "test_line.py:" in difference.recorded_site
    assert "test_line.py:" in difference.asked_site


def test_a_recorded_command_that_is_not_issued_again_is_a_difference_also_where_the_code_ends() -> None:
    async def sleeps(ctx: Any) -> Any:
        await ctx.step.sleep("s", 5)

    async def returns(ctx: Any) -> Any:
        return None

    play = Run(sleeps).again(returns).play
    assert play.difference is not None
    assert play.difference.recorded == 'sleep "s"'
    assert play.end is None, "an end that the record does not bear out is none"


# --- branches and resumed ------------------------------------------------------------------------------


def test_an_added_branch_begins_where_resumed_stands_and_counts_from_its_time() -> None:
    import asyncio

    async def before(ctx: Any) -> Any:
        await asyncio.gather(ctx.step.run("a", work), ctx.step.run("b", work))

    async def after(ctx: Any) -> Any:
        await asyncio.gather(ctx.step.run("a", work), ctx.step.run("b", work), ctx.step.sleep("new", 10))

    run = Run(before).value("a", "1")
    run.now += 60_000_000
    new = run.again(after)
    assert new.play.difference is None
    assert [op.id for op in new.play.line.deferred] == ["new"]
    new.give(ev.Resumed(at=new.now))
    assert new.play.line.next_timer() == new.now + 10_000_000
    assert new.again().play.line.next_timer() == new.now + 10_000_000
    new.value("b", "2").after(10)
    assert new.status == "completed"
    assert new.again().status == "completed"


def test_a_new_wait_never_takes_a_recorded_signal() -> None:
    import asyncio

    async def before(ctx: Any) -> Any:
        await ctx.step.run("a", work)
        return await ctx.step.wait_signal("w", name="go")

    async def after(ctx: Any) -> Any:
        thief = asyncio.create_task(ctx.step.wait_signal("thief", name="go"))
        await ctx.step.run("a", work)
        found = await ctx.step.wait_signal("w", name="go")
        thief.cancel()
        return found

    run = Run(before).signal("go", "1").value("a")
    assert run.result == "1"
    run.events.pop()  # The end was not written.
    assert run.again(after).result == "1"


# --- patched -------------------------------------------------------------------------------------------


async def patched(ctx: Any) -> Any:
    if ctx.patched("fraud-first"):
        await ctx.step.run("fraud", work)
    answer = ctx.patched("fraud-first")
    await two_steps(ctx)
    return answer


def test_patched_is_false_for_a_run_that_has_passed_the_line_and_true_for_a_new_one() -> None:
    passed = Run(two_steps).value("a", "1").again(patched)
    assert passed.pending == ["b"]
    assert passed.value("b").result == "false"

    new = Run(patched)
    assert new.pending == ["fraud"]
    new.value("fraud").value("a").value("b")
    assert new.result == "true"
    assert new.again().result == "true"


def test_a_lone_started_is_life() -> None:
    assert Run(two_steps).again(patched).pending == ["fraud"]


# --- children ------------------------------------------------------------------------------------------


def test_the_end_of_a_cancelled_child_is_recorded_and_changes_nothing() -> None:
    @workflow
    async def child(ctx: Any) -> None: ...

    async def flow(ctx: Any) -> Any:
        handle = ctx.step.start("c", child)
        await handle.cancel()
        await ctx.step.run("a", work)

    run = Run(flow, known={"child": child})
    run.give(ev.ChildEnded(at=run.now, message="m", step="c", run="run-1/c", value=Raw(b"1")))
    assert run.pending == ["a"]
    assert run.again().pending == ["a"]


# --- digests -------------------------------------------------------------------------------------------


def test_other_arguments_are_noticed_and_the_recorded_outcome_is_used() -> None:
    async def before(ctx: Any) -> Any:
        await ctx.step.run("a", work, 1)
        await ctx.step.run("b", work)

    async def after(ctx: Any) -> Any:
        await ctx.step.run("a", work, 2)
        await ctx.step.run("b", work)

    again = Run(before).value("a", "1").again(after)
    assert again.play.difference is None
    assert [step for step, _ in again.play.line.digests_differ] == ["a"]


# --- cancellation --------------------------------------------------------------------------------------


def test_a_second_request_to_cancel_does_not_interrupt_cleanup() -> None:
    async def flow(ctx: Any) -> Any:
        try:
            await ctx.step.run("a", work)
        finally:
            await ctx.step.run("cleanup", work)

    run = Run(flow).cancel("first").cancel("second")
    assert run.pending == ["cleanup"]
    assert run.play.line.cancel_reason == "first"
    assert run.value("cleanup").status == "cancelled"
    assert run.again().status == "cancelled"


def test_returning_after_a_request_to_cancel_is_completed() -> None:
    import asyncio

    async def flow(ctx: Any) -> Any:
        try:
            await ctx.step.run("a", work)
        except asyncio.CancelledError:
            return ctx.cancel_reason

    run = Run(flow).cancel("tired")
    assert (run.status, run.result) == ("completed", '"tired"')
    assert run.dropped == ["a"]


def test_a_cancellation_without_a_request_fails_the_run() -> None:
    import asyncio

    async def flow(ctx: Any) -> Any:
        raise asyncio.CancelledError

    assert Run(flow).status == "failed"
