"""A SQLite file that is locked, read-only, full, newer, damaged, gone or none at all: one clear error, nothing lost."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from perdure.core.errors import (
    NotAStore,
    StoreCorrupt,
    StoreError,
    StoreFull,
    StoreLocked,
    StoreReadOnly,
    StoreTooNew,
    StoreUnavailable,
)
from perdure.core.turn import Batch, Begun, Committed, Fenced, Kept, Send, Unstorable
from perdure.stores.postgres import PostgresStore
from perdure.stores.sqlite import SQLiteStore, connections, errors, gate, writing
from tests.integration.sqlite_story import announced, claiming, first_turn, start, started, taking


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteStore]:
    store = SQLiteStore(path, busy_timeout=0.2)
    announced(store)
    yield store
    store.close()


@contextmanager
def nobody() -> Iterator[None]:
    """Inside, this process has no more rights than anybody."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


# --- what is there already


def test_only_a_table_or_a_column_can_have_been_lost() -> None:
    said = errors.translate(sqlite3.OperationalError("no such function: json_each"), "sqlite:///x.db")
    assert type(said) is StoreError


def test_a_step_that_takes_the_gate_before_a_writer_that_has_asked_is_waited_for(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def patience(self: Any) -> float:
        asked.append(self)
        return 0.0 if len(asked) == 1 else 30.0

    monkeypatch.setattr(type(store._steps), "patience", property(patience))
    gate = store._place.gate
    assert gate.enter(time.monotonic())
    threading.Timer(0.5, gate.leave).start()
    assert [type(verdict) for verdict in store.write(Batch(starts=[start("late")]))] == [Begun]


def test_a_table_that_is_gone_is_named(store: SQLiteStore, path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("DROP TABLE perdure_mail")
    with pytest.raises(NotAStore, match=r"no such table: perdure_mail.*perdure db status"):
        store.write(Batch(sends=[Send(to=1, id="m", kind="signal", name="go", data="[]")]))


def test_a_missing_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(NotAStore, match="no folder"):
        SQLiteStore(tmp_path / "missing" / "runs.db")


def test_reading_does_not_create_a_store(path: Path) -> None:
    with pytest.raises(NotAStore, match="does not exist"):
        SQLiteStore(path, create=False)
    assert not path.exists()


def test_reading_does_not_add_tables_to_somebody_elses_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE customers (name TEXT)")
    db.close()
    with pytest.raises(NotAStore, match="without the tables"):
        SQLiteStore(path, create=False)
    db = sqlite3.connect(path)
    assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("customers",)]
    db.close()


def test_a_users_own_database_may_be_the_store(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE customers (name TEXT)")
    db.execute("INSERT INTO customers VALUES ('Ada')")
    db.commit()
    store = SQLiteStore(path)
    started(store, "a")
    store.close()
    assert db.execute("SELECT name FROM customers").fetchall() == [("Ada",)]
    names = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert all(name == "customers" or name.startswith(("perdure_", "sqlite_")) for name in names)
    db.close()


@pytest.mark.parametrize("text", [b"What a lovely day for a walk.\n" * 400, os.urandom(8192)])
def test_a_file_that_is_no_database_is_refused_and_stays_as_it_is(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    with pytest.raises(NotAStore, match="no SQLite database"):
        SQLiteStore(path)
    assert path.read_bytes() == text


@pytest.mark.parametrize("given", ["", ":memory:"])
def test_what_is_no_file_is_refused(given: str) -> None:
    with pytest.raises(NotAStore, match="no file"):
        SQLiteStore(given)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotAStore, match="no file"):
        SQLiteStore(tmp_path)


def test_a_newer_schema_stops_before_anything_is_read(store: SQLiteStore, path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("INSERT INTO perdure_migrations VALUES (9999, '9999_from_the_future.sql', 'x', 0)")
    db.close()
    with pytest.raises(StoreTooNew, match="9999_from_the_future"):
        SQLiteStore(path)


def test_an_applied_migration_that_was_edited_stops(store: SQLiteStore, path: Path) -> None:
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE perdure_migrations SET checksum = 'another'")
    db.close()
    with pytest.raises(StoreCorrupt, match="0001_runs"):
        SQLiteStore(path)


def test_a_migration_that_was_killed_half_way_is_done_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from perdure.stores.sqlite import migrations

    whole = migrations._statements

    def half(text: str) -> Iterator[str]:
        for number, statement in enumerate(whole(text)):
            if number == 7:
                raise KeyboardInterrupt
            yield statement

    monkeypatch.setattr(migrations, "_statements", half)
    with pytest.raises(KeyboardInterrupt):
        SQLiteStore(path)
    monkeypatch.undo()
    store = SQLiteStore(path)
    started(store, "a")
    store.close()


def test_an_old_sqlite_and_a_platform_without_locks_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections.sqlite3, "sqlite_version_info", (3, 34, 9))  # type: ignore[attr-defined]
    with pytest.raises(NotAStore, match=r"needs 3\.35\.0"):
        SQLiteStore(path)
    monkeypatch.undo()
    monkeypatch.setattr(gate, "fcntl", None)
    with pytest.raises(NotAStore, match="fcntl"):
        SQLiteStore(path)


# --- what goes wrong later


def test_a_locked_file_is_waited_for_and_then_named(store: SQLiteStore, path: Path) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    before = time.monotonic()
    with pytest.raises(StoreLocked) as caught:
        started(store, "a")
    assert 0.15 < time.monotonic() - before < 4
    assert caught.value.retryable
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    assert store.heartbeat("w") is not None  # no write lock keeps a worker from living
    assert store.run("default", "a") is None
    assert claiming(store) == []  # finding nothing needs no lock
    other.execute("ROLLBACK")
    started(store, "a")
    other.close()


def test_who_waits_behind_a_waiter_does_not_wait_twice_as_long(store: SQLiteStore, path: Path) -> None:
    second = SQLiteStore(path, busy_timeout=0.2)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    before = time.monotonic()
    outcomes: list[type[BaseException] | None] = []

    def write(store: SQLiteStore) -> None:
        try:
            started(store, "a")
            outcomes.append(None)
        except StoreLocked as error:
            outcomes.append(type(error))

    threads = [threading.Thread(target=write, args=(one,)) for one in (store, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [StoreLocked, StoreLocked]
    assert time.monotonic() - before < 1
    other.execute("ROLLBACK")
    other.close()
    second.close()


def test_a_store_that_may_not_be_written_says_so() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "runs.db"
        store = SQLiteStore(path)
        started(store, "a")
        store.close()
        os.chmod(path, 0o444)
        os.chmod(folder, 0o555)
        with nobody(), pytest.raises(StoreReadOnly, match="cannot be written"):
            SQLiteStore(path)
        os.chmod(folder, 0o755)


def test_a_folder_that_may_not_be_written_says_so() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        with nobody(), pytest.raises(StoreReadOnly, match="cannot be written"):
            SQLiteStore(Path(folder) / "runs.db")
        os.chmod(folder, 0o755)


def test_a_file_without_room_refuses_the_batch_and_goes_on_when_there_is_some(store: SQLiteStore) -> None:
    run = started(store, "a", owner="w")
    db = store._opened_writer()
    pages = db.execute("PRAGMA page_count").fetchone()[0]
    db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreFull):
        store.write(Batch(starts=[start("b", input='"' + "x" * 100_000 + '"')], turns=[first_turn(run)]))
    assert store.run("default", "b") is None
    assert len(store.history(run)) == 1
    db.execute("PRAGMA max_page_count = 1000000")
    assert taking(store, run) == Committed(run=run)


def test_a_damaged_file_is_named_and_never_read_as_if_it_were_well(path: Path) -> None:
    store = SQLiteStore(path)
    store.write(Batch(starts=[start(f"run {n}") for n in range(200)]))
    store.close()
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    with pytest.raises(StoreCorrupt):  # noqa: PT012  # at which of the two is SQLite's
        broken = SQLiteStore(path)
        try:
            broken.run("default", "run 1")
        finally:
            broken.close()


def test_a_file_that_was_moved_is_not_written_any_more(store: SQLiteStore, path: Path) -> None:
    started(store, "a")
    path.rename(path.with_name("elsewhere.db"))
    with pytest.raises(StoreUnavailable, match="not where it was"):
        started(store, "b")
    path.with_name("elsewhere.db").rename(path)
    started(store, "b")


def test_a_closed_store_says_that_it_is_closed(store: SQLiteStore) -> None:
    store.close()
    store.close()
    for call in (lambda: started(store, "a"), lambda: store.run("default", "a"), lambda: store.heartbeat("w")):
        with pytest.raises(StoreError, match="closed"):
            call()


# --- what a failed write leaves


def test_an_exception_inside_a_write_leaves_nothing_and_the_store_usable(
    store: SQLiteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(store, "a", owner="w")

    def fail(*_: object) -> Any:
        raise MemoryError

    monkeypatch.setattr(writing.Writing, "_send", fail)
    batch = Batch(starts=[start("b")], turns=[first_turn(run)], sends=[Send(to=run, id="m", kind="signal", data="1")])
    with pytest.raises(MemoryError):
        store.write(batch)
    monkeypatch.undo()
    assert store.run("default", "b") is None
    assert len(store.history(run)) == 1
    [begun, kept, committed] = store.write(batch)
    assert isinstance(begun, Begun)
    assert (kept, committed) == (Kept(run=run), Committed(run=run))


class Flaky:
    """A connection whose next COMMIT answers with an error of the disk, before or after it has worked."""

    def __init__(self, db: sqlite3.Connection, *, worked: bool) -> None:
        self.db = db
        self.worked = worked

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        if statement == "COMMIT":
            if self.worked:
                self.db.execute(statement)
            raise sqlite3.OperationalError("disk I/O error")
        return self.db.execute(statement, parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.db, name)


@pytest.mark.parametrize("worked", [True, False])
def test_after_a_commit_of_unknown_outcome_asking_again_gives_the_first_answer(
    store: SQLiteStore, worked: bool
) -> None:
    run = started(store, "a", owner="w")
    batch = Batch(starts=[start("b", owner="w")], turns=[first_turn(run)], sends=[Send(to=run, id="m", kind="signal")])
    store._writer = Flaky(store._opened_writer(), worked=worked)  # type: ignore[assignment]
    with pytest.raises(StoreError):
        store.write(batch)
    real: Any = store._writer
    store._writer = real.db
    [begun, _, committed] = store.write(batch)
    assert isinstance(begun, Begun)
    assert committed == Committed(run=run)
    assert len(store.history(run)) == 2
    assert len(store.history(begun.run)) == 1
    assert len(store.mailbox(run)) == 1


@pytest.mark.parametrize(
    "unfit", [{"result": "\ud800"}, {"waits": "\ud800"}, {"events": ["\ud800"]}, {"wake_at": 2**63}, {"attempt": 2**70}]
)
def test_a_turn_that_cannot_be_stored_harms_only_itself(store: SQLiteStore, unfit: dict[str, Any]) -> None:
    good, bad, late = (started(store, id, owner="w") for id in "abc")
    turns = [first_turn(good), first_turn(bad, **unfit), first_turn(late, owner="another")]
    verdicts = store.write(Batch(turns=turns))
    assert [type(verdict) for verdict in verdicts] == [Committed, Unstorable, Fenced]
    assert [len(store.history(run)) for run in (good, bad, late)] == [2, 1, 1]
    assert taking(store, bad) == Committed(run=bad)


# --- threads and forks


def test_many_threads_write_and_read_at_once(path: Path) -> None:
    store = SQLiteStore(path, busy_timeout=60)
    failures: list[BaseException] = []

    def work(name: str) -> None:
        try:
            for n in range(30):
                started(store, f"{name} {n}")
                assert store.run("default", f"{name} {n}") is not None
                store.counts("default")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert store.counts("default") == {"ready": 120}
    store.close()


def in_a_fork(work: Callable[[], None]) -> int:
    """How a forked child that does `work` ends: 0 if it does not raise."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_parent_and_child_go_on_with_the_same_store(store: SQLiteStore, path: Path) -> None:
    started(store, "before")
    store.run("default", "before")

    def child() -> None:
        started(store, "in the child")
        assert store.run("default", "before") is not None

    assert in_a_fork(child) == 0
    started(store, "in the parent")
    assert store.counts("default") == {"ready": 3}
    assert store.heartbeat("w") is not None
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()


def test_no_connection_is_carried_over_a_fork(store: SQLiteStore) -> None:
    writer = store._opened_writer()
    store.run("default", "a")
    [reader] = store._idle
    assert in_a_fork(lambda: None) == 0
    for connection in (writer, reader):
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            connection.execute("SELECT 1")


def test_an_incarnation_stays_the_parents(store: SQLiteStore) -> None:
    def child() -> None:
        assert store.reap().workers == 0  # the parent lives, and a child can tell

    assert in_a_fork(child) == 0
    assert store.heartbeat("w") is not None


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"path": 5}, TypeError),
        ({"path": b"runs.db"}, TypeError),
        ({"path": "a\0b"}, NotAStore),
        ({"path": "\udc80"}, NotAStore),
        ({"busy_timeout": "x"}, TypeError),
        ({"busy_timeout": -1}, ValueError),
        ({"busy_timeout": float("nan")}, ValueError),
        ({"create": "no"}, TypeError),
        ({"hints": 1}, TypeError),
    ],
)
def test_what_no_store_can_be_made_of_is_refused(tmp_path: Path, given: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        SQLiteStore(**{"path": tmp_path / "runs.db", **given})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"url": 5}, TypeError),
        ({"schema": 5}, TypeError),
        ({"schema": "\udc80"}, NotAStore),
        ({"schema": "information_schema"}, NotAStore),
        ({"direct": 5}, TypeError),
        ({"password": 5}, TypeError),
        ({"hints": "x"}, TypeError),
    ],
)
def test_what_no_store_on_postgresql_can_be_made_of_is_refused(given: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        PostgresStore(**{"url": "postgresql://nobody@127.0.0.1:1/none", **given})
