"""What a parent is told when a child could not be started, because its id belongs to another run."""

from __future__ import annotations

import json

from perdure.core.errors import RunExists
from perdure.core.turn import ParentLink, Send


def child_refused(link: ParentLink, id: str) -> Send:
    """The `child_ended` for the parent's mailbox: one per step, so that asking again adds nothing."""
    error = {"type": "RunExists", "message": str(RunExists(id))}
    data = {"step": link.step, "run": id, "status": "failed", "error": error}
    return Send(
        to=link.run,
        id=f"perdure:child:{link.step}",
        kind="child_ended",
        data=json.dumps(data, ensure_ascii=False, separators=(",", ":")),
    )
