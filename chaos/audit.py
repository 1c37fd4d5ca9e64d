"""The invariants of a store after a scenario, each a checker with its id. They use nothing of the engine.

A checker yields a sentence per violation; `violations` puts its id in front. What is checked of which run comes from
the facts (`facts.py`) and from what clients were acknowledged (`Promised`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from chaos.facts import Facts, Line

FINAL: Final = frozenset({"step_completed", "step_failed", "step_cancelled", "child_ended", "activity_ended"})
TRIED: Final = frozenset({"attempt_failed", "step_completed", "step_failed"})
EXECUTED: Final = TRIED | {"step_cancelled"}
ENDED: Final = frozenset({"completed", "failed", "cancelled", "terminated", "timed_out"})
TRANSACTION: Final = "pay"
"""How the transaction steps of `flows.py` begin."""
MOST_ATTEMPTS: Final = 4
"""No step of `flows.py` may be tried more often."""


@dataclass(kw_only=True)
class Promised:
    """What was acknowledged to clients, and what a scenario says of its runs."""

    started: list[str] = field(default_factory=list)
    signalled: list[tuple[str, str]] = field(default_factory=list)
    """(run id, message id)"""
    results: dict[str, str] = field(default_factory=dict)
    """run id -> the stored result it must have"""
    deadly: set[str] = field(default_factory=set)
    """Runs that kill their workers: they end as quarantined, or not well."""
    harmed: set[str] = field(default_factory=set)
    """Processes that the scenario killed or stopped: nobody can tell that from what a run may do to them."""
    clock_is_right: bool = True
    """Whether the clock with which the ledger was written is that of the store, and never went back."""
    open: set[str] = field(default_factory=set)
    """Runs that still wait when the scenario ends."""


Checker = Callable[[Facts, Promised], Iterator[str]]


def violations(facts: Facts, promised: Promised) -> list[str]:
    """Everything that is broken, as "INV-n: sentence"; of one kind at most ten."""
    found = []
    for id, check in CHECKERS.items():
        broken = list(check(facts, promised))
        found += [f"{id}: {each}" for each in broken[:10]]
        if len(broken) > 10:
            found.append(f"{id}: … and {len(broken) - 10} more")
    return found


def executions_again(facts: Facts) -> int:
    """How often a step was executed more than its recorded attempts: once per interruption, at most."""
    return sum(max(0, count - attempts) for _, count, attempts in _executions(facts))


def _history(facts: Facts, promised: Promised) -> Iterator[str]:
    """INV-1: append-only and gap-free."""
    yield from facts.broken
    for key, events in facts.history.items():
        if [event["seq"] for event in events] != list(range(1, len(events) + 1)):
            yield f"the history of {_id(facts, key)} has gaps"
    for key, row in facts.runs.items():
        if row["history_events"] != len(facts.history.get(key, ())):
            yield f"{row['id']} says {row['history_events']} events and has {len(facts.history.get(key, ()))}"


def _ends(facts: Facts, promised: Promised) -> Iterator[str]:
    """INV-2: one terminal event, and it is last; the row says the same; nothing changes afterwards."""
    for key, row in facts.runs.items():
        events = facts.history.get(key, [])
        ends = [event["status"] for event in events if event["kind"] == "ended"]
        said = [row["status"]] if row["status"] in ENDED else []
        if row["kind"] == "workflow" and ends != said:
            yield f"{row['id']} is {row['status']}, its history has the ends {ends}"
        if ends and events[-1]["kind"] != "ended":
            yield f"{row['id']} has events behind its end"
        statuses = [fence.status for fence in facts.fences.get(key, ())]
        last = next((place for place, status in enumerate(statuses) if status in ENDED), None)
        if last is not None and last != len(statuses) - 1:
            yield f"{row['id']} changed after its end: {statuses}"


def _outcomes(facts: Facts, promised: Promised) -> Iterator[str]:
    """INV-3: one final outcome per step, one outcome per attempt."""
    for key, events in facts.history.items():
        finals = Counter(event["step"] for event in events if event["kind"] in FINAL)
        attempts = Counter((event["step"], event.get("attempt", 1)) for event in events if event["kind"] in TRIED)
        for step in (step for step, number in finals.items() if number > 1):
            yield f"{_id(facts, key)} has {finals[step]} outcomes of step {step}"
        for step, attempt in (which for which, number in attempts.items() if number > 1):
            yield f"{_id(facts, key)} has {attempts[step, attempt]} outcomes of attempt {attempt} of step {step}"


def _beginnings(facts: Facts, promised: Promised) -> Iterator[str]:
    """INV-4: no step begins under a claim made after its outcome was recorded, nor twice at once under one claim."""
    recorded = {
        (key, event["step"]): facts.epochs[key, event["seq"]]
        for key, events in facts.history.items()
        for event in events
        if event["kind"] in FINAL
    }
    active: Counter[tuple[int, str, str, int]] = Counter()
    for line in sorted([*facts.begun, *facts.ended], key=lambda line: line.at):
        place = (line.pid, line.run, line.step, line.epoch)
        active[place] += 1 if line.what == "begin" else -1
        if active[place] > 1:
            yield f"step {line.step} of {line.run} was executed twice at once in process {line.pid}"
        if line.what != "begin":
            continue
        key = facts.executor(line)
        if facts.is_activity(line):
            epoch = max((f.epoch for f in facts.fences.get(key, ()) if f.status in ENDED), default=None)
        else:
            epoch = recorded.get((key, line.step))
        if epoch is not None and line.epoch > epoch:
            yield f"step {line.step} of {line.run} ended under epoch {epoch} and began again under {line.epoch}"


def _explained(facts: Facts, promised: Promised) -> Iterator[str]:
    """INV-5: executions <= recorded attempts + interruptions of the holders; one key per step."""
    # A transaction that was rolled back has never been: its function may run as often as it takes (INV-15 counts rows).
    interrupted = {key: sum(fence.interrupts for fence in fences) for key, fences in facts.fences.items()}
    for line, count, attempts in _executions(facts):
        allowed = attempts + interrupted.get(facts.executor(line), 0)
        if count > allowed:
            yield f"step {line.step} of {line.run} was executed {count} times, {allowed} can be explained"
    keys = defaultdict(set)
    for line in facts.begun:
        keys[line.key].add((line.run, line.step))
    of_step = Counter(step for steps in keys.values() for step in steps)
    yield from (f"{len(steps)} steps share the key {key}" for key, steps in keys.items() if len(steps) > 1)
    yield from (f"step {step} of {run} had {n} keys" for (run, step), n in of_step.items() if n > 1)


def _fences(facts: Facts, promised: Promised) -> Iterator[str]:
    """INV-6: epochs grow; a commit takes effect only under the greatest epoch and the expected version."""
    for key, fences in facts.fences.items():
        epoch = version = 0
        for fence in fences:
            who = _id(facts, key)
            if fence.old_status and fence.old_epoch != epoch:
                yield f"the epoch of {who} changed unseen from {epoch} to {fence.old_epoch}"
            if fence.epoch < epoch:
                yield f"the epoch of {who} went back from {epoch} to {fence.epoch}"
            if fence.version not in (version, version + 1):
                yield f"the version of {who} went from {version} to {fence.version}"
            if fence.owner is not None and fence.owner != fence.old_owner and fence.epoch <= epoch:
                yield f"{who} was claimed without a new epoch"
            if fence.version > version and fence.epoch not in (epoch, epoch + 1):
                yield f"a commit of {who} took effect under epoch {fence.epoch} after {epoch}"
            epoch, version = fence.epoch, fence.version


def _acknowledged(facts: Facts, promised: Promised) -> Iterator[str]:
    """INV-7: everything acknowledged is there."""
    yield from (
        f"the start of {run} was acknowledged, it is not there" for run in promised.started if run not in facts.keys
    )
    taken = {
        (key, event["message"]): event["seq"]
        for key, events in facts.history.items()
        for event in events
        if event["kind"] == "signal"
    }
    kept = {(mail["run"], mail["id"]) for mail in facts.mail}
    for run, message in promised.signalled:
        place = (facts.keys.get(run, -1), message)
        if place not in taken and place not in kept:
            yield f"signal {message} to {run} was acknowledged, it is not there"
    for run, result in promised.results.items():
        row = facts.runs[facts.keys[run]] if run in facts.keys else {}
        if row.get("status") == "quarantined" and _only_hit(facts, promised, row["key"]):
            continue
        if row.get("status") != "completed" or row.get("result") != result:
            said = row.get("result") or row.get("error")
            yield f"{run} is {row.get('status')} with {said}, not completed with {result}"


def _mail(facts: Facts, promised: Promised) -> Iterator[str]:
    """INV-10: each message was consumed once, or waits, or is listed unread by the end."""
    for key, events in facts.history.items():
        messages = Counter(event["message"] for event in events if event["kind"] == "signal")
        yield from (f"{_id(facts, key)} consumed {m} {n} times" for m, n in messages.items() if n > 1)
    for mail in facts.mail:
        events = facts.history.get(mail["run"], [])
        consumed = any(event.get("message") == mail["id"] and event["kind"] != "signal_taken" for event in events)
        if mail["unread"] and consumed:
            yield f"{mail['id']} was consumed by {_id(facts, mail['run'])} and is unread"
        status = facts.runs.get(mail["run"], {}).get("status")
        listed = events[-1].get("unread", ()) if events else ()
        if mail["unread"] and status in ENDED and events and mail["id"] not in listed:
            yield f"{_id(facts, mail['run'])} ended; {mail['id']} is neither consumed nor listed"


def _timers(facts: Facts, promised: Promised) -> Iterator[str]:
    """INV-11: nothing behind a sleep begins or is recorded before its time, by the store's clock."""
    due = {
        (key, f"after-{event['step']}"): event["due"]
        for key, events in facts.history.items()
        for event in events
        if event["kind"] == "sleep"
    }
    for key, events in facts.history.items():
        for event in events:
            time = due.get((key, str(event.get("step"))))
            if time is not None and "at" in event and event["at"] < time:
                yield f"{_id(facts, key)} went on {time - event['at']} us before its timer"
    for line in facts.begun if promised.clock_is_right else ():
        time = due.get((facts.keys[line.run], line.step))
        if time is not None and line.at < time:
            yield f"step {line.step} of {line.run} began {time - line.at} us before its timer"


