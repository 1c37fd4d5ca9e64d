"""Executing functions: a function that was withdrawn in time is never called, wherever it was to run."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest

from perdure import activity
from perdure.core.limits import Limits
from perdure.runtime.drive_sync import BodyThreads
from perdure.runtime.steps import NO_OPTIONS, LocalCall, Policy
from perdure.worker import executing
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


def unexpected(one: Any, error: BaseException) -> None:
    raise error


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
    executor = Executor(asyncio.get_running_loop(), threads, unexpected)
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


class NoThreads(Threads):
    """A system that gives no thread for a while."""

    def __init__(self, refusals: int) -> None:
        super().__init__()
        self.limit = 2
        self.refusals = refusals

    def run(self, job: Callable[[], None]) -> Any:
        if self.refusals:
            self.refusals -= 1
            raise RuntimeError("can't start new thread")
        job()


async def test_a_function_for_which_there_is_no_thread_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executing, "ASK_AGAIN", 0)
    called.clear()
    told.clear()
    executor = Executor(asyncio.get_running_loop(), NoThreads(3), unexpected)
    for _ in range(4):
        executor.begin(execution(in_thread))
    while len(told) < 4:
        await asyncio.sleep(0)
    assert called == ["in_thread"] * 4
    while executor.in_threads:
        await asyncio.sleep(0)


async def test_what_has_waited_for_a_thread_asks_again_whether_it_may_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executing, "ASK_AGAIN", 0)
    told.clear()
    threads, sure = Threads(), True
    executor = Executor(asyncio.get_running_loop(), threads, unexpected, may_begin=lambda: sure)
    executor.begin(execution(in_thread))
    executor.begin(execution(in_thread))
    sure = False
    threads.jobs.pop()()
    for _ in range(10):
        await asyncio.sleep(0)
    assert (told, threads.jobs) == (["in_thread"], [])
    sure = True
    while not threads.jobs:
        await asyncio.sleep(0)
    threads.jobs.pop()()
    while len(told) < 2:
        await asyncio.sleep(0)


async def test_time_counts_from_the_beginning_of_a_function_and_not_while_it_waits_for_a_thread() -> None:
    threads = Threads()
    counting: list[int] = []

    class Timer:
        def __init__(self, number: int) -> None:
            counting.append(number)

        def cancel(self) -> None: ...

    executor = Executor(asyncio.get_running_loop(), threads, unexpected)
    for number in range(2):
        attempt = execution(in_thread)
        attempt.limit = functools.partial(Timer, number)
        executor.begin(attempt)
    assert counting == [0]
    threads.jobs.pop()()
    while not threads.jobs:
        await asyncio.sleep(0)
    assert counting == [0, 1]


async def test_an_outcome_that_cannot_be_taken_is_told_of_and_costs_no_other() -> None:
    told.clear()
    failures: list[Any] = []
    executor = Executor(asyncio.get_running_loop(), Threads(), lambda one, error: failures.append((one, str(error))))

    class One:
        def ended(self, execution: Execution, value: Any, error: BaseException | None) -> None:
            raise MemoryError("no memory")

    one, bad, good = One(), execution(on_loop), execution(on_loop)
    bad.done = one.ended
    executor.begin(bad)
    executor.begin(good)
    for _ in range(5):
        await asyncio.sleep(0)
    assert failures == [(one, "no memory")]
    assert told == ["on_loop"]
