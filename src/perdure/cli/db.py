"""`perdure db status` and `perdure db upgrade`."""

from __future__ import annotations

import click

from perdure.cli.command import DONE, NO_SUCCESS
from perdure.cli.options import Where, common, usage
from perdure.cli.words import json_text, say, table, tell, when
from perdure.core.errors import NotAStore
from perdure.core.retry import moment
from perdure.stores.opening import open_store, schema_of
from perdure.stores.schema import Schema


@click.group()
def command() -> None:
    """Say which migrations a store has, and apply those that are missing."""


@command.command()
@common
@click.pass_context
def status(ctx: click.Context, where: Where) -> None:
    """Say which migrations have made a store's tables, and which are missing.

    Exit code 1 if some are missing, or if this version cannot work with what is there. Nothing is created or changed.
    """
    with usage():
        schema = schema_of(where.url)
    _show(where, schema)
    ctx.exit(DONE if schema.current else NO_SUCCESS)


@command.command()
@common
@click.pass_context
def upgrade(ctx: click.Context, where: Where) -> None:
    """Create a store's tables, or bring them up to date.

    Needs a role that may create tables. Workers of the version before may go on meanwhile. Twice is once."""
    with usage():
        try:
            before = {step.number for step in schema_of(where.url).steps if step.applied_at is not None}
        except NotAStore:
            before = set()  # there is nothing yet
        path, _, query = where.url.partition("?")
        kept = "&".join(part for part in query.split("&") if part and not part.startswith("migrate="))
        open_store(f"{path}?{kept}" if kept else path).close()
        schema = schema_of(where.url)
    _show(where, schema)
    if not where.json:
        applied = [step.name for step in schema.steps if step.applied_at is not None and step.number not in before]
        tell(f"Applied {', '.join(applied)}." if applied else "No migration was missing.")
    ctx.exit(DONE if schema.current else NO_SUCCESS)


def _show(where: Where, schema: Schema) -> None:
    if where.json:
        steps = [
            {
                "number": step.number,
                "name": step.name,
                "applied_at": None if step.applied_at is None else moment(step.applied_at).isoformat(),
                "known": step.known,
                "trouble": step.trouble,
            }
            for step in schema.steps
        ]
        say(json_text({"store": schema.url, "current": schema.current, "migrations": steps, "gone": schema.gone}))
        return
    if not schema.steps:
        tell(f"The store {schema.url} has no migrations.")
        return
    rows = [
        (
            step.name,
            "missing: perdure db upgrade" if step.applied_at is None else when(moment(step.applied_at)),
            step.trouble or ("" if step.known else "is of a later version"),
        )
        for step in schema.steps
    ]
    for line in table(("migration", "applied (UTC)", ""), rows):
        say(line)
    if schema.gone:
        tell(
            f"The store {schema.url} has lost tables that its migrations made: {', '.join(schema.gone)}. "
            "Nothing brings back what was in them but a backup. Restore one, or begin with a new store."
        )