def _rows(facts: Facts, promised: Promised) -> Iterator[str]:
    """INV-15: a transaction step wrote one row if its outcome is recorded, else none."""
    recorded = {
        (_id(facts, key), event["step"])
        for key, events in facts.history.items()
        for event in events
        if event["kind"] == "step_completed" and event["step"].startswith(TRANSACTION)
    }
    for run, step in recorded | set(facts.rows):
        expected = 1 if (run, step) in recorded else 0
        if facts.rows[run, step] != expected:
            yield f"transaction {step} of {run} wrote {facts.rows[run, step]} rows, not {expected}"


def _attempts(facts: Facts, promised: Promised) -> Iterator[str]:
    """INV-16: attempts <= the policy's maximum; interruptions are none."""
    for line in facts.begun:
        if line.attempt > MOST_ATTEMPTS:
            yield f"step {line.step} of {line.run} began attempt {line.attempt} of at most {MOST_ATTEMPTS}"


def _quarantined(facts: Facts, promised: Promised) -> Iterator[str]:
    """INV-20: who kills its worker again and again is put aside, nobody else is."""
    for key, row in facts.runs.items():
        innocent = row["id"] not in promised.deadly and not _only_hit(facts, promised, key)
        if row["status"] == "quarantined" and innocent:
            yield f"{row['id']} is quarantined and killed nobody"
        if row["id"] in promised.deadly and row["status"] not in ("quarantined", "failed"):
            yield f"{row['id']} is deadly and {row['status']}"


