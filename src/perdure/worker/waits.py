"""What a run in memory waits for, as the column `waits` of its row says it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perdure.core.match import Op
from perdure.core.waits import SHOWN, Wait, Waits, waits_text

if TYPE_CHECKING:
    from perdure.worker.residents import Resident


def waits_of(resident: Resident, status: str) -> str:
    """The column for a run in memory."""
    line = resident.play.line
    waits: list[Wait] = []
    for op in line.pending.values():
        if len(waits) == SHOWN:
            break
        waits.append(_wait(resident, op))
    if not waits:
        timer = line.next_timer()
        if timer is not None:
            waits.append(Wait(kind="timer", since=line.now, until=timer))
        elif status == "waiting":
            waits.append(Wait(kind="nothing", since=line.now))
    return waits_text(
        Waits(
            waits=waits,
            more=max(len(line.pending) - SHOWN, 0),
            # Asked to cancel and still here: its code has swallowed the request, or is cleaning up.
            cancel=line.cancel_reason if line.cancel_requested else None,
            changed="".join(f'"{step}" ({site})' for step, site in line.digests_differ),
        )
    )


def _wait(resident: Resident, op: Op) -> Wait:
    facts: dict[str, Any] = {"step": op.id, "since": op.at, "site": op.site}
    if op.kind == "sleep":
        return Wait(kind="sleep", until=op.due, **facts)
    if op.kind == "signal_wait":
        return Wait(kind="signal", name=op.name or "", until=op.due, **facts)
    if op.kind in ("child", "activity"):
        return Wait(kind=op.kind, name=op.name or "", run=op.run, **facts)
    retry_at = resident.retrying.get(op.id)
    limit = op.spec.policy.retry.max_attempts if op.spec is not None else None
    last = op.last_error
    error = f"{last.type}: {last.message[:200]}" if last is not None else ""
    if retry_at is not None:
        return Wait(kind="retry", until=retry_at, attempt=op.attempt, attempts=limit, error=error, **facts)
    execution = resident.executions.get(op.id)
    if execution is not None and execution.began:
        facts["since"] = execution.began
    return Wait(kind="step", name=op.name or "", attempt=op.attempt, attempts=limit, error=error, **facts)
