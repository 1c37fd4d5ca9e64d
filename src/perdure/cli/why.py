"""`perdure why`."""

from __future__ import annotations

import click

from perdure.cli.fields import fields_of
from perdure.cli.options import Where, ask, common, usage
from perdure.cli.words import json_text, say
from perdure.client import Client
from perdure.info import RunInfo


@click.command()
@click.argument("run")
@common
def command(where: Where, run: str) -> None:
    """Say what a run waits for, since when, and who could move it.

    For a blocked run it is the whole report: where its code differs from its history.
    """

    async def look(client: Client) -> tuple[RunInfo, str]:
        with usage():
            handle = client.handle(run)
        return await handle.info(), await handle.why()

    info, sentence = ask(where, look)
    sentence = where.typed(sentence)
    say(json_text({**fields_of(info), "why": sentence}) if where.json else sentence)
