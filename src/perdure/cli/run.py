"""`perdure run`: one workflow in this process, to its end, its steps shown as they happen."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from typing import Any, Final

import click

from perdure.cli.aside import Aside, end_soon
from perdure.cli.command import INTERRUPTED, NO_SUCCESS, STORE
from perdure.cli.ended import told
from perdure.cli.fields import fields_of, stored
from perdure.cli.following import Follower
from perdure.cli.inputs import Given, given, inputs
from perdure.cli.modules import load_workflow, queues_of
from perdure.cli.options import Seconds, Where, common, usage
from perdure.cli.words import json_text, say, tell
from perdure.client import RunHandle
from perdure.engine import Engine, _Serves
from perdure.info import RunInfo
from perdure.runtime.registry import Workflow

GRACE: Final = 5.0
"""Seconds that steps in flight get to end after Ctrl-C, and other runs' steps after ours has ended."""


class Stopped(Exception):
    """The run goes on another time. text: what to tell; code: the exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.text = text
        self.code = code


@click.command()
@click.argument("target", metavar="MODULE:WORKFLOW")
@inputs
@click.option(
    "--id",
    "run_id",
    metavar="ID",
    help="The run's id. The same id again goes on with the same run. [default: a new one]",
)
@click.option("--timeout", type=Seconds(min=0), metavar="SECONDS", help="Wait no longer; then exit 5.")
@common
def command(
    where: Where, target: str, input: Sequence[str], arg: Sequence[str], run_id: str | None, timeout: float | None
) -> int:
    """Run a workflow here, to its end; show its steps on stderr, print its result as JSON.

    MODULE is a module's name or a path to a .py file; all its workflows are served, so that children run too.
    The run is durable: after Ctrl-C, a crash or kill -9 the same command with the same --id goes on where it was, and
    so does a worker. With --json the run is printed, with the fields of RunInfo.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("perdure.client").setLevel(logging.ERROR)  # what it says of blocked runs we say ourselves
    arguments = given(input, arg)
    module, workflow = load_workflow(target)
    with usage():
        args, kwargs = workflow.signature.decode(arguments.stored())
        engine = Engine(
            where.url,
            workflows=[module],
            activities=[module],
            namespace=where.namespace,
            queues=queues_of(module),
            name=f"{platform.node() or 'worker'}:{os.getpid()}",
        )
        starting = engine.options(id=run_id)

    async def main(asked: asyncio.Event) -> RunInfo:
        core = engine._core
        assert isinstance(core, _Serves)
        try:
            await core.open()
            since = core.store.now()
            handle = await _start(starting, workflow, args, kwargs)
            follower = Follower(core, handle, since=since)
            try:
                async with told(where, handle):
                    return await _to_the_end(
                        handle, follower, asked, timeout, lambda: _how_to_go_on(where, target, arguments, handle.id)
                    )
            except Stopped as stopped:
                # Before anything is waited for: the next signal ends the process.
                await follower.close()
                tell(stopped.text)
                raise
            finally:
                await follower.close()
        finally:
            await core.drain(GRACE)
            await core.close()

    try:
        info = Aside(main, patience=GRACE + 5, impatient=INTERRUPTED).run()
    except Stopped as stopped:
        return end_soon(stopped.code)
    say(json_text(fields_of(info) if where.json else stored(info.result)))
    return end_soon(0)


async def _start(
    starting: Any, workflow: Workflow[Any, Any], args: list[Any], kwargs: dict[str, Any]
) -> RunHandle[Any]:
    with usage():
        handle: RunHandle[Any] = await starting.start(workflow, *args, **kwargs)
    return handle


async def _to_the_end(
    handle: RunHandle[Any], follower: Follower, asked: asyncio.Event, timeout: float | None, go_on: Any
) -> RunInfo:
    """Wait for the result, an interruption, a block or a store that cannot be written, whatever comes first."""
    result = asyncio.ensure_future(handle.result(timeout=timeout))
    asking = asyncio.ensure_future(asked.wait())
    blocked = asyncio.ensure_future(follower.follow())
    try:
        await asyncio.wait({result, asking, blocked}, return_when=asyncio.FIRST_COMPLETED)
        if result.done():
            await follower.last()
            result.result()
            return await handle.info()
        if blocked.done() and follower.stuck:
            raise Stopped(
                f"{blocked.result()}\nRun {handle.id} is kept as far as it was written, and goes on with: {go_on()}",
                STORE,
            )
        if blocked.done():
            raise Stopped(
                f"{blocked.result()}\nIt waits for code that fits its history. Then it goes on with: {go_on()}",
                NO_SUCCESS,
            )
        raise Stopped(
            f"Interrupted: steps in flight may end, for {GRACE:g} s; the next signal ends them. "
            f"Run {handle.id} is kept and goes on with: {go_on()}",
            INTERRUPTED,
        )
    finally:
        for task in (result, asking, blocked):
            task.cancel()
        await asyncio.gather(result, asking, blocked, return_exceptions=True)


def _how_to_go_on(where: Where, target: str, arguments: Given, run_id: str) -> str:
    """The command that goes on with this run: an id that exists takes the same input only."""
    words = ["perdure", "run", target, "--id", run_id]
    for text in arguments.positional:
        words += ["--input", text]
    for name, text in arguments.named.items():
        words += ["--arg", f"{name}={text}"]
    return f"{shlex.join(words)}{where.same()}"
