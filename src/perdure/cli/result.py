"""`perdure result`."""

from __future__ import annotations

import click

from perdure.cli.ended import told
from perdure.cli.fields import fields_of, stored
from perdure.cli.options import Seconds, Where, ask, common, usage
from perdure.cli.words import json_text, say
from perdure.client import Client
from perdure.info import RunInfo


@click.command()
@click.argument("run")
@click.option("--timeout", type=Seconds(min=0), metavar="SECONDS", help="Wait no longer; then exit 5.")
@common
def command(where: Where, run: str, timeout: float | None) -> None:
    """Wait for a run's end and print its result as JSON; exit 1 if it ended without success."""

    async def wait(client: Client) -> RunInfo:
        with usage():
            handle = client.handle(run)
        async with told(where, handle):
            await handle.result(timeout=timeout)
        return await handle.info()

    info = ask(where, wait)
    say(json_text(fields_of(info) if where.json else stored(info.result)))
