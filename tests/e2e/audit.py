"""INV-1 to INV-7 of a SQLite store, from what the database itself saw: triggers keep every change of a run's fence.

`watch` must be called before the first worker starts. The checkers ask the tables and the ledger of effects; they
use nothing of the engine but the text of its events.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tests.e2e.processes import Line, Site

FINAL = frozenset({"step_completed", "step_failed", "step_cancelled", "child_ended", "activity_ended"})
ENDED = frozenset({"completed", "failed", "cancelled", "terminated", "timed_out"})

TRIGGERS = """
CREATE TABLE audit_fence (
    run INTEGER, old_owner TEXT, owner TEXT, old_epoch INTEGER, epoch INTEGER, old_version INTEGER, version INTEGER,
    old_status TEXT, status TEXT
);
CREATE TABLE audit_event (run INTEGER, seq INTEGER, epoch INTEGER, version INTEGER);
CREATE TABLE audit_broken (what TEXT);
CREATE TRIGGER audit_started AFTER INSERT ON perdure_runs BEGIN
    INSERT INTO audit_fence VALUES (new.key, NULL, new.owner, 0, new.epoch, 0, new.version, '', new.status);
END;
CREATE TRIGGER audit_changed AFTER UPDATE ON perdure_runs
WHEN old.owner IS NOT new.owner OR old.epoch <> new.epoch OR old.version <> new.version OR old.status <> new.status
BEGIN
    INSERT INTO audit_fence VALUES (
        new.key, old.owner, new.owner, old.epoch, new.epoch, old.version, new.version, old.status, new.status
    );
END;
CREATE TRIGGER audit_event AFTER INSERT ON perdure_history BEGIN
    INSERT INTO audit_event SELECT new.run, new.seq, epoch, version FROM perdure_runs WHERE key = new.run;
END;
CREATE TRIGGER audit_event_changed AFTER UPDATE ON perdure_history BEGIN
    INSERT INTO audit_broken VALUES ('event ' || old.run || '/' || old.seq || ' was changed');
END;
CREATE TRIGGER audit_event_gone AFTER DELETE ON perdure_history BEGIN
    INSERT INTO audit_broken VALUES ('event ' || old.run || '/' || old.seq || ' has disappeared');
END;
CREATE TRIGGER audit_run_gone AFTER DELETE ON perdure_runs BEGIN
    INSERT INTO audit_broken VALUES ('run ' || old.id || ' has disappeared');
