"""How SQLite finds what the statements ask for: by an index, on a new store, an analysed one and a huge one."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from perdure.stores.sqlite import SQLiteStore
from perdure.stores.sqlite.queries import SQL
from tests.integration.helpers import fill

FRAGMENTS = {"columns", "message"}

WHOLE = {"close_graves"}
"""Statements that may walk along a small table: a row per incarnation."""

TABLES = "runs inputs history mail idempotency workers served".split()


@pytest.fixture(params=["new", "analysed", "tiny", "huge"])
def db(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sqlite3.Connection]:
    store = SQLiteStore(tmp_path / "runs.db")
    if request.param != "new":
        fill(store)
    store.close()
    db = sqlite3.connect(tmp_path / "runs.db")
    if request.param != "new":
        db.execute("ANALYZE")
    if request.param in ("tiny", "huge"):
        # Analysed when there was one run, and opened again; or with a million of one name and one owner, which is the
        # worst for an index.
        rows = {"tiny": "1", "huge": "1000000"}[request.param]
        for index, stat in db.execute("SELECT idx, stat FROM sqlite_stat1 WHERE idx IS NOT NULL").fetchall():
            words = [rows] * len(stat.split())
            db.execute("UPDATE sqlite_stat1 SET stat = ? WHERE idx = ?", (" ".join(words), index))
        db.commit()
        db.close()
        if request.param == "tiny":
            SQLiteStore(tmp_path / "runs.db").close()
        db = sqlite3.connect(tmp_path / "runs.db")
    yield db
    db.close()


def plan(db: sqlite3.Connection, statement: str) -> list[str]:
    return [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}", [None] * statement.count("?"))]


@pytest.mark.parametrize("name", sorted(SQL.keys() - FRAGMENTS))
def test_no_statement_walks_along_a_table(db: sqlite3.Connection, name: str) -> None:
    statement = SQL[name]
    ours = {f"perdure_{table}" for table in TABLES}
    aliases = {alias for table, alias in re.findall(r"(perdure_\w+)(?: AS (\w+))?", statement) if alias}
    walks = [line for line in plan(db, statement) if line.startswith("SCAN ") and line.split()[1] in ours | aliases]
    # An alias may also name a list of keys or a subquery, which are as long as the caller made them.
    lists = set(re.findall(r"\) AS (\w+)", statement)) | set(re.findall(r"json_each\(\?\) AS (\w+)", statement))
    walks = [line for line in walks if line.split()[1] not in lists]
    assert not walks or name in WHOLE


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("commit_turns", "SEARCH run USING INTEGER PRIMARY KEY (rowid=?)"),
        ("consume_mail", "SEARCH mail USING INDEX perdure_mail_id (run=? AND id=?)"),
        ("insert_mail", "SEARCH run USING INTEGER PRIMARY KEY (rowid=?)"),
        ("take", "SEARCH perdure_runs USING INTEGER PRIMARY KEY (rowid=?)"),
        ("owned", "SEARCH perdure_runs USING COVERING INDEX perdure_runs_owner (owner=?)"),
        ("suspects", "SEARCH run USING INDEX perdure_runs_struck (strikes=?)"),
        ("claimable_suspect", "SEARCH run USING INDEX perdure_runs_struck (strikes=?)"),
        ("mail_of_owner", "SEARCH mail USING INDEX perdure_mail_owner (owner=?)"),
        (
            "claimable",
            "SEARCH ready USING COVERING INDEX perdure_runs_due"
            " (namespace=? AND queue=? AND workflow=? AND kind=? AND due_at=?)",
        ),
        (
            "claimable",
            "SEARCH timer USING COVERING INDEX perdure_runs_due"
            " (namespace=? AND queue=? AND workflow=? AND kind=? AND due_at>? AND due_at<?)",
        ),
        ("history", "SEARCH perdure_history USING INDEX perdure_history_seq (run=? AND seq>?)"),
        ("page", "SEARCH one USING INDEX perdure_runs_status (namespace=? AND workflow=? AND status=? AND rowid<?)"),
    ],
)
def test_the_hot_statements_take_this_way_and_no_other(db: sqlite3.Connection, name: str, by: str) -> None:
    assert by in plan(db, SQL[name])


@pytest.mark.parametrize("name", ["commit_turns", "insert_mail"])
def test_a_batch_is_one_pass_over_its_own_rows(db: sqlite3.Connection, name: str) -> None:
    """The rows of the batch are outermost: never every run of an owner for each of them."""
    lines = [line for line in plan(db, SQL[name]) if line.startswith(("SCAN (", "SEARCH run"))]
    assert [line.split()[0] for line in lines] == ["SCAN", "SEARCH"]


def test_a_store_forgets_what_was_noted_of_its_tables_and_of_no_others(tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    store = SQLiteStore(path)
    fill(store)
    store.close()
    with closing(sqlite3.connect(path)) as db:
        db.executescript("CREATE TABLE mine (a INTEGER PRIMARY KEY, b); CREATE INDEX mine_b ON mine (b)")
        db.execute("INSERT INTO mine (b) VALUES (1)")
        db.execute("ANALYZE")
        db.commit()
        tables = {table for (table,) in db.execute("SELECT DISTINCT tbl FROM sqlite_stat1")}
        assert {"mine", "perdure_runs"} <= tables
        SQLiteStore(path, create=False).close()  # Reading changes nothing.
        assert {table for (table,) in db.execute("SELECT DISTINCT tbl FROM sqlite_stat1")} == tables
        SQLiteStore(path).close()
        assert db.execute("SELECT DISTINCT tbl FROM sqlite_stat1").fetchall() == [("mine",)]


def test_a_store_that_is_held_up_opens_with_what_was_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "runs.db"
    store = SQLiteStore(path)
    fill(store)
    store.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("ANALYZE")
        db.execute("BEGIN IMMEDIATE")
        SQLiteStore(path, busy_timeout=0.05).close()
        assert "may make this store slow" in caplog.text


def test_claims_and_history_are_read_in_the_order_of_their_index(db: sqlite3.Connection) -> None:
    assert not [line for line in plan(db, SQL["history"]) if "TEMP B-TREE" in line]
    # One sort, of at most a window per queue and name; none inside, over everything that is ready.
    lines = plan(db, SQL["claimable"])
    assert [line for line in lines if "TEMP B-TREE" in line] == ["USE TEMP B-TREE FOR ORDER BY"]
    assert lines.index("USE TEMP B-TREE FOR ORDER BY") > max(
        n for n, line in enumerate(lines) if "perdure_runs_due" in line
    )


def test_this_test_sees_a_walk(db: sqlite3.Connection) -> None:
    assert plan(db, "SELECT * FROM perdure_runs AS run WHERE run.waits = ?")[0].startswith("SCAN run")
