"""Starting: once per id or key, now or later, and the ends that come from outside."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from perdure import (
    Client,
    Context,
    Engine,
    IdempotencyConflict,
    RunCancelled,
    RunExists,
    RunFinished,
    RunHandle,
    RunTerminated,
    RunTimedOut,
    activity,
    workflow,
)
from perdure.runtime.context import SyncContext
from perdure.stores.sqlite.store import SQLiteStore
from tests.integration.helpers import ask, contents, engine, kinds, status_of, until, url_of

ROOT = Path(__file__).parents[2]


@workflow
async def echo(ctx: Context, value: Any) -> Any:
    return await ctx.step.run("echo", lambda: value)


@workflow
async def other(ctx: Context, value: Any) -> Any:
    return value


@workflow
async def waiting(ctx: Context) -> Any:
    return await ctx.step.wait_signal("go")


async def test_an_id_belongs_to_one_run(tmp_path: Path) -> None:
    async with engine(tmp_path, echo, other) as it:
        first = await it.options(id="one").start(echo, 1)
        assert first.id == "one"
        assert await first.result(timeout=60) == 1
        before = contents(tmp_path)
        # The same again is the same run, also when it has ended.
        again = await it.options(id="one").start(echo, 1)
        assert await again.result(timeout=60) == 1
        with pytest.raises(IdempotencyConflict) as raised:
            await it.options(id="one").start(echo, 2)
        assert "input" in str(raised.value)
        with pytest.raises(IdempotencyConflict, match="workflow"):
            await it.options(id="one").start(other, 1)
        with pytest.raises(RunExists, match="one"):
            await it.options(id="one", if_exists="fail").start(echo, 1)
        assert contents(tmp_path) == before
    async with Client(url_of(tmp_path)) as client:
        assert await (await client.options(id="one").start("echo", 1)).result(timeout=60) == 1


async def test_an_idempotency_key_belongs_to_a_workflow_and_gives_one_run(tmp_path: Path) -> None:
    async with engine(tmp_path, echo, other) as it:
        keyed = it.options(idempotency_key="k")
        first = await keyed.start(echo, 1)
        assert (await keyed.start(echo, 1)).id == first.id
        # By position or by name, it is the same input.
        assert (await keyed.start(echo, value=1)).id == first.id
        assert (await keyed.start("echo", 1)).id == first.id
        with pytest.raises(IdempotencyConflict, match="k"):
            await keyed.start(echo, 2)
        assert (await keyed.start(other, 2)).id != first.id
        # The key is looked at before the id.
        assert (await it.options(idempotency_key="k", id="x").start(echo, 1)).id == first.id
        with pytest.raises(RunExists, match='The idempotency key "k" was used before') as refused:
            await it.options(idempotency_key="k", if_exists="fail").start(echo, 1)
        assert (refused.value.run_id, refused.value.key) == (first.id, "k")
    assert ask(tmp_path, "SELECT count(*) FROM perdure_runs") == [(2,)]


async def test_a_second_call_of_options_adds_to_the_first(tmp_path: Path) -> None:
    async with engine(tmp_path, echo) as it:
        named = it.options(id="a", if_exists="fail", idempotency_ttl=5, at=datetime.now(timezone.utc))
        later = named.options(delay=3600, timeout=7200)
        assert (await later.start(echo, 1)).id == "a"
        assert await later.handle("a").status() == "scheduled"
        with pytest.raises(RunExists):
            await later.start(echo, 1)
        assert (await later.options(if_exists="use").start(echo, 1)).id == "a"
        assert (await named.options(id="b").start(echo, 2)).id == "b"
        assert await it.handle("b").result(timeout=60) == 2
        assert (await it.start(echo, 3)).id not in ("a", "b")


async def test_many_starts_with_one_key_from_several_processes_make_one_run(tmp_path: Path) -> None:
    async with engine(tmp_path, echo) as it:
        await it.start(echo, 0)
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.integration.starting_process", url_of(tmp_path), "same", "25"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
                text=True,
            )
            for _ in range(3)
        ]
        loop = asyncio.get_running_loop()
        for process in processes:
            assert process.stdout is not None
            assert await loop.run_in_executor(None, process.stdout.readline) == "ready\n"
        said = [loop.run_in_executor(None, process.communicate, "go\n") for process in processes]
        handles = await asyncio.gather(*(it.options(idempotency_key="same").start(echo, 5) for _ in range(25)))
        ids = {handle.id for handle in handles}
        for out, _ in await asyncio.gather(*said):
            ids |= set(out.split())
        assert len(ids) == 1
        assert await handles[0].result(timeout=60) == 5
    assert ask(tmp_path, "SELECT count(*) FROM perdure_runs") == [(2,)]
    assert [process.returncode for process in processes] == [0, 0, 0]


async def test_a_run_starts_at_its_time_and_not_before(tmp_path: Path) -> None:
    async with engine(tmp_path, echo, waiting) as it:
        at = time.monotonic()
        when = datetime.now(timezone.utc) + timedelta(seconds=0.6)
        delayed = await it.options(delay=0.3).start(echo, 1)
        dated = await it.options(at=when).start(echo, 2)
        past = await it.options(at=datetime(2000, 1, 1, tzinfo=timezone.utc)).start(echo, 3)
        assert await delayed.status() == "scheduled"
        assert "starts at" in await delayed.why()
        assert await past.result(timeout=60) == 3
        assert await delayed.result(timeout=60) == 1
        assert 0.3 <= time.monotonic() - at < 3
        assert await dated.result(timeout=60) == 2
        started = (await dated.history())[0].at
        assert started is not None
        assert when <= started < when + timedelta(seconds=2)
        # Far ahead, and ended before its time.
        early = await it.options(delay=timedelta(days=300)).start(waiting)
        await early.signal("go", 1)
        assert await early.status() == "scheduled"
        far = await it.options(delay=timedelta(days=300)).start(waiting)
        await far.cancel("not needed")
        with pytest.raises(RunCancelled, match="not needed"):
            await far.result(timeout=60)
        again = await it.options(delay=timedelta(days=300)).start(waiting)
        await again.terminate("away")
        with pytest.raises(RunTerminated, match="away"):
            await again.result(timeout=60)


async def test_a_start_for_later_survives_its_process(tmp_path: Path) -> None:
    async with engine(tmp_path, echo) as first:
        handle = await first.options(delay=0.5).start(echo, 1)
    async with engine(tmp_path, echo) as second:
        assert await second.handle(handle.id).result(timeout=60) == 1


async def test_a_workers_own_runs_time_out_without_waiting_for_the_next_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SQLiteStore, "rounds", 3600)
    async with engine(tmp_path, waiting) as first:
        claimed = await first.options(delay=0.3, timeout=0.5).start(waiting)
    async with engine(tmp_path, waiting, lease=3600) as it:
        started = await it.options(timeout=0.3).start(waiting)
        for handle in (started, it.handle(claimed.id)):
            with pytest.raises(RunTimedOut):
                await handle.result(timeout=60)


async def test_a_run_that_takes_too_long_times_out_even_without_a_worker(tmp_path: Path) -> None:
    @workflow(timeout=0.3)
    async def limited(ctx: Context) -> None:
        await ctx.step.sleep("long", days=1)

    async with engine(tmp_path, limited, waiting) as it:
        own: RunHandle[Any] = await it.start(limited)
        given = await it.options(timeout=0.3).start(waiting)
        by_name: RunHandle[Any] = await it.start("limited")
        for handle in (own, given, by_name):
            with pytest.raises(RunTimedOut):
                await handle.result(timeout=60)
            assert await handle.status() == "timed_out"
            assert kinds(await handle.history())[-1] == "ended"
            with pytest.raises(RunFinished):
                await handle.signal("go")
            await handle.cancel()
            await handle.terminate()
            assert await handle.status() == "timed_out"
        nobody = await it.options(timeout=0.3, queue="nobody").start(waiting)
        with pytest.raises(RunTimedOut):
            await nobody.result(timeout=60)


async def test_a_timeout_counts_from_the_start_time(tmp_path: Path) -> None:
    async with engine(tmp_path, echo) as it:
        handle = await it.options(delay=0.8, timeout=0.7).start(echo, 1)
        assert await handle.result(timeout=60) == 1


async def test_ends_are_one_for_everybody(tmp_path: Path) -> None:
    """Complete, cancel and terminate race; all who look see the same end."""

    @workflow
    async def races(ctx: Context) -> str:
        await ctx.step.wait_signal("go")
        return "done"

    async with engine(tmp_path, races) as it, Client(url_of(tmp_path)) as elsewhere:
        for n in range(20):
            handle = await it.options(id=f"r{n}").start(races)
            there = elsewhere.handle(f"r{n}")
            await status_of(handle, "waiting")
            results = [asyncio.ensure_future(h.result(timeout=60)) for h in (handle, there)]
            verbs = [handle.signal("go"), there.cancel("c"), there.terminate("t"), handle.terminate("u")]
            await asyncio.gather(*verbs, return_exceptions=True)
            ends = await asyncio.gather(*results, return_exceptions=True)
            status = await handle.status()
            assert status.ended
            wanted = {"completed": str, "cancelled": RunCancelled, "terminated": RunTerminated}[str(status)]
            assert [type(end) for end in ends] == [wanted, wanted], (status, ends)
            history = await handle.history()
            assert kinds(history).count("ended") == 1
            assert history[-1].data["status"] == status


async def test_result_says_what_it_waits_for_and_the_run_goes_on(tmp_path: Path) -> None:
    async with engine(tmp_path, waiting) as it:
        handle: RunHandle[Any] = await it.start(waiting)
        with pytest.raises(TimeoutError, match='for signal "go"') as late:
            await handle.result(timeout=0.05)
        assert isinstance(late.value, asyncio.TimeoutError), "on Python 3.10 it is another class"
        await handle.signal("go", 1)
        assert await handle.result(timeout=60) == 1


async def test_who_waits_for_a_run_that_is_blocked_meanwhile_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    @workflow(name="waiting")
    async def changed(ctx: Context) -> Any:
        return await ctx.step.wait_signal("stop")

    monkeypatch.setattr("perdure.client.LOOK_FOR_BLOCKED", 0.02)
    async with engine(tmp_path, waiting) as it:
        await status_of(await it.options(id="w").start(waiting), "waiting")
    async with Client(url_of(tmp_path)) as client:
        result = asyncio.ensure_future(client.handle("w").result())
        async with engine(tmp_path, changed):
            await client.handle("w").signal("go", 1)
            await until(lambda: "waiting for the result of a blocked run: run w cannot be" in caplog.text)
            await asyncio.sleep(0.2)
        async with engine(tmp_path, waiting):
            assert await asyncio.wait_for(result, 60) == 1
    assert caplog.text.count("waiting for the result of a blocked run") == 1


async def test_the_result_of_an_ended_run_is_there_at_once(tmp_path: Path) -> None:
    async with engine(tmp_path, echo) as it:
        run = await it.start(echo, 1)
        assert await run.result(timeout=60) == 1
    async with Client(url_of(tmp_path)) as client:
        assert await client.handle(run.id).result(timeout=0) == 1


async def test_signals_are_kept_in_order_and_once_by_their_id(tmp_path: Path) -> None:
    @workflow
    async def three(ctx: Context) -> list[Any]:
        return [await ctx.step.wait_signal(f"w{n}", name="go") for n in range(3)]

    async with engine(tmp_path, three) as it:
        handle = await it.options(delay=0.3).start(three)
        # Before the first turn, before the waits.
        await handle.signal("go", "a", message_id="m1")
        await handle.signal("go", "a", message_id="m1")
        await handle.signal("go")
        await handle.signal("go", 1, 2)
        assert await handle.result(timeout=60) == ["a", None, [1, 2]]
        with pytest.raises(RunFinished):
            await handle.signal("go")


async def test_lists_and_counts(tmp_path: Path) -> None:
    async with engine(tmp_path, echo, waiting) as it:
        for n in range(5):
            await (await it.options(id=f"e{n}").start(echo, n)).result(timeout=60)
        for n in range(3):
            await status_of(await it.options(id=f"w{n}").start(waiting), "waiting")
        assert await it.counts() == {"completed": 5, "waiting": 3}
        assert await it.counts(workflow="waiting") == {"waiting": 3}
        page = await it.list_runs(limit=6)
        assert [info.id for info in page.items] == ["w2", "w1", "w0", "e4", "e3", "e2"]
        rest = await it.list_runs(limit=6, cursor=page.cursor)
        assert [info.id for info in rest.items] == ["e1", "e0"]
        assert rest.cursor is None
        assert [info.id for info in (await it.list_runs(status="waiting", workflow="waiting")).items] == [
            "w2",
            "w1",
            "w0",
        ]
        info = await it.handle("e1").info()
        assert (info.workflow, info.status, info.result, info.generation) == ("echo", "completed", 1, 1)


async def test_a_start_by_name_keeps_the_workflows_own_timeout(tmp_path: Path) -> None:
    @workflow(timeout=0.3)
    async def limited(ctx: Context) -> None:
        await ctx.step.sleep("long", hours=1)

    url = f"sqlite:///{tmp_path / 'runs.db'}"
    async with Engine(url, workflows=[limited]), Client(url) as client:
        run = await client.start("limited")
        with pytest.raises(RunTimedOut):
            await run.result(timeout=60)


@workflow
async def bare(ctx: Context) -> Any:
    return ctx.input


@workflow
def bare_sync(ctx: SyncContext) -> Any:
    return ctx.input


@pytest.mark.parametrize("flow", [bare, bare_sync], ids=lambda flow: flow.name)
async def test_a_workflow_with_no_parameter_but_the_context_takes_its_input_from_there(
    flow: Any, tmp_path: Path
) -> None:
    async with engine(tmp_path, flow) as it:
        assert await (await it.start(flow, {"a": [1, 2]})).result(timeout=60) == {"a": [1, 2]}
        assert await (await it.start(flow)).result(timeout=60) is None
        with pytest.raises(TypeError):
            await it.start(flow, 1, 2)
        with pytest.raises(TypeError):
            await it.start(flow, a=1)
    async with Client(url_of(tmp_path)) as client:
        handle = await client.start(flow.name, 5)
        async with engine(tmp_path, flow):
            assert await handle.result(timeout=60) == 5


def test_a_setting_that_a_decorator_does_not_know_is_refused_at_its_line() -> None:
    decorators: list[tuple[Any, str]] = [(workflow, "@workflow"), (activity, "@activity")]
    for decorator, what in decorators:
        with pytest.raises(TypeError, match=f"{what}: .*'naem'"):
            decorator(naem="x")
        with pytest.raises(TypeError, match=f"{what} got 'x'"):
            decorator("x")
