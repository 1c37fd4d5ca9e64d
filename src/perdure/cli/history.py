"""`perdure history`."""

from __future__ import annotations

import click
import msgspec

from perdure.cli.fields import plain
from perdure.cli.options import Where, ask, common, usage
from perdure.cli.words import after, json_text, say, table
from perdure.client import Client
from perdure.info import Event


@click.command()
@click.argument("run")
@common
def command(where: Where, run: str) -> None:
    """Print the events of a run, oldest first. With --json one event per line, complete."""

    async def read(client: Client) -> list[Event]:
        with usage():
            handle = client.handle(run)
        return await handle.history()

    events = ask(where, read)
    if where.json:
        for event in events:
            say(json_text(msgspec.to_builtins(event, enc_hook=plain)))
        return
    if not events:
        return
    say(f"began {events[0].at:%Y-%m-%d %H:%M:%S} UTC")
    rows = [
        (
            str(event.number),
            after(events[0].at, event.at),
            event.kind,
            event.step or "",
            "" if event.attempt is None else str(event.attempt),
            _shown(event),
        )
        for event in events
    ]
    for line in table(("#", "at", "event", "step", "attempt", "data"), rows):
        say(line)


# What explains the event, in this order; the rest is for --json.
_TELLING = (
    "value",
    "error",
    "name",
    "run",
    "due",
    "deadline",
    "retry_at",
    "status",
    "reason",
    "change",
    "what",
    "unread",
)


def _shown(event: Event) -> str:
    parts = []
    for name in _TELLING:
        value = event.data.get(name)
        if value is None or value in ("", [], ()):
            continue
        if name == "error":
            value = f"{value['type']}: {value.get('message', '')}"
        text = value if isinstance(value, str) and name != "value" else json_text(value)
        parts.append(f"{name}={text if len(text) <= 100 else text[:97] + '...'}")
    return " ".join(parts)