def _all_end(facts: Facts, promised: Promised) -> Iterator[str]:
    """INV-23: once faults stop, every run ends."""
    for row in facts.runs.values():
        if row["ended_at"] is None and row["status"] != "quarantined" and row["id"] not in promised.open:
            yield f"{row['id']} ({row['workflow']}) is still {row['status']}"


def _at_rest(facts: Facts, promised: Promised) -> Iterator[str]:
    """INV-25: no orphan rows, no owner that is dead, none of a run that has ended."""
    yield from facts.orphans
    for row in facts.runs.values():
        if row["owner"] is not None and (row["ended_at"] is not None or facts.workers.get(row["owner"], ("", True))[1]):
            yield f"{row['id']} is {row['status']} and owned by {row['owner'][:8]}, who is dead or has no right to it"


CHECKERS: Final[dict[str, Checker]] = {
    "INV-1": _history,
    "INV-2": _ends,
    "INV-3": _outcomes,
    "INV-4": _beginnings,
    "INV-5": _explained,
    "INV-6": _fences,
    "INV-7": _acknowledged,
    "INV-10": _mail,
    "INV-11": _timers,
    "INV-15": _rows,
    "INV-16": _attempts,
    "INV-20": _quarantined,
    "INV-23": _all_end,
    "INV-25": _at_rest,
}


def _only_hit(facts: Facts, promised: Promised, key: int) -> bool:
    """Whether all strikes of a run come from processes that the scenario harmed, however unlikely that is."""
    owners = [fence.old_owner for fence in facts.fences.get(key, ()) if fence.strikes_it]
    return all(facts.workers[owner][0].split()[0] in promised.harmed for owner in owners if owner is not None) and bool(
        owners
    )


def _id(facts: Facts, key: int) -> str:
    return str(facts.runs[key]["id"]) if key in facts.runs else f"the run {key}, which is gone,"


def _executions(facts: Facts) -> Iterator[tuple[Line, int, int]]:
    """Each step that was executed: a line of it, how often, and how many attempts are recorded."""
    recorded = Counter(
        (key, event["step"]) for key, events in facts.history.items() for event in events if event["kind"] in EXECUTED
    )
    counts = Counter((line.run, line.step) for line in facts.begun)
    for line in {(line.run, line.step): line for line in facts.begun}.values():
        if line.step.startswith(TRANSACTION):
            continue
        key = facts.executor(line)
        attempts = facts.runs[key]["attempt"] if facts.is_activity(line) else recorded[key, line.step]
        yield line, counts[line.run, line.step], attempts
