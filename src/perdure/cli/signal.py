"""`perdure signal`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from perdure.cli.fields import fields_of
from perdure.cli.inputs import given
from perdure.cli.options import Where, ask, common, never_read, usage
from perdure.cli.words import json_text, say, tell
from perdure.client import Client
from perdure.info import RunInfo


@click.command()
@click.argument("run")
@click.argument("name")
@click.option(
    "--input", metavar="JSON", multiple=True, help="The signal's value; several give a list. @FILE and - (stdin) work."
)
@click.option("--message-id", metavar="ID", help="The same id twice is one signal.")
@common
def command(where: Where, run: str, name: str, input: Sequence[str], message_id: str | None) -> None:
    """Send signal NAME to a run. When this returns, it is kept, also before the run waits for it."""
    values, _ = given(input).values()

    async def act(client: Client) -> RunInfo:
        with usage():
            handle = client.handle(run)
            await handle.signal(name, *values, message_id=message_id)
        return await handle.info()

    info = ask(where, act)
    if where.json:
        say(json_text(fields_of(info)))
    else:
        tell(f"Run {run} has the signal {name}.{never_read(where, info)}")
