"""`perdure prune`."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from typing import Any, Final

import click
from msgspec.structs import replace

from perdure.cli.options import Where, ask, common
from perdure.cli.words import json_text, say, tell
from perdure.client import Client
from perdure.core.errors import StoreUnavailable
from perdure.core.retry import length, micros
from perdure.core.status import ENDED, Status
from perdure.core.turn import Retention
from perdure.stores.contract import Store

UNITS: Final = {"s": "seconds", "min": "minutes", "h": "hours", "d": "days", "w": "weeks"}
BATCH: Final = 50
REST: Final = 0.75
"""Part of the time that is left to others: a batch that took 2 ms is followed by a pause of 6 ms."""
TRIES: Final = 3
"""Of one batch, if the store cannot be reached meanwhile: after 1, 2 and 3 seconds."""
PROGRESS: Final = 2.0
"""Seconds between two lines that say how far it is."""


class Age(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """An age such as `30d`, `12h`, `90min`, `2w`; a plain number is none: what is removed is gone."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, timedelta):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h|d|w)\s*", value)
        if match is None:
            self.fail(f"{value!r} is no age. Write a number and s, min, h, d or w: 30d, 12h.", param, ctx)
        try:
            return timedelta(**{UNITS[match[2]]: float(match[1])})
        except OverflowError:
            self.fail(f"{value!r} is longer than time goes back. Write a smaller number.", param, ctx)


@click.command()
@click.option("--older-than", type=Age(), required=True, metavar="AGE", help="Runs that ended so long ago: 30d, 12h.")
@click.option(
    "--status",
    "statuses",
    type=click.Choice([status.value for status in Status if status in ENDED]),
    multiple=True,
    help="Only runs that ended so; repeatable. [default: all]",
)
@click.option("--workflow", metavar="NAME", help="Only runs of this workflow.")
@click.option("--limit", type=click.IntRange(1), help="At most so many runs. [default: all]")
@click.option("--dry-run", is_flag=True, help="Only count them.")
@common
def command(
    where: Where,
    older_than: timedelta,
    statuses: tuple[str, ...],
    workflow: str | None,
    limit: int | None,
    dry_run: bool,
) -> None:
    """Remove ended runs with everything that is kept of them.

    Never a live run, nor what a live one may still ask about: a child stays while the parent it ends with lives, a
    parent while one of its children does. It works in small batches, so that nobody has to wait for it, and can be
    interrupted and repeated at any time.
    """

    async def act(client: Client) -> int:
        core = client._core
        await core.open()
        asked = Retention(
            namespace=core.namespace,
            ended_before=core.store.now() - micros(older_than),
            statuses=statuses,
            workflow=workflow,
            limit=BATCH,
            dry_run=dry_run,
        )
        return await core.read(lambda: pruned(core.store, asked, limit, done))

    done: list[int] = []
    try:
        count = ask(where, act)
    except BaseException:
        # Also when it is interrupted: what is gone is gone.
        if done and not dry_run:
            tell(f"{_runs(sum(done))} removed until then. Repeat the command to go on.")
        raise
    if where.json:
        say(json_text({"runs": count, "dry_run": dry_run}))
    else:
        tell(f"{_runs(count)} would be removed." if dry_run else f"{_runs(count)} removed.")


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count:,} runs"


def pruned(store: Store, asked: Retention, limit: int | None, done: list[int]) -> int:
    """Batch after batch, to the end or the limit; how many runs. done: is given the number of each batch."""
    count = tries = 0
    began = said = time.monotonic()
    after = asked.after
    while limit is None or count < limit:
        at = time.monotonic()
        number = asked.limit if limit is None else min(asked.limit, limit - count)
        try:
            answer = store.prune(replace(asked, limit=number, after=after))
        except StoreUnavailable:
            # What it removed before its connection was lost is not found again.
            tries += 1
            if tries > TRIES:
                raise
            time.sleep(tries)
            continue
        tries = 0
        count += answer.runs
        done.append(answer.runs)
        if answer.after is None:
            break
        after = answer.after
        now = time.monotonic()
        if now - said > PROGRESS:
            said = now
            tell(f"{count:,} runs so far, in {length(timedelta(seconds=now - began))} ...")
        if not asked.dry_run:
            time.sleep((now - at) * REST / (1 - REST))
    return count
