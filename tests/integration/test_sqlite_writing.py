"""What a batch costs, and what stands in the file."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from perdure.core.errors import StoreLocked
from perdure.core.status import Status
from perdure.core.turn import Batch, Begun, Committed, Kept, ParentLink, Query, Send
from perdure.stores.sqlite import SQLiteStore, connections
from perdure.stores.sqlite.queries import SIZES, SQL
from tests.integration.sqlite_story import announced, claiming, first_turn, start, started, taking


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteStore]:
    store = SQLiteStore(path)
    announced(store)
    yield store
    store.close()


@pytest.mark.parametrize("number", [1, 2, 5, 100, 256])
def test_a_batch_is_few_executions_however_large(store: SQLiteStore, number: int) -> None:
    """Each execution gives up the GIL: beside a busy loop, each may cost 5 ms."""
    executed: list[str] = []
    store._opened_writer().set_trace_callback(lambda text: executed.append(text.split()[0]))
    verdicts = store.write(Batch(starts=[start(f"run {n}", owner="w") for n in range(number)]))
    assert executed == ["BEGIN", "INSERT", "SELECT", "INSERT", "COMMIT"]
    executed.clear()
    runs = [begun.run for begun in verdicts if isinstance(begun, Begun)]
    committed = store.write(
        Batch(
            starts=[start(f"another {n}", owner="w") for n in range(number)],
            sends=[Send(to=run, id="m", kind="signal", limit=10) for run in runs],
            turns=[first_turn(run) for run in runs],
        )
    )
    assert [type(one) for one in committed] == [Begun] * number + [Kept] * number + [Committed] * number
    events = ["INSERT"] * (2 if number == 256 else 1)  # 512 events are two executions
    assert executed == ["BEGIN", "INSERT", "SELECT", "UPDATE", *events, "INSERT", "UPDATE", "COMMIT"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="a connection's limits can be set since Python 3.11")
def test_what_one_text_cannot_hold_is_read_row_by_row(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # SQLite holds a thousand million bytes in one text; as many as 10,000 messages of 2 MB do not fit.
    connect = connections.connect

    def limited(*args: Any, **kwargs: Any) -> Any:
        db = connect(*args, **kwargs)
        db.setlimit(0, 20_000)  # SQLITE_LIMIT_LENGTH
        return db

    monkeypatch.setattr(connections, "connect", limited)
    large = "x" * 9_000
    with closing(SQLiteStore(path)) as store:
        announced(store)
        parent = started(store, "parent")
        for number in range(4):
            link = ParentLink(run=parent, step=f"s{number}")
            store.write(Batch(starts=[start(f"child {number}", parent=link, input=f'[["{large}"],{{}}]')]))
            store.write(Batch(sends=[Send(to=parent, id=str(number), kind="signal", data=f'"{large}"', limit=10)]))
        heads = claiming(store)
        assert {len(head.mail) for head in heads} == {0, 4}
        assert [mail.id for mail in store.mailbox(parent)] == ["0", "1", "2", "3"]
        assert [mail.id for mail in store.mail("w")] == ["0", "1", "2", "3"]
        children = store.children(parent)
        assert [row.id for row in children] == [f"child {number}" for number in range(4)]
        assert [row.id for row in store.rows([row.key for row in children])] == [row.id for row in children]
        assert len(store.list(Query(namespace="default", limit=10))) == 5
        assert len(store.list(Query(namespace="default", parent=parent, limit=10))) == 4
        [head] = [head for head in heads if head.row.key == parent]
        turn = replace(first_turn(parent), epoch=head.row.epoch, events=[f'"{large}"'] * 4)
        assert store.write(Batch(turns=[turn])) == [Committed(run=parent)]
        assert len(store.history(parent)) == 5


def test_write_at_once_waits_for_nobody(path: Path) -> None:
    patient = SQLiteStore(path, busy_timeout=3600)
    announced(patient)
    with closing(sqlite3.connect(path)) as another:
        another.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreLocked):
            patient.write_at_once(Batch(starts=[start("a")]))
        another.execute("ROLLBACK")
    [begun] = patient.write_at_once(Batch(starts=[start("a")]))
    assert isinstance(begun, Begun)
    # It waits again for others, as it always did.
    assert patient._opened_writer().execute("PRAGMA busy_timeout").fetchone() == (3_600_000,)
    patient.close()


@pytest.mark.parametrize(("by", "heard"), [(None, True), ("w", False), ("another", True)])
def test_nobody_is_woken_for_mail_that_its_writer_looks_for(store: SQLiteStore, by: str | None, heard: bool) -> None:
    run = started(store, "a", owner="w")
    store.wait("w", ["default"], 0)
    store.write(Batch(sends=[Send(to=run, id="m", kind="signal")], by=by))
    assert store.wait("w", ["default"], 0) is heard


@pytest.mark.parametrize("number", [*SIZES, *(size + 1 for size in SIZES), 600])
def test_every_size_of_batch_is_written_whole(store: SQLiteStore, number: int) -> None:
    verdicts = store.write(Batch(starts=[start(f"run {n}", event=f'{{"n":{n}}}', owner="w") for n in range(number)]))
    runs = [begun.run for begun in verdicts if isinstance(begun, Begun)]
    assert len(runs) == number
    store.write(Batch(turns=[first_turn(run, events=[f'{{"of":{run}}}'] * 2) for run in runs]))
    sends = [Send(to=run, id="m", kind="signal", data=str(run)) for run in runs]
    assert store.write(Batch(sends=sends)) == [Kept(run=run) for run in runs]
    for n, run in enumerate(runs):
        assert store.history(run) == [f'{{"n":{n}}}', f'{{"of":{run}}}', f'{{"of":{run}}}']
        assert [message.data for message in store.mailbox(run)] == [str(run)]
    assert {row.id: row.key for row in store.rows(runs)} == {f"run {n}": run for n, run in enumerate(runs)}


def test_a_long_history_is_read_whole_from_any_place(store: SQLiteStore) -> None:
    run = started(store, "a", owner="w")
    events = [f'{{"n":{n},"text":"line\\nline — \\u001e"}}' for n in range(1000)]
    taking(store, run, events=events)
    assert store.history(run)[1:] == events
    for after in (1, 255, 256, 257, 999, 1001, 5000):
        assert store.history(run, after) == ['{"kind":"started"}', *events][after:]


def test_a_turn_of_a_run_with_a_large_input_does_not_write_the_input_again(store: SQLiteStore, path: Path) -> None:
    text = '"' + "ä" * 1_000_000 + '"'
    run = started(store, "a", input=text, owner="w")
    log = Path(f"{path}-wal")
    db = store._opened_writer()
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    taking(store, run)
    assert log.stat().st_size < 100_000
    [row] = store.rows([run])
    assert row.input == text
    assert row.history_bytes == len('{"kind":"started"}{"kind":"step_completed"}')


@pytest.mark.parametrize("length", [999, 1000, 1001])
def test_inputs_around_the_edge_come_back(store: SQLiteStore, length: int) -> None:
    started(store, "a", input="x" * length)
    row = store.run("default", "a")
    assert row is not None
    assert row.input == "x" * length
    [head] = claiming(store)
    assert head.row.input == "x" * length


def test_the_most_urgent_are_found_behind_a_long_line(store: SQLiteStore) -> None:
    store.write(Batch(starts=[start(f"run {n}", priority=1 if n % 1000 == 999 else 0) for n in range(3000)]))
    heads = claiming(store, limit=5)
    assert [head.row.id for head in heads] == ["run 999", "run 1999", "run 2999", "run 0", "run 1"]


def test_the_words_of_statuses_cannot_be_mistaken_for_each_other() -> None:
    """The fenced update looks a status up in a text of several."""
    words = [status.value for status in Status]
    assert not [(one, other) for one in words for other in words if one != other and one in other]


def test_durability_is_what_was_asked_for(path: Path) -> None:
    for durability, level, name in (("full", 2, "D3"), ("normal", 1, "D2")):
        store = SQLiteStore(path, durability=durability)
        assert store.durability == name
        assert store._opened_writer().execute("PRAGMA synchronous").fetchone() == (level,)
        store.close()
    with pytest.raises(ValueError, match="neither"):
        SQLiteStore(path, durability="most")


def test_the_url_opens_the_same_store(path: Path) -> None:
    from perdure.stores.opening import open_store

    with_blank = path.with_name("my orders?.db")
    store = SQLiteStore(with_blank)
    started(store, "a")
    again = open_store(store.url)
    assert again.run("default", "a") is not None
    again.close()
    store.close()


def test_all_columns_are_text_integer_or_blob_in_tables_of_ours(store: SQLiteStore, path: Path) -> None:
    db = sqlite3.connect(path)
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    assert all(name.startswith(("perdure_", "sqlite_sequence")) for name in tables)
    columns = [row for name in tables if name != "sqlite_sequence" for row in db.execute(f"PRAGMA table_info({name})")]
    assert {kind for _, _, kind, *_ in columns} <= {"TEXT", "INTEGER", "BLOB"}
    db.close()


def test_every_statement_says_what_it_is_for() -> None:
    from importlib import resources

    for file in resources.files("perdure.stores.sqlite").iterdir():
        if file.name.endswith(".sql") and not file.name[0].isdigit():
            parts = re.split(r"^-- name: (\w+)\n", file.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
            for name, body in zip(parts[::2], parts[1::2], strict=True):
                assert re.match(r"-- \S.*\.", body.replace("\n-- ", " ")), name
                assert SQL[name]


def test_what_a_killed_process_had_acknowledged_is_there(path: Path) -> None:
    code = (
        "import os, sys\nfrom perdure.stores.sqlite import SQLiteStore\n"
        "from tests.integration.sqlite_story import started\n"
        "store = SQLiteStore(sys.argv[1])\nprint(started(store, 'a'), flush=True)\nos._exit(9)"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={"PYTHONPATH": ":".join([*sys.path, root])},
        capture_output=True,
        text=True,
        check=False,
    )
    store = SQLiteStore(path, create=False)
    row = store.run("default", "a")
    assert row is not None
    assert str(row.key) == done.stdout.strip()
    store.close()
