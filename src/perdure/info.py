"""What people and programs read of a run: `RunInfo`, `RunPage`, `Event`. Frozen records, plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec

from perdure.core import codec
from perdure.core import events as ev
from perdure.core.errors import PayloadError
from perdure.core.failure import RecordedError
from perdure.core.retry import moment
from perdure.core.status import Status
from perdure.core.turn import Row
from perdure.core.waits import Waits, read_waits


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """Everything known of a run, as it was when it was read. Times are aware, UTC.

    input: `[[positional…], {by name…}]` as plain values. result: as plain values, None until there is one.
    error: the recorded error with `.type`, `.message`, `.traceback`, `.cause`, or None. waits: what it waits for.
    """

    id: str
    generation: int
    namespace: str
    workflow: str
    status: Status
    queue: str
    attempt: int
    parent: str | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    wake_at: datetime | None
    waits: Waits
    owner: str | None
    input: Any
    result: Any
    error: RecordedError | None
    history_size: int
    tags: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPage:
    """A page of runs, newest first; `cursor` asks for the next one, None at the end."""

    items: list[RunInfo]
    cursor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One event of a history. at: when its input arrived, also for the commands behind it."""

    number: int
    kind: str
    step: str | None
    at: datetime
    attempt: int | None
    data: dict[str, Any]


def info_of(row: Row) -> RunInfo:
    """A row as people read it."""
    return RunInfo(
        id=row.id,
        generation=row.generation,
        namespace=row.namespace,
        workflow=row.workflow,
        status=Status(row.status),
        queue=row.queue,
        attempt=row.attempt,
        parent=row.parent_id,
        created_at=moment(row.created_at),
        started_at=_moment(row.started_at),
        ended_at=_moment(row.ended_at),
        wake_at=_moment(row.wake_at),
        waits=read_waits(row.waits),
        owner=row.owner,
        input=_plain(row.input),
        result=None if row.result is None else _plain(row.result),
        error=None if not row.error else msgspec.json.decode(row.error, type=RecordedError),
        history_size=row.history_events,
        tags=msgspec.json.decode(row.tags) if row.tags else {},
    )


def _moment(at: int | None) -> datetime | None:
    return None if at is None else moment(at)


def _plain(text: str) -> Any:
    try:
        return codec.decode(text, what="a stored value")
    except PayloadError:
        # Encrypted or of another language: shown as it is.
        return text


def events_of(events: list[ev.Event]) -> list[Event]:
    """A history as people read it."""
    shown: list[Event] = []
    at = 0
    for number, event in enumerate(events, start=1):
        own = getattr(event, "at", None)
        at = own if own is not None else at
        data = msgspec.to_builtins(event, enc_hook=_raw)
        data.pop("kind", None)
        data.pop("at", None)
        for name in ("due", "deadline", "retry_at"):
            if isinstance(data.get(name), int):
                data[name] = moment(data[name]).isoformat()
        shown.append(
            Event(
                number=number,
                kind=ev.kind(event),
                step=data.pop("step", None),
                at=moment(at),
                attempt=getattr(event, "attempt", None),
                data=data,
            )
        )
    return shown


def _raw(value: Any) -> Any:
    if isinstance(value, msgspec.Raw):
        return msgspec.json.decode(bytes(value))
    raise TypeError(f"{type(value).__name__} has no plain form")
