"""Generator workflows: each yielded operation is awaited, a list is gathered, anything else is refused there."""

from __future__ import annotations

from typing import Any

from tests.unit.playing import Run, work


def test_yields_operations_and_lists() -> None:
    def flow(ctx: Any) -> Any:
        one = yield ctx.step.run("a", work)
        two = yield [ctx.step.run("b", work), ctx.step.run("c", work)]
        return [one, *two]

    run = Run(flow).value("a", "1").value("c", "3").value("b", "2")
    assert run.result == "[1,2,3]"
    assert run.again().result == "[1,2,3]"


def test_an_error_arrives_at_the_yield() -> None:
    def flow(ctx: Any) -> Any:
        try:
            yield ctx.step.run("a", work)
        except ValueError:
            return "caught"

    assert Run(flow).fails("a").result == '"caught"'


def test_a_yielded_handle_is_a_type_error_at_that_yield() -> None:
    def flow(ctx: Any) -> Any:
        handle = ctx.step.start("a", work)
        try:
            yield handle
        except TypeError as error:
            return str(error)

    assert ".result()" in Run(flow).result


def test_cancellation_arrives_at_the_yield_and_cleanup_runs() -> None:
    def flow(ctx: Any) -> Any:
        try:
            yield ctx.step.run("a", work)
        finally:
            yield ctx.step.run("cleanup", work)

    run = Run(flow).cancel()
    assert run.pending == ["cleanup"]
    assert run.value("cleanup").status == "cancelled"
