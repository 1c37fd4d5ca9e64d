"""A SQLite store under a scenario: its triggers, and its facts."""

from __future__ import annotations

import json
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from chaos.facts import Facts, Fence
from perdure import SQLiteStore

TRIGGERS: Final = """
CREATE TABLE chaos_fence (
    run INTEGER, old_owner TEXT, owner TEXT, old_epoch INTEGER, epoch INTEGER, old_version INTEGER, version INTEGER,
    old_status TEXT, status TEXT, old_progress INTEGER, progress INTEGER, old_strikes INTEGER, strikes INTEGER
);
CREATE TABLE chaos_event (run INTEGER, seq INTEGER, epoch INTEGER);
CREATE TABLE chaos_broken (what TEXT);
CREATE TABLE chaos_rows (run TEXT, step TEXT);
CREATE TRIGGER chaos_started AFTER INSERT ON perdure_runs BEGIN
    INSERT INTO chaos_fence VALUES (
        new.key, NULL, new.owner, 0, new.epoch, 0, new.version, '', new.status, 0, new.history_events + new.attempt,
        0, new.strikes
    );
END;
CREATE TRIGGER chaos_changed AFTER UPDATE ON perdure_runs
WHEN old.owner IS NOT new.owner OR old.epoch <> new.epoch OR old.version <> new.version OR old.status <> new.status
BEGIN
    INSERT INTO chaos_fence VALUES (
        new.key, old.owner, new.owner, old.epoch, new.epoch, old.version, new.version, old.status, new.status,
        old.history_events + old.attempt, new.history_events + new.attempt, old.strikes, new.strikes
    );
END;
CREATE TRIGGER chaos_event AFTER INSERT ON perdure_history BEGIN
    INSERT INTO chaos_event SELECT new.run, new.seq, epoch FROM perdure_runs WHERE key = new.run;
END;
CREATE TRIGGER chaos_event_changed AFTER UPDATE ON perdure_history BEGIN
    INSERT INTO chaos_broken VALUES ('event ' || old.run || '/' || old.seq || ' was changed');
END;
CREATE TRIGGER chaos_event_gone AFTER DELETE ON perdure_history BEGIN
    INSERT INTO chaos_broken VALUES ('event ' || old.run || '/' || old.seq || ' has disappeared');
END;
CREATE TRIGGER chaos_run_gone AFTER DELETE ON perdure_runs BEGIN
    INSERT INTO chaos_broken VALUES ('run ' || old.id || ' has disappeared');
END;
"""
ORPHANS: Final = (
    ("perdure_history", "run"),
    ("perdure_mail", "run"),
    ("perdure_inputs", "run"),
    ("perdure_idempotency", "run"),
)


class SQLiteBase:
    """One file, watched from the beginning."""

    kind = "sqlite"
    names: Mapping[str, str] = {"runs": "perdure_runs", "workers": "perdure_workers", "rows": "chaos_rows"}

    def __init__(self, folder: Path) -> None:
        self.path = folder / "runs.db"
        self.url = f"sqlite:///{self.path}"

    def prepare(self) -> None:
        """Make the tables, and let the database keep a record of every change from now on."""
        SQLiteStore(self.path).close()
        with self.connection() as db:
            db.executescript(TRIGGERS)

    def fresh(self, number: int) -> str:
        """The URL of a store that is not there yet."""
        return f"sqlite:///{self.path.with_name(f'fresh-{number}.db')}"

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """A connection of our own, as another program of the user's has one."""
        db = sqlite3.connect(self.path, timeout=30, isolation_level=None)
        try:
            yield db
        finally:
            db.close()

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        """Rows; `{runs}` in the query is the name of that table."""
        with self.connection() as db:
            return db.execute(query.format(**self.names)).fetchall()

    def now(self) -> int:
        """The store's clock."""
        return time.time_ns() // 1000

    def facts(self) -> Facts:
        """Everything, as of one moment."""
        with self.connection() as db:
            db.row_factory = sqlite3.Row
            db.execute("BEGIN")
            history: dict[int, list[dict[str, Any]]] = defaultdict(list)
            for run, seq, event in db.execute("SELECT run, seq, event FROM perdure_history ORDER BY run, seq"):
                history[run].append({"seq": seq, **json.loads(event)})
            fences: dict[int, list[Fence]] = defaultdict(list)
            for row in db.execute("SELECT * FROM chaos_fence ORDER BY rowid"):
                fences[row["run"]].append(Fence(**dict(row)))
            facts = Facts(
                runs={row["key"]: dict(row) for row in db.execute("SELECT * FROM perdure_runs")},
                history=history,
                fences=fences,
                epochs={(row[0], row[1]): row[2] for row in db.execute("SELECT run, seq, epoch FROM chaos_event")},
                broken=[what for (what,) in db.execute("SELECT what FROM chaos_broken")],
                workers={
                    incarnation: (name, dead > 0)
                    for incarnation, name, dead in db.execute("SELECT incarnation, name, dead FROM perdure_workers")
                },
                mail=[dict(row) for row in db.execute("SELECT run, id, kind, unread FROM perdure_mail")],
                orphans=[
                    f"{number} rows of {table} belong to no run"
                    for table, column in ORPHANS
                    for (number,) in db.execute(
                        f"SELECT count(*) FROM {table} WHERE {column} NOT IN (SELECT key FROM perdure_runs)"
                    )
                    if number
                ],
            )
            facts.rows.update((row[0], row[1]) for row in db.execute("SELECT run, step FROM chaos_rows"))
            return facts
