"""Event <-> stored form: one JSON text per event, tagged with its kind. What we do not know, we do not guess."""

from __future__ import annotations

import msgspec

from perdure.core.errors import StoreCorrupt, StoreTooNew
from perdure.core.events import Event

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)

FORMAT = 1
"""The version of the stored form, written into `started`."""


def encode(event: Event) -> str:
    """The stored text of an event."""
    return _encoder.encode(event).decode()


def decode(text: str) -> Event:
    """The event of a stored text; `StoreTooNew` if a later version wrote it, `StoreCorrupt` if nobody did."""
    try:
        event = _decoder.decode(text)
    except msgspec.ValidationError as error:
        raise StoreTooNew(
            f"This history holds an event that this version of Perdure does not know: {text[:120]!r} ({error}). "
            "A newer version wrote it: upgrade this process."
        ) from error
    except msgspec.DecodeError as error:
        raise StoreCorrupt(
            f"This history holds an event that no version of Perdure has written: {text[:120]!r} ({error}). Its text "
            "was changed or cut off. Restore a backup, or terminate the run."
        ) from error
    if getattr(event, "format", FORMAT) != FORMAT:
        raise StoreTooNew(
            f"This history is written in format {getattr(event, 'format', None)}, this version of Perdure reads "
            f"format {FORMAT}. A newer version wrote it: upgrade this process."
        )
    return event
