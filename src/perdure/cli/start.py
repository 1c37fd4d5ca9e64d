"""`perdure start`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from perdure.cli.fields import fields_of
from perdure.cli.inputs import given, inputs
from perdure.cli.options import Seconds, Where, ask, common, usage
from perdure.cli.words import json_text, say
from perdure.client import Client
from perdure.info import RunInfo

_SECONDS = Seconds(min=0)


@click.command()
@click.argument("workflow")
@inputs
@click.option(
    "--id", "run_id", metavar="ID", help="The run's id. The same id again is the same run. [default: a new one]"
)
@click.option("--idempotency-key", metavar="KEY", help="One run per key and workflow, for 7 days.")
@click.option(
    "--if-exists",
    type=click.Choice(["use", "fail"]),
    default="use",
    show_default=True,
    help="If there is a run with this id: use it, or fail.",
)
@click.option("--queue", metavar="NAME", help="Instead of the workflow's own.")
@click.option("--delay", type=_SECONDS, metavar="SECONDS", help="Start that much later.")
@click.option("--timeout", type=Seconds(min=0, min_open=True), metavar="SECONDS", help="The longest the run may take.")
@common
def command(
    where: Where,
    workflow: str,
    input: Sequence[str],
    arg: Sequence[str],
    run_id: str | None,
    idempotency_key: str | None,
    if_exists: str,
    queue: str | None,
    delay: float | None,
    timeout: float | None,
) -> None:
    """Start a run of WORKFLOW, a name that some worker has announced, and print its id.

    When this returns, the run is kept; a worker executes it.
    """
    args, kwargs = given(input, arg).values()

    async def begin(client: Client) -> RunInfo:
        with usage():
            starting = client.options(
                id=run_id,
                idempotency_key=idempotency_key,
                if_exists=if_exists,
                queue=queue,
                delay=delay,
                timeout=timeout,
            )
            handle = await starting.start(workflow, *args, **kwargs)
        info: RunInfo = await handle.info()
        return info

    info = ask(where, begin, create=True)
    say(json_text(fields_of(info)) if where.json else info.id)
