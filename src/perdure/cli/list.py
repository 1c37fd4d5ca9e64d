"""`perdure list`."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence

import click

from perdure.cli.fields import fields_of
from perdure.cli.options import Where, ask, common, usage
from perdure.cli.words import json_text, say, table, tell, when
from perdure.client import Client
from perdure.core.retry import moment
from perdure.core.status import Status
from perdure.core.why import taken_from
from perdure.info import RunInfo, RunPage


@click.command()
@click.option(
    "--status",
    "statuses",
    multiple=True,
    type=click.Choice([status.value for status in Status]),
    help="Only runs that are this.",
)
@click.option("--workflow", metavar="NAME", help="Only runs of this workflow.")
@click.option("--parent", metavar="RUN", help="Only children of this run.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="Runs in a page.")
@click.option("--cursor", metavar="CURSOR", help="The next page, as the page before said it.")
@common
def command(
    where: Where, statuses: Sequence[str], workflow: str | None, parent: str | None, limit: int, cursor: str | None
) -> None:
    """List runs, newest first. With --json one object per line, with the fields of RunInfo."""
    if len(statuses) > 1:
        raise click.UsageError("--status was given more than once. A page is of one status: ask once for each.")
    status = statuses[0] if statuses else None

    async def read(client: Client) -> tuple[RunPage, dict[str, set[str]]]:
        with usage():
            page: RunPage = await client.list_runs(
                status=status, workflow=workflow, parent=parent, limit=limit, cursor=cursor
            )
        core = client._core
        announced = await core.read(lambda: core.store.announced(core.namespace))
        return page, taken_from(announced)

    page, taken = ask(where, read)
    if where.json:
        for info in page.items:
            say(json_text(fields_of(info)))
    elif page.items:
        rows = [
            (info.id, info.workflow, str(info.status), when(info.created_at), when(info.ended_at), _note(info, taken))
            for info in page.items
        ]
        for line in table(("run", "workflow", "status", "created (UTC)", "ended (UTC)", ""), rows):
            say(line)
    else:
        tell("No runs.")
    if page.cursor is not None:
        chosen = {"status": status, "workflow": workflow, "parent": parent, "limit": None if limit == 50 else limit}
        options = "".join(f" --{name} {shlex.quote(str(value))}" for name, value in chosen.items() if value is not None)
        tell(f"There are more: perdure list{options} --cursor {page.cursor}{where.same()}")


def _note(info: RunInfo, taken: Mapping[str, Collection[str]]) -> str:
    """What a run that has not ended waits for, in a few words; `perdure why` has the sentence."""
    if info.status.ended:
        return "" if info.error is None else ": ".join(filter(None, (info.error.type, info.error.message)))[:60]
    queues = taken.get(info.workflow)
    if not queues:
        return "no worker serves it"
    if info.queue not in queues:
        return f'no worker serves it from queue "{info.queue}"'
    for wait in info.waits.waits:
        until = "" if wait.until is None else f" until {moment(wait.until):%Y-%m-%d %H:%M:%S}"
        match wait.kind:
            case "signal":
                return f'signal "{wait.name}"{until}'
            case "sleep" | "timer":
                return f"sleeps{until}"
            case "retry":
                return f'tries "{wait.step}" again, attempt {wait.attempt}'
            case "child" | "activity":
                return f"{wait.kind} {wait.run}"
            case "step":
                return f'step "{wait.step}", attempt {wait.attempt}'
    return ""
