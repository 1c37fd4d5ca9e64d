"""What is said of a run that has ended without success."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from perdure.cli.fields import fields_of
from perdure.cli.options import Where
from perdure.cli.words import json_text, say
from perdure.client import RunHandle
from perdure.core.errors import PerdureError
from perdure.core.status import Status


@asynccontextmanager
async def told(where: Where, handle: RunHandle[object]) -> AsyncIterator[None]:
    """With `--json` a run that has failed is printed like any other; then its error goes its way."""
    try:
        yield
    except PerdureError:
        if where.json and ((info := await handle.info()).status.ended or info.status == Status.QUARANTINED):
            say(json_text(fields_of(info)))
        raise
