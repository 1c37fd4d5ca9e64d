"""The blocking face where it cannot answer: after its end, and in a forked child."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from perdure import Context, Engine, RunFailed, UnknownWorkflow, sync, workflow
from tests.integration.helpers import url_of


@workflow
async def double(ctx: Context, value: int) -> int:
    return value * 2


def test_what_was_closed_says_so(tmp_path: Path) -> None:
    with sync.Engine(url_of(tmp_path), workflows=[double]) as it:
        run = it.start(double, 1)
        assert run.result(timeout=60) == 2
    it.close()
    for ask in (lambda: it.start(double, 2), run.result, run.info, it.counts):
        with pytest.raises(RuntimeError, match="was closed"):
            ask()


def _asks(it: sync.Engine, answers: Any) -> None:
    try:
        it.start(double, 2)
    except RuntimeError as error:
        answers.send(str(error))


def test_a_forked_child_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    with sync.Engine(url_of(tmp_path), workflows=[double]) as it:
        ours, theirs = fork.Pipe()
        child = fork.Process(target=_asks, args=(it, theirs))
        child.start()
        try:
            assert ours.poll(10), "the child hangs"
            assert "another process" in ours.recv()
        finally:
            child.kill()
            child.join()
        assert it.start(double, 4).result(timeout=60) == 8


async def test_the_face_of_an_async_engine_is_refused_in_a_forked_child_too(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    async with Engine(url_of(tmp_path), workflows=[double]) as it:
        ours, theirs = fork.Pipe()
        child = fork.Process(target=lambda: _asks(it.sync, theirs))
        child.start()
        try:
            assert await asyncio.to_thread(ours.poll, 10), "the child hangs"
            assert "another process" in ours.recv()
        finally:
            child.kill()
            child.join()


engines: list[Any] = []


@workflow
def starts_in_its_body(ctx: sync.Context) -> str:
    return str(engines[0].start(double, 1).id)


@workflow
async def starts_in_its_async_body(ctx: Context) -> str:
    return str(engines[0].start(double, 1).id)


@workflow
def starts_in_a_step(ctx: sync.Context) -> int:
    return int(ctx.step.run("start", lambda: engines[0].start(double, 21).result(timeout=60)))


@pytest.mark.parametrize("flow", [starts_in_its_body, starts_in_its_async_body], ids=["def", "async def"])
async def test_a_blocking_call_in_a_workflows_own_code_is_refused_at_its_line(tmp_path: Path, flow: Any) -> None:
    async with Engine(url_of(tmp_path), workflows=[double, flow, starts_in_a_step]) as it:
        engines[:] = [it.sync]
        with pytest.raises(RunFailed, match=r"ctx\.step\.run_workflow"):
            await (await it.start(flow)).result(timeout=60)
        assert await (await it.start(starts_in_a_step)).result(timeout=60) == 42


SERVING = """
import sys, time
from perdure import sync, workflow

def slow():
    print("executing", flush=True)
    time.sleep(0.5)
    return 1

@workflow
def works(ctx: sync.Context) -> int:
    return ctx.step.run("slow", slow)

worker = sync.Worker(sys.argv[1], workflows=[works])
print("serving", flush=True)
worker.run()
worker.stop()
worker.stop()
"""


def _started(client: sync.Client, workflow: str) -> sync.RunHandle[Any]:
    """A run, as soon as a worker has said that it serves its workflow."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return client.start(workflow)
        except UnknownWorkflow:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_blocking_worker_drains_at_the_first_signal(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVING, url_of(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "serving\n"
        with sync.Client(url_of(tmp_path)) as client:
            run = _started(client, "works")
            assert process.stdout.readline() == "executing\n"
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=60)
            assert (process.returncode, said) == (0, "")
            assert run.info().status in ("ready", "waiting", "completed"), "it was handed back, or had ended"
    finally:
        process.kill()
        process.wait()
