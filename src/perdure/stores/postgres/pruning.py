"""Removes ended runs, a few milliseconds at a time."""

from __future__ import annotations

from perdure.core.turn import Key, Pruned, Retention
from perdure.stores import retention as shared
from perdure.stores.postgres.judging import Ask
from perdure.stores.retention import EVERY_END, PIECE, Chosen, Seen


def chosen(ask: Ask, retention: Retention) -> Chosen:
    """What goes next."""

    def look(after: Key, number: int) -> list[Seen]:
        return ask(
            "may_go",
            namespace=retention.namespace,
            ended_before=retention.ended_before,
            statuses=[str.__str__(status) for status in retention.statuses or EVERY_END],
            workflow=retention.workflow,
            after=after,
            number=number,
        )

    return shared.chosen(look, retention)


def remove(ask: Ask, chosen: Chosen) -> Pruned:
    """Inside a transaction."""
    if chosen.piece is not None:
        run, events, messages = chosen.piece
        if not ask("hold_ended", keys=[run]):
            return Pruned(runs=0, after=run)
        if events > PIECE // 2:
            # From the end: what is left of a history is a beginning of it.
            ask("forget_events", run=run, after=max(events - PIECE, 0))
        else:
            ask("forget_messages", run=run, number=min(messages, PIECE))
        return Pruned(runs=0, after=chosen.after)
    keys = [key for (key,) in ask("hold_ended", keys=chosen.runs)]
    ask("forget", keys=keys)
    return Pruned(runs=len(keys), after=chosen.after)
