"""Executing functions: a function that was withdrawn in time is never called, wherever it was to run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from perdure import activity
from perdure.core.limits import Limits
from perdure.runtime.drive_sync import BodyThreads
from perdure.runtime.steps import NO_OPTIONS, LocalCall, Policy
from perdure.worker.executing import Execution, Executor, StepInfo


class Threads(BodyThreads):
    """Threads that come to their jobs when the test says so, all in this one."""

    def __init__(self) -> None:
        super().__init__(1)
        self.jobs: list[Callable[[], None]] = []

    def run(self, job: Callable[[], None]) -> Any:
        self.jobs.append(job)

    def lose(self, thread: Any, job: Callable[[], None]) -> None: ...


called: list[str] = []
told: list[str] = []


@activity
def in_thread() -> None:
    called.append("in_thread")


@activity
async def on_loop() -> None:
    called.append("on_loop")


def execution(what: Any) -> Execution:
    call = LocalCall(what.fn, (), {}, Policy(what, NO_OPTIONS), Limits())
    done = lambda execution, value, error: told.append(execution.step)  # noqa: E731
    return Execution(what.name, 1, call, StepInfo("run-1", "flow", what.name, 1, "seed"), done)


@pytest.mark.parametrize("what", [in_thread, on_loop], ids=["in a thread", "on the loop"])
@pytest.mark.parametrize("in_time", [True, False], ids=["in time", "too late"])
async def test_a_function_withdrawn_in_time_is_never_called(what: Any, in_time: bool) -> None:
    called.clear()
    told.clear()
    threads = Threads()
    executor = Executor(asyncio.get_running_loop(), threads)
    attempt = execution(what)
    executor.begin(attempt)
    if in_time:
        assert attempt.withdraw()
        assert attempt.withdraw(), "twice is once"
    for job in threads.jobs:
        job()
    for _ in range(5):
        await asyncio.sleep(0)
    if in_time:
        assert (called, told) == ([], [])
    else:
        assert not attempt.withdraw()
        assert (called, told) == ([what.name], [what.name])