END;
"""


def watch(site: Site) -> None:
    """Let the database keep a record of every change from now on."""
    with site.database() as db:
        db.executescript(TRIGGERS)


class Found:
    """Everything the checks look at, read once."""

    def __init__(self, site: Site) -> None:
        with site.database() as db:
            db.row_factory = sqlite3.Row
            db.execute("BEGIN")
            self.runs: dict[int, dict[str, Any]] = {
                row["key"]: dict(row) for row in db.execute("SELECT * FROM perdure_runs")
            }
            self.history: dict[int, list[dict[str, Any]]] = defaultdict(list)
            for run, seq, event in db.execute("SELECT run, seq, event FROM perdure_history ORDER BY run, seq"):
                self.history[run].append({"seq": seq, **json.loads(event)})
            self.fences: dict[int, list[dict[str, Any]]] = defaultdict(list)
            for row in db.execute("SELECT * FROM audit_fence ORDER BY rowid"):
                self.fences[row["run"]].append(dict(row))
            self.event_epochs = {
                (run, seq): epoch for run, seq, epoch in db.execute("SELECT run, seq, epoch FROM audit_event")
            }
            self.broken = [what for (what,) in db.execute("SELECT what FROM audit_broken")]
            self.workers = {
                incarnation: pid_of(name)
                for incarnation, name in db.execute("SELECT incarnation, name FROM perdure_workers")
            }
            self.mail = [
                dict(row) for row in db.execute("SELECT run, id, kind, unread FROM perdure_mail ORDER BY position")
            ]
        self.keys = {run["id"]: key for key, run in self.runs.items()}
        self.begun = site.ledger("begin")
        self.ended = site.ledger("end")

    def executor(self, line: Line) -> int:
        """The key of the run whose claim an execution needs: the run itself, or the dispatched activity."""
        return self.keys.get(f"{line.run}/{line.step}", self.keys[line.run])

    def is_activity(self, line: Line) -> bool:
        return f"{line.run}/{line.step}" in self.keys


def check(site: Site, *, killed: Iterable[int], started: Iterable[str], signalled: Iterable[tuple[str, str]]) -> str:
    """All checks; what they looked at, for people.

    killed: processes that were killed. started, signalled: what was acknowledged: run ids, (run id, message id).
    """
    found = Found(site)
    dead = Counter(killed)
    inv_1_history_is_append_only(found)
    inv_2_one_end_and_it_is_last(found)
    inv_3_one_outcome(found)
    inv_4_nothing_recorded_runs_again(found)
    again = inv_5_executions_are_explained(found, dead)
    inv_6_epochs_grow(found)
    inv_7_what_was_acknowledged_is_there(found, started, signalled)
    return (
        f"{len(found.runs)} runs, {sum(map(len, found.history.values()))} events, {len(found.begun)} executions, "
        f"{again} of them again, {sum(map(len, found.fences.values()))} changes of a fence, {len(dead)} kills"
    )


def inv_1_history_is_append_only(found: Found) -> None:
    assert found.broken == []
    for run, events in found.history.items():
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1)), run
        assert found.runs[run]["history_events"] == len(events)


def inv_2_one_end_and_it_is_last(found: Found) -> None:
    for key, row in found.runs.items():
        ends = [event for event in found.history[key] if event["kind"] == "ended"]
        if row["kind"] == "workflow":
            assert [end["status"] for end in ends] == ([row["status"]] if row["status"] in ENDED else [])
            assert not ends or found.history[key][-1] is ends[0]
        changes = [fence["status"] for fence in found.fences[key]]
        last = next((place for place, status in enumerate(changes) if status in ENDED), None)
        assert last is None or last == len(changes) - 1, f"{row['id']} changed after its end: {changes}"


def inv_3_one_outcome(found: Found) -> None:
    for key, events in found.history.items():
        finals = Counter(event["step"] for event in events if event["kind"] in FINAL)
        assert set(finals.values()) <= {1}, (found.runs[key]["id"], finals)
        attempts = Counter(
            (event["step"], event.get("attempt", 1))
            for event in events
            if event["kind"] in ("attempt_failed", "step_completed", "step_failed")
        )
        assert set(attempts.values()) <= {1}, (found.runs[key]["id"], attempts)


def inv_4_nothing_recorded_runs_again(found: Found) -> None:
    recorded: dict[tuple[int, str], int] = {}
    for key, events in found.history.items():
        for event in events:
            if event["kind"] in FINAL:
                recorded[key, event["step"]] = found.event_epochs[key, event["seq"]]
    open_: dict[tuple[int, str, str, int], int] = {}
    for line in sorted([*found.begun, *found.ended], key=lambda line: line.at):
        place = (line.pid, line.run, line.step, line.attempt)
        open_[place] = open_.get(place, 0) + (1 if line.what == "begin" else -1)
        assert open_[place] <= 1, f"twice at once in one process: {line}"
        if line.what == "begin" and not found.is_activity(line):
            epoch = recorded.get((found.keys[line.run], line.step))
            assert epoch is None or line.epoch <= epoch, f"recorded under epoch {epoch}, and begun again: {line}"
        if line.what == "begin" and found.is_activity(line):
            ends = [fence for fence in found.fences[found.executor(line)] if fence["status"] in ENDED]
            assert all(line.epoch <= end["epoch"] for end in ends), f"ended, and begun again: {line}"


def inv_5_executions_are_explained(found: Found, dead: Mapping[int, int]) -> int:
    recorded: Counter[tuple[int, str]] = Counter()
    for key, events in found.history.items():
        for event in events:
            if event["kind"] in ("attempt_failed", "step_completed", "step_failed"):
                recorded[key, event["step"]] += 1
    kills = {
        key: sum(
            1
            for fence in fences
            if fence["owner"] is not None
            and fence["owner"] != fence["old_owner"]
            and found.workers.get(fence["owner"]) in dead
        )
        for key, fences in found.fences.items()
    }
    executions = Counter((found.executor(line), line.step) for line in found.begun)
    again = 0
    for line in {(line.run, line.step): line for line in found.begun}.values():
        key = found.executor(line)
        attempts = found.runs[key]["attempt"] if found.is_activity(line) else recorded[key, line.step]
        count = executions[key, line.step]
        again += max(count - attempts, 0)
        assert count <= attempts + kills[key], f"{line.run} {line.step}: {count} > {attempts} + {kills[key]}"
    keys = defaultdict(set)
    for line in found.begun:
        keys[line.run, line.step].add(line.key)
    assert all(len(each) == 1 for each in keys.values()), "a step had two keys"
    assert len({next(iter(each)) for each in keys.values()}) == len(keys), "two steps had one key"
    return again


def inv_6_epochs_grow(found: Found) -> None:
    for key, fences in found.fences.items():
        epoch = version = 0
        for fence in fences:
            assert fence["old_epoch"] == epoch or not fence["old_status"], (key, fence)
            assert fence["epoch"] >= epoch, (key, fence)
            assert fence["version"] in (version, version + 1), (key, fence)
            if fence["owner"] is not None and fence["owner"] != fence["old_owner"]:
                assert fence["epoch"] > epoch, f"claimed without a new epoch: {fence}"
            if fence["version"] > version:
                # A turn: by the owner of that epoch, or by whoever ends a run without its code, which raises it.
                assert fence["epoch"] == epoch or fence["epoch"] == epoch + 1, (key, fence)
            epoch, version = fence["epoch"], fence["version"]


def inv_7_what_was_acknowledged_is_there(
    found: Found, started: Iterable[str], signalled: Iterable[tuple[str, str]]
) -> None:
    missing = [run for run in started if run not in found.keys]
    assert missing == []
    taken = {
        (key, event["message"])
        for key, events in found.history.items()
        for event in events
        if event["kind"] == "signal"
    }
    unread = {(mail["run"], mail["id"]) for mail in found.mail if mail["unread"]}
    for run, message in signalled:
        place = (found.keys[run], message)
        assert (place in taken) != (place in unread), f"signal {message} of {run}"


def pid_of(name: str) -> int:
    """The process behind a worker's name: its own, also where it is one that was given to a single run."""
    return int(name.rpartition("process ")[2].rstrip(")"))
