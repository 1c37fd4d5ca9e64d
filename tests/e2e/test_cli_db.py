"""`perdure db status` and `perdure db upgrade`: the same words and exit codes for every kind of store."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from perdure.cli.command import run
from tests import servers


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where there is no store yet."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/runs.db"
        return
    database = servers.needed()
    with servers.schema(database) as schema:
        yield f"{database.url}{'&' if '?' in database.url else '?'}schema={schema}"


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_store_is_made_by_upgrade_and_by_nothing_else(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = asked(capsys, "db", "status", "--store", url)
    assert code in (1, 4)  # no tables, or no file
    code, out, err = asked(capsys, "db", "upgrade", "--store", url)
    assert (code, "0001_runs.sql" in out, err) == (0, True, "Applied 0001_runs.sql.\n")
    code, out, err = asked(capsys, "db", "upgrade", "--store", url)
    assert (code, err) == (0, "No migration was missing.\n")
    code, out, _ = asked(capsys, "db", "status", "--store", url, "--json")
    said = json.loads(out)
    assert (code, said["current"], [one["name"] for one in said["migrations"]]) == (0, True, ["0001_runs.sql"])
    assert said["migrations"][0]["applied_at"].endswith("+00:00")
    assert asked(capsys, "list", "--store", url)[0] == 0


def test_readers_make_no_store(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = asked(capsys, "list", "--store", url)
    assert code == 4
    assert "?migrate" not in err
    assert "&migrate" not in err
    assert asked(capsys, "db", "status", "--store", url)[0] in (1, 4)


def test_what_a_later_version_applied_is_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    database = servers.needed()
    with servers.schema(database) as schema:
        url = f"{database.url}{'&' if '?' in database.url else '?'}schema={schema}"
        assert asked(capsys, "db", "upgrade", "--store", url)[0] == 0
        with psycopg.connect(database.url, autocommit=True) as db:
            db.execute(f"INSERT INTO {schema}.migrations VALUES (99, '0099_later.sql', 'x', 99, 0)".encode())
        code, out, _ = asked(capsys, "db", "status", "--store", url)
        assert (code, "beside which this one cannot work" in out) == (1, True)
        code, _, err = asked(capsys, "list", "--store", url)
        assert (code, "Upgrade this process" in err) == (4, True)
        with psycopg.connect(database.url, autocommit=True) as db:
            db.execute(f"UPDATE {schema}.migrations SET readable_by = 1 WHERE number = 99".encode())
        code, out, _ = asked(capsys, "db", "status", "--store", url)
        assert (code, "is of a later version" in out) == (0, True)


def change(url: str, statement: str) -> None:
    """Do something to the store's tables; `perdure_` stands for what their names begin with."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as db:
            db.execute(statement)
            db.commit()
    else:
        address, _, schema = url.rpartition("schema=")
        with psycopg.connect(address[:-1], autocommit=True) as db:
            db.execute(statement.replace("perdure_", f"{schema}.").encode())


def test_a_store_that_is_not_what_its_migrations_made_is_not_called_current(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(capsys, "db", "upgrade", "--store", url)[0] == 0
    change(url, "DROP TABLE perdure_mail")
    code, out, err = asked(capsys, "db", "status", "--store", url)
    assert (code, "lost tables that its migrations made: " in err, "mail" in err) == (1, True, True)
    assert json.loads(asked(capsys, "db", "status", "--store", url, "--json")[1])["current"] is False
    assert asked(capsys, "db", "upgrade", "--store", url)[0] == 1
    change(url, "UPDATE perdure_migrations SET checksum = 'x'")
    code, out, _ = asked(capsys, "db", "status", "--store", url)
    assert (code, "0001_runs.sql" in out, "another text" in out) == (1, True, True)
    code, _, err = asked(capsys, "db", "upgrade", "--store", url)
    assert (code, "another text of migration" in err) == (4, True)


@pytest.mark.parametrize("table", ["migrations (x int)", "runs (x int)"])
def test_a_schema_of_somebody_elses_is_left_alone(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    database = servers.needed()
    with servers.schema(database) as schema:
        url = f"{database.url}{'&' if '?' in database.url else '?'}schema={schema}"
        with psycopg.connect(database.url, autocommit=True) as db:
            db.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}".encode())
            db.execute(f"CREATE TABLE {schema}.{table}".encode())
            for arguments in (["db", "upgrade"], ["start", "x"]):
                code, _, err = asked(capsys, *arguments, "--store", url)
                assert (code, "Name another one with schema=" in err) == (4, True), err
            tables = db.execute("SELECT count(*) FROM pg_tables WHERE schemaname = %s", [schema]).fetchone()
            assert tables == (1,)


NAP = """
from perdure import Context, workflow

@workflow
async def nap(ctx: Context, seconds: float) -> str:
    await ctx.step.sleep("nap", seconds)
    return await ctx.step.run("wake", lambda: "awake")
"""


def test_a_run_outlives_a_restart_of_its_server(tmp_path: Path) -> None:
    if not servers.installations():
        pytest.skip("a server that we were only given the URL of is not ours to kill")
    (tmp_path / "flows.py").write_text(NAP)
    with servers.PostgresServer() as server, (tmp_path / "log").open("w") as log:
        line = [sys.executable, "-m", "perdure", "run", "flows.py:nap", "--input", "3", "--store", server.url]
        process = subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            deadline = time.monotonic() + 60
            while "nap: sleeps" not in (tmp_path / "log").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            server.kill()
            server.start()
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    said = (tmp_path / "log").read_text()
    assert (process.returncode, out) == (0, '"awake"\n'), said
    assert "Traceback" not in said
