"""What a parent is told when a child or activity could not be started, because its id belongs to another run."""

from __future__ import annotations

import json

from perdure.core.errors import RunExists, quoted
from perdure.core.turn import Send, Start


def child_refused(start: Start) -> Send:
    """The message for the parent's mailbox, as if the child had failed; the same step is the same message.

    start: one with a parent.
    """
    assert start.parent is not None
    named = "activity" if start.kind == "activity" else "child"
    step = start.parent.step
    message = (
        f"Run {quoted(start.id)} exists already, and is not this {named} of this run. An id belongs to one run, also "
        "after its end. Choose another with ctx.step.options(id=…)."
    )
    error = {"type": RunExists.__name__, "message": message}
    data = {"step": step, "run": start.id, "status": "failed", "error": error}
    return Send(
        to=start.parent.run,
        id=f"perdure:{named}:{step}",
        kind=f"{named}_ended",
        name=step,
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":")),
    )
