"""How PostgreSQL finds what the statements ask for: by an index, in a new store, a young, an analysed, a large one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from perdure.stores.postgres import PostgresStore
from perdure.stores.postgres.connections import set_session
from perdure.stores.postgres.queries import Statement, statements
from tests import servers
from tests.integration.helpers import begin, fill

WHOLE = {"settle", "mail_of_owner", "newest_of_owner", "due", "close_graves", "patrol", "serving", "bury", "announced",
         "home", "server"}  # fmt: skip
"""Statements that may walk along an index of what is in flight, or along a table of incarnations."""

EVER_LONGER = {"runs_pkey", "runs_id", "runs_status", "runs_parent", "mail_id", "history_seq"}
"""Indexes that hold what has ended too: nobody walks along these."""

BY_KEY = {
    "commit_turns": "runs_pkey",
    "take": "runs_pkey",
    "lock_ending": "runs_pkey",
    "consume_mail": "mail_id",
    "judge_turns": "runs_pkey",
    "rows": "runs_pkey",
    "owned": "runs_owner",
    "history": "history_seq",
    "children": "runs_parent",
}


@pytest.fixture(scope="module", params=servers.versions())
def database(request: pytest.FixtureRequest) -> servers.Database:
    return servers.needed(request.param)


class Looked:
    """A store, and a session that is set as the store's own are."""

    def __init__(self, db: psycopg.Connection[Any], schema: str) -> None:
        self.db = db
        self.statements = statements(schema)

    def plan(self, statement: Statement) -> list[dict[str, Any]]:
        """All nodes of the plan that is made once for all parameters."""
        text = statement.text
        types = ", ".join(statement.types)
        self.db.execute("DEALLOCATE ALL")
        self.db.execute(
            f"PREPARE looked ({types}) AS {text}".encode() if types else f"PREPARE looked AS {text}".encode()
        )
        nulls = ", ".join("NULL" for _ in statement.types)
        asked = f"EXPLAIN (FORMAT JSON) EXECUTE looked{f' ({nulls})' if nulls else ''}"
        found = self.db.execute(asked.encode()).fetchone()
        assert found is not None
        plans = found[0] if isinstance(found[0], list) else json.loads(found[0])
        return list(nodes(plans[0]["Plan"]))


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for below in plan.get("Plans", ()):
        yield from nodes(below)


@pytest.fixture(scope="module", params=["new", "young", "analysed", "large"])
def looked(request: pytest.FixtureRequest, database: servers.Database) -> Iterator[Looked]:
    with servers.schema(database) as schema:
        store = PostgresStore(database.url, schema=schema)
        if request.param in ("analysed", "large"):
            fill(store)
        if request.param == "young":
            begin(store, None)
        store.close()
        with psycopg.connect(database.url, autocommit=True, prepare_threshold=None) as db:
            if request.param == "large":
                # Of one name and one owner, the worst there is for an index.
                db.execute(
                    f"INSERT INTO {schema}.runs SELECT (jsonb_populate_record(run, jsonb_build_object("
                    "'key', 1000000 + n, 'id', 'large-' || n))).* "
                    f"FROM {schema}.runs AS run, generate_series(1, 50000) AS n "
                    f"WHERE run.key = (SELECT min(key) FROM {schema}.runs)".encode()
                )
            if request.param == "young":
                # Some thousand runs have ended, and nobody has ever got mail: its table will not be analysed.
                db.execute(
                    f"INSERT INTO {schema}.runs SELECT (jsonb_populate_record(run, jsonb_build_object("
                    "'key', 1000000 + n, 'id', 'ended-' || n, 'status', 'completed', 'ended_at', 1, 'due_at', NULL"
                    "))).* "
                    f"FROM {schema}.runs AS run, generate_series(1, 2000) AS n "
                    f"WHERE run.key = (SELECT min(key) FROM {schema}.runs)".encode()
                )
                db.execute(f"ANALYZE {schema}.runs".encode())
            elif request.param != "new":
                for table in ("runs", "mail", "history", "workers", "inputs", "idempotency"):
                    db.execute(f"ANALYZE {schema}.{table}".encode())
            set_session(db, local=False)
            yield Looked(db, schema)


@pytest.mark.parametrize("name", sorted(statements("perdure").keys()))
def test_no_statement_walks_along_a_table(looked: Looked, name: str) -> None:
    walks = [node["Relation Name"] for node in looked.plan(looked.statements[name]) if node["Node Type"] == "Seq Scan"]
    assert [walk for walk in walks if walk not in ("migrations", "store", "workers", "pledges")] == []


@pytest.mark.parametrize("name", sorted(statements("perdure").keys()))
def test_no_statement_walks_along_an_index(looked: Looked, name: str) -> None:
    """An index without a condition is a table in another order."""
    walks = {
        node["Index Name"]
        for node in looked.plan(looked.statements[name])
        if node["Node Type"] in ("Index Scan", "Index Only Scan", "Bitmap Index Scan")
        and "Index Cond" not in node
        and node.get("Alias") != "worker"
    }
    assert (walks & EVER_LONGER if name in WHOLE else walks) == set()


@pytest.mark.parametrize(("name", "index"), sorted(BY_KEY.items()))
def test_the_hot_statements_take_this_way_and_no_other(looked: Looked, name: str, index: str) -> None:
    alias = {"consume_mail": "mail", "history": "history"}.get(name, "run")
    found = [node for node in looked.plan(looked.statements[name]) if node.get("Alias") == alias]
    assert {node["Index Name"] for node in found if "Index Name" in node} == {index}


def test_the_fence_walks_along_no_owner_and_joins_row_by_row(looked: Looked) -> None:
    found = looked.plan(looked.statements["commit_turns"])
    assert "runs_owner" not in {node.get("Index Name") for node in found}
    assert not {"Hash Join", "Merge Join"} & {node["Node Type"] for node in found}


def test_what_can_be_claimed_is_read_in_the_order_of_its_index(looked: Looked) -> None:
    found = looked.plan(looked.statements["claimable"])
    conditions = {node["Alias"]: node["Index Cond"] for node in found if node.get("Index Name") == "runs_due"}
    assert conditions.keys() == {"ready", "timer"}
    assert all("due_at" in condition and "kind" in condition for condition in conditions.values())


def test_this_test_sees_a_walk(looked: Looked) -> None:
    text = looked.statements["rows"].text.split(" FROM ")[-1].split(" AS run")[0]
    statement = Statement("walk", f"SELECT * FROM {text} WHERE waits = $1::text", "", ("waits",), ("text",))
    assert "Seq Scan" in {node["Node Type"] for node in looked.plan(statement)}
