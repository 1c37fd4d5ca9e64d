"""`perdure cancel`."""

from __future__ import annotations

import click

from perdure.cli.fields import fields_of
from perdure.cli.options import Where, ask, common, never_read, usage
from perdure.cli.words import json_text, say, tell
from perdure.client import Client
from perdure.info import RunInfo


@click.command()
@click.argument("run")
@click.option("--reason", default="", help="Why; the run and those who wait for it are told.")
@common
def command(where: Where, run: str, reason: str) -> None:
    """Ask a run's code to stop.

    It arrives where the run waits; cleanup steps after it still run. Twice is once."""

    async def act(client: Client) -> RunInfo:
        with usage():
            handle = client.handle(run)
        await handle.cancel(reason)
        return await handle.info()

    info = ask(where, act)
    if where.json:
        say(json_text(fields_of(info)))
    else:
        asked = f"Run {run} was asked to cancel.{never_read(where, info)}"
        tell(f"Run {run} is {info.status}." if info.status.ended else asked)
