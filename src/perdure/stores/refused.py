"""What is said of a start or message that is not written: to a caller, to a parent whose child's id is taken."""

from __future__ import annotations

import json

from perdure.core.errors import RunExists, StoreError, quoted
from perdure.core.turn import Send, Start


def item_refused(url: str, why: object) -> StoreError:
    """For the one who wrote a batch with something in it that cannot be stored."""
    error = StoreError(f"A start or message cannot be stored in {url}. {why}. Nothing was written.", store=url)
    error.of_one_item = True
    return error


def taken(start: Start) -> str:
    """Why this start by a parent began no run."""
    named = "activity" if start.kind == "activity" else "child"
    if start.idempotency_key is None:
        return (
            f"Run {quoted(start.id)} exists already, and is not this {named} of this run. An id belongs to one run, "
            "also after its end. Choose another with ctx.step.options(id=…)."
        )
    return (
        f"The idempotency key {quoted(start.idempotency_key)} or the id {quoted(start.id)} was used before, and not by "
        f"this {named} of this run. Each belongs to one run. Choose others with "
        "ctx.step.options(idempotency_key=…, id=…)."
    )


def child_refused(start: Start) -> Send:
    """The message for the parent's mailbox, as if the child had failed; the same step is the same message.

    start: one with a parent.
    """
    assert start.parent is not None
    named = "activity" if start.kind == "activity" else "child"
    step = start.parent.step
    error = {"type": RunExists.__name__, "message": taken(start)}
    data = {"step": step, "run": start.id, "status": "failed", "error": error}
    return Send(
        to=start.parent.run,
        id=f"perdure:{named}:{step}",
        kind=f"{named}_ended",
        name=step,
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":")),
    )
