"""The audit of `make chaos`, for a site: what its database saw of every change, beside the ledger of effects."""

from __future__ import annotations

from collections.abc import Iterable

from chaos import facts as facts_
from chaos.audit import Promised, executions_again, violations
from chaos.sqlite import TRIGGERS, SQLiteBase
from tests.e2e.processes import Site


def watch(site: Site) -> None:
    """Let the database keep a record of every change from now on: before the first worker starts."""
    with site.database() as db:
        db.executescript(TRIGGERS)


def check(site: Site, *, killed: Iterable[int], started: Iterable[str], signalled: Iterable[tuple[str, str]]) -> str:
    """All checks; what they looked at, for people.

    killed: processes that were killed or stopped; if there are none, no execution may have been repeated.
    started, signalled: what was acknowledged: run ids, (run id, message id).
    """
    facts = SQLiteBase(site.folder).facts()
    facts.begun, facts.ended = facts_.ledger(site.ledger_path, "begin"), facts_.ledger(site.ledger_path, "end")
    harmed = {str(pid) for pid in killed}
    promised = Promised(started=list(started), signalled=list(signalled), harmed=harmed)
    assert violations(facts, promised) == []
    again = executions_again(facts)
    assert harmed or not again
    return (
        f"{len(facts.runs)} runs, {sum(map(len, facts.history.values()))} events, {len(facts.begun)} executions, "
        f"{again} of them again, {sum(map(len, facts.fences.values()))} changes of a fence, {len(harmed)} kills"
    )
