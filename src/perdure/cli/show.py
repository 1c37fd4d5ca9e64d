"""`perdure show`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click
import msgspec

from perdure.cli.fields import fields_of, stored
from perdure.cli.options import Where, ask, common, usage
from perdure.cli.steps import Steps, traceback_of
from perdure.cli.words import after, json_text, say, table, when
from perdure.client import Client
from perdure.core import stored as stored_
from perdure.info import RunInfo


@click.command()
@click.argument("run")
@common
def command(where: Where, run: str) -> None:
    """Show one run: its times, input and result, its steps with their attempts, and what it waits for.

    With --json one object: the fields of RunInfo, `steps` and `why`.
    """

    async def read(client: Client) -> tuple[RunInfo, Steps, str]:
        with usage():
            handle = client.handle(run)
        info = await handle.info()
        core = client._core
        row = await core.row(run)
        steps = Steps()
        steps.take(stored_.decode(text) for text in await core.read(lambda: core.store.history(row.key)))
        if info.ended_at is None:
            steps.waiting(info.waits)
        else:
            steps.run_ended(info.ended_at)
        return info, steps, await handle.why()

    info, steps, why = ask(where, read)
    why = where.typed(why)
    if where.json:
        made: Any = msgspec.to_builtins([asdict(step) for step in steps.by_id.values()])
        say(json_text({**fields_of(info), "steps": made, "why": why}))
        return
    for line in [*_head(info), "", *step_lines(info, steps), *_failures(steps), *_tail(info, why)]:
        say(line)


def _head(info: RunInfo) -> Iterator[str]:
    yield f"run       {info.id}"
    yield f"workflow  {info.workflow}   queue {info.queue}" + (f"   child of {info.parent}" if info.parent else "")
    yield f"status    {info.status}" + (f"   attempt {info.attempt}" if info.attempt > 1 else "")
    times = f"created {when(info.created_at)} UTC"
    if info.started_at is not None:
        times += f"   started {after(info.created_at, info.started_at)}"
    if info.ended_at is not None:
        times += f"   ended {after(info.created_at, info.ended_at)}"
    yield f"times     {times}"
    yield f"input     {_short(json_text(stored(info.input)))}"
    if info.status == "completed":
        yield f"result    {_short(json_text(stored(info.result)))}"


def step_lines(info: RunInfo, steps: Steps) -> Iterator[str]:
    """The table of steps; times count from the run's creation."""
    if not steps.by_id:
        yield "no steps yet" if not info.status.ended else "no steps"
        return
    rows: list[tuple[str, ...]] = []
    for step in steps.by_id.values():
        at = step.ended_at if step.over else step.asked_at
        attempts = str(step.attempts) if step.attempts else ""
        detail = "" if step.failures and step.error in ("", step.failures[-1].error) else step.detail()
        rows.append((step.id, step.kind, step.state, attempts, after(info.created_at, at), detail))
        rows.extend(
            (f"  attempt {failure.attempt}", "", "failed", "", after(info.created_at, failure.at), failure.error)
            for failure in step.failures
        )
    yield from table(("step", "kind", "state", "attempts", "at", ""), rows)


def _failures(steps: Steps) -> Iterator[str]:
    """Where the last attempt of each step that has not succeeded failed."""
    for step in steps.by_id.values():
        if step.failures and step.state in ("failed", "retrying"):
            last = step.failures[-1]
            yield ""
            yield f'step "{step.id}", attempt {last.attempt}:'
            yield last.traceback
        elif step.traceback and step.state == "failed":
            yield ""
            yield f'step "{step.id}", {step.kind} {step.run}:'
            yield step.traceback


def _tail(info: RunInfo, why: str) -> Iterator[str]:
    if info.error is not None:
        yield ""
        yield traceback_of(info.error)
    elif not info.status.ended:
        yield ""
        yield why


def _short(text: str) -> str:
    return text if len(text) <= 500 else f"{text[:497]}..."
