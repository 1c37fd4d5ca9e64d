"""`perdure worker`: one process, or several under a parent that starts them again."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import platform
import sys
import threading
from collections.abc import Sequence
from typing import Final

import click

from perdure.cli.aside import Aside, end_soon
from perdure.cli.modules import load_served
from perdure.cli.options import Seconds, Where, common, usage
from perdure.cli.words import json_text, say, tell
from perdure.engine import GRACE, Worker
from perdure.runtime.registry import Registry
from perdure.stores.opening import VARIABLE, open_store

BEYOND_GRACE: Final = 3.0
"""Seconds for what comes after the grace: the last commit, and giving the runs back."""


@click.command()
@click.argument("modules", metavar="MODULE...", nargs=-1, required=True)
@click.option(
    "--queue", "queues", metavar="NAME", multiple=True, help="Serve this queue; repeatable. [default: default]"
)
@click.option("--processes", type=click.IntRange(1, 256), default=1, show_default=True, help="Worker processes.")
@click.option(
    "--concurrency",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Steps and activities executing at once, per process.",
)
@click.option("--threads", type=click.IntRange(min=1), default=32, show_default=True, help="Threads for sync ones.")
@click.option(
    "--lease",
    type=Seconds(min=0.1),
    default=15,
    show_default=True,
    metavar="SECONDS",
    help="After this long without a sign of life others take a worker's runs over.",
)
@click.option(
    "--grace",
    type=Seconds(min=0),
    default=GRACE,
    show_default=True,
    metavar="SECONDS",
    help="How long steps in flight may go on after SIGTERM.",
)
@click.option("--child", is_flag=True, hidden=True, help="Stop when stdin ends: the parent has died.")
@common
def command(
    where: Where,
    modules: Sequence[str],
    queues: Sequence[str],
    processes: int,
    concurrency: int,
    threads: int,
    lease: float,
    grace: float,
    child: bool,
) -> int:
    """Serve the workflows and activities of some modules, until SIGTERM or Ctrl-C.

    MODULE is a module's name or a path to a .py file. On the first signal steps in flight may end, then the runs go
    back to other workers (exit 0, or 1 if the grace ran out). A second signal ends the process at once.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    loaded = [load_served(name) for name in modules]
    with usage():
        registry = Registry(loaded, loaded)
    if processes > 1:
        from perdure.cli.processes import Processes

        # Looked at here once: what is wrong with the store is then said once, and it is made once.
        open_store(where.url).close()
        options = [*(f"--queue={queue}" for queue in queues), f"--concurrency={concurrency}", f"--threads={threads}"]
        options += [f"--lease={lease}", f"--grace={grace}", f"--namespace={where.namespace}"]
        line = [sys.executable, "-m", "perdure", "worker", *options, "--child", "--", *modules]
        # Not on the command line, which everybody may read: there may be a password in it.
        code = Processes(line, {VARIABLE: where.url}, processes, patience=grace + BEYOND_GRACE + 1).run()
        _report(where, registry, drained=code == 0)
        return code
    with usage():
        worker = Worker(
            where.url,
            workflows=loaded,
            activities=loaded,
            namespace=where.namespace,
            queues=queues or ("default",),
            concurrency=concurrency,
            threads=threads,
            lease=lease,
            name=f"{platform.node() or 'worker'}:{os.getpid()}",
        )

    # This process is ours. What was imported stays, and at full load 700 new containers, after which the collector
    # looks by default, are the making of one batch.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)

    async def serve(asked: asyncio.Event) -> bool:
        serving = asyncio.ensure_future(worker.run())
        asking = asyncio.ensure_future(asked.wait())
        await asyncio.wait({serving, asking}, return_when=asyncio.FIRST_COMPLETED)
        if asked.is_set():
            tell("Stopping: steps in flight may end. The next signal ends the process at once.")
            await worker.stop(grace)
        asking.cancel()
        await serving
        return worker.drained

    aside = Aside(serve, patience=grace + BEYOND_GRACE, impatient=1)
    if child:
        threading.Thread(target=_mind_the_parent, args=(aside,), name="perdure-parent", daemon=True).start()
    drained = aside.run()
    if not child:
        _report(where, registry, drained=drained)
    return end_soon(0 if drained else 1)


def _mind_the_parent(aside: Aside[bool]) -> None:
    """Stdin is a pipe from the parent, who never writes: its end is the parent's."""
    os.read(0, 1)
    aside.ask_to_stop()


def _report(where: Where, registry: Registry, *, drained: bool) -> None:
    if where.json:
        say(
            json_text(
                {"workflows": list(registry.workflows), "activities": list(registry.activities), "drained": drained}
            )
        )
    elif not drained:
        tell("The grace ran out before all steps had ended. Their runs went back to other workers, which repeat them.")
