"""What a worker does with a run that killed two: how it names what a child serves, and when there can be no child."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from perdure import Client, Context, Engine, SQLiteStore, Worker, activity, workflow
from perdure.core.turn import Announced, Announcement, Batch, Claim, Committed, Turn
from perdure.stores.contract import Store
from perdure.stores.memory import MemoryStore
from perdure.worker.shift import Settings
from perdure.worker.suspects import MOST_FAILURES, UNFIT, Child, Suspects, Unimportable, instructions
from tests.integration.helpers import ask, until, url_of


@workflow
async def harmless(ctx: Context, n: int) -> int:
    return await ctx.step.run("double", lambda: n * 2)


@workflow(name="harmless")
async def at_once(ctx: Context, n: int) -> int:
    return n


@activity(queue="far")
def far() -> None: ...


async def struck(store: Store, id: str = "suspect", strikes: int = 2) -> None:
    """A run of `harmless` that is under suspicion."""
    before = f"before {id}"
    store.announce(
        Announcement(
            incarnation=before, name="b", namespace="default", queues=[], serves=[Announced(name="harmless")], ttl=10**9
        )
    )
    async with Client(store) as client:
        await client.options(id=id).start(harmless, 21)
    claim = Claim(incarnation=before, namespace="default", queues=["default"], workflows=["harmless"])
    [head] = store.claim(claim)
    row = head.row
    for n in range(strikes + 1):
        turn = Turn(
            run=row.key, owner=before, epoch=row.epoch, version=row.version + n, id=f"{id}-{n}", first_seq=2,
            last=f"{id}-{n - 1}" if n else row.turn, status="running" if n < strikes else "ready", strike=n < strikes,
            release=n == strikes,
        )  # fmt: skip
        assert store.write(Batch(turns=[turn])) == [Committed(run=row.key)]
    store.retire(before)


async def test_a_run_that_ends_has_no_strikes_left(tmp_path: Path) -> None:
    """Also without a step: its end is an outcome (its worker may have died after the last step's commit)."""
    store = SQLiteStore(tmp_path / "runs.db")
    await struck(store, "struck", strikes=1)
    async with Engine(store, workflows=[at_once]) as engine:
        handle = engine.handle("struck")
        await handle.result()
    store.close()
    [(strikes,)] = ask(tmp_path, "SELECT strikes FROM perdure_runs")
    assert strikes == 0


def settings() -> Settings:
    return Settings(name="w")


def test_what_is_served_is_named_by_module_and_variable() -> None:
    here = sys.modules[__name__]
    told = instructions(settings(), [harmless, here], [far], grace=7)
    named = {"module": __name__, "file": __file__}
    assert told["workflows"] == [{**named, "variable": "harmless"}, {**named, "variable": None}]
    assert told["activities"] == [{**named, "variable": "far"}]
    assert (told["grace"], told["name"]) == (7, "w")
    assert json.loads(json.dumps(told)) == told


def test_what_is_made_inside_a_function_cannot_be_served_elsewhere() -> None:
    @workflow
    async def inside(ctx: Context) -> None: ...

    with pytest.raises(Unimportable, match="is no variable of a module"):
        instructions(settings(), [inside], [], grace=1)


async def test_a_worker_that_can_have_no_child_takes_the_suspect_itself(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    await struck(store)
    worker = Worker(store, workflows=[harmless])
    serving = asyncio.create_task(worker.run())
    async with Client(store) as client:
        assert await client.handle("suspect").result(timeout=60) == 42
    await worker.stop()
    await serving
    assert "cannot have a process of their own: nobody else can open its store" in caplog.text


async def test_suspects_that_are_harmless_go_on_and_share_a_process_one_after_the_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = SQLiteStore(tmp_path / "runs.db")
    for n in range(12):
        await struck(store, f"suspect-{n}")
    worker = Worker(url_of(tmp_path), workflows=[harmless])
    serving = asyncio.create_task(worker.run())
    async with Client(store) as client:
        for n in range(12):
            assert await client.handle(f"suspect-{n}").result(timeout=60) == 42
        # Nobody needs a process any more, and nobody has to stop it.
        suspects = worker._core._suspects
        assert suspects is not None
        await until(lambda: not suspects.children, "the end of the last child")
    await worker.stop()
    await serving
    store.close()
    assert 1 <= caplog.text.count("is to be executed alone") < 6


class FakeChild:
    """A child that ends as it is told."""

    def __init__(self, code: int | None, incarnation: str | None = None) -> None:
        self.code = code
        self.incarnation = incarnation
        self.has_one = incarnation is not None
        self.asked = self.closed = False
        self.since = 0.0
        self.process = types.SimpleNamespace(pid=1, kill=self.killed, wait=lambda: None)

    def killed(self) -> None:
        self.code = -9

    def ask_to_stop(self) -> None:
        self.asked = True

    def close(self) -> None:
        self.closed = True


class Elsewhere(MemoryStore):
    """One that others can open, as far as anybody is told."""

    def elsewhere(self) -> str | None:
        return "sqlite:///x.db"


class Story:
    """Suspects over a memory store, a time that stands still, and fake children."""

    def __init__(self, children: list[FakeChild]) -> None:
        self.store = Elsewhere()
        self.lines: list[dict[str, Any]] = []
        self.now = 0.0
        self.shift: Any = types.SimpleNamespace(
            settings=settings(),
            incarnation="w",
            draining=False,
            closed=False,
            registry=types.SimpleNamespace(workflows={"harmless": harmless}, activities={}),
        )
        self.shift.settings.suspects = "apart"
        left = iter(children)

        def start(line: bytes) -> Any:
            self.lines.append(json.loads(line))
            return next(left)

        self.suspects = Suspects(
            self.store,
            self.shift,  # type: ignore[arg-type]
            {"some": "thing"},
            start=start,
            monotonic=lambda: self.now,
        )


async def test_one_child_is_started_at_a_time_and_a_few_at_once() -> None:
    children = [FakeChild(None) for _ in range(9)]
    story = Story(children)
    assert story.suspects.step() == 0
    await struck(story.store)
    assert [story.suspects.step() for _ in range(3)] == [1, 0, 0]
    assert story.lines == [{"some": "thing", "store": "sqlite:///x.db"}]
    started = 1
    for child in children[:8]:
        child.incarnation, child.has_one = "taken", True
        started += story.suspects.step()
    assert started == len(story.suspects.children) == 4


async def test_children_that_come_to_nothing_are_started_ever_more_rarely_and_then_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    story = Story([FakeChild(-11) for _ in range(MOST_FAILURES)])
    await struck(story.store)
    started = []
    for second in range(20):
        story.now = second
        if story.suspects.step():
            started.append(second)
    assert started == [0, 2, 5]
    assert story.shift.settings.suspects == "here"
    assert caplog.text.count("cannot have a process of their own") == 1


async def test_a_child_that_never_takes_a_run_is_ended_and_another_tried() -> None:
    hanging = FakeChild(None)
    story = Story([hanging, FakeChild(None)])
    await struck(story.store)
    assert story.suspects.step() == 1
    story.now = 59
    assert (story.suspects.step(), hanging.code) == (0, None)
    story.now = 61
    assert (story.suspects.step(), hanging.code) == (0, -9)
    story.now = 63
    assert story.suspects.step() == 1


async def test_a_child_that_cannot_serve_is_not_tried_again() -> None:
    story = Story([FakeChild(UNFIT)])
    await struck(story.store)
    assert (story.suspects.step(), story.suspects.step()) == (1, 0)
    assert story.shift.settings.suspects == "here"


async def test_a_child_that_found_nothing_to_take_was_no_failure() -> None:
    story = Story([FakeChild(0) for _ in range(9)])
    await struck(story.store)
    assert [story.suspects.step() for _ in range(9)] == [1] * 9
    assert story.shift.settings.suspects == "apart"


async def test_what_is_asked_to_stop_and_closed() -> None:
    child = FakeChild(None, "taken")
    story = Story([child])
    await struck(story.store)
    story.suspects.step()
    assert not story.suspects.drained
    story.suspects.ask_to_stop()
    assert child.asked
    story.suspects.close()
    assert child.closed


def test_a_child_that_dies_before_it_listens_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    child = Child(b"x" * 100_000 + b"\n")
    child.process.wait(20)
    assert (child.code, child.has_one, child.incarnation) == (1, False, None)
    child.close()


UNGUARDED = """
import asyncio, logging, sys
from perdure import Context, Worker, workflow

@workflow
async def harmless(ctx: Context, n: int) -> int:
    return await ctx.step.run("double", lambda: n * 2)

logging.basicConfig()
asyncio.run(Worker(sys.argv[1], workflows=[harmless], name=__name__).run())
"""


async def test_a_script_that_serves_when_it_is_imported_still_has_its_suspects_executed(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "runs.db")
    await struck(store)
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, str(script), url_of(tmp_path)], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        async with Client(store) as client:
            assert await client.handle("suspect").result(timeout=60) == 42
    finally:
        process.terminate()
    said = process.communicate(timeout=20)[1]
    assert 'Put what starts the worker under `if __name__ == "__main__":`' in said
    assert "a process of its own could not serve it" in said
    store.close()


def test_the_level_of_the_log_is_passed_on() -> None:
    root = logging.getLogger()
    told = instructions(settings(), [harmless], [], grace=1)
    assert told["log"] == (root.level if root.handlers else None)


@pytest.mark.parametrize("said", [b"", b'{"log": '])
def test_a_process_whose_worker_is_gone_before_it_has_said_all_ends_without_a_word(said: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(said)
        line = [sys.executable, "-m", "perdure.solitary"]
        with subprocess.Popen(line, stdin=theirs.fileno(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            theirs.close()
            ours.close()
            assert process.communicate(timeout=60)[0] == b""
    assert process.returncode == 0
