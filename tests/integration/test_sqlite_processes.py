"""Several processes on one SQLite file: who died is known at once, who came first writes first."""

from __future__ import annotations

import fcntl
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure.core.turn import Batch, Fenced, Reaped
from perdure.stores.opening import open_store
from perdure.stores.sqlite import SQLiteStore
from perdure.stores.sqlite.gate import TURN, Gate
from perdure.testing.conformance import Clock
from tests.integration.sqlite_story import (
    announced,
    another_process,
    claiming,
    closed,
    first_turn,
    line_of,
    start,
    started,
    taking,
)

WORKER = """
store = SQLiteStore(sys.argv[1], hints=len(sys.argv) < 3)
announced(store, "other")
heads = claiming(store, "other")
print(len(heads), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteStore]:
    store = SQLiteStore(path)
    announced(store)
    yield store
    store.close()


def test_the_runs_of_a_killed_process_are_handed_back_at_once(store: SQLiteStore, path: Path) -> None:
    started(store, "a")
    other = another_process(WORKER, path)
    assert line_of(other) == "1"
    assert store.reap() == Reaped()
    assert store.worker("other") == "other"
    closed(other)
    assert store.worker("other") is None
    assert store.reap() == Reaped(workers=1, runs=1)
    [head] = claiming(store)
    assert (head.row.epoch, head.row.strikes) == (2 + 1, 1)
    assert taking(store, head.row.key, owner="other", epoch=1) == Fenced(run=head.row.key)


def test_a_stopped_process_keeps_its_runs_until_its_lease_has_run_out(path: Path) -> None:
    clock = Clock(10**15)
    store = SQLiteStore(path, clock=clock)
    started(store, "a")
    other = another_process(WORKER, path)
    assert line_of(other) == "1"
    other.send_signal(signal.SIGSTOP)
    assert store.reap() == Reaped()
    clock.advance(days=100_000)
    assert store.reap() == Reaped(workers=1, runs=1)
    closed(other)
    store.close()


def test_without_hints_only_the_lease_tells(path: Path) -> None:
    store = SQLiteStore(path, hints=False)
    started(store, "a")
    other = another_process(WORKER, path)
    assert line_of(other) == "1"
    closed(other)
    assert store.reap() == Reaped()
    store.close()


def test_a_worker_that_gives_no_hint_is_not_taken_for_dead(store: SQLiteStore, path: Path) -> None:
    started(store, "a")
    other = another_process(WORKER, path, "no hints")
    assert line_of(other) == "1"
    assert store.reap() == Reaped()
    closed(other)
    assert store.reap() == Reaped()  # nothing tells, but the lease


def test_closing_one_store_does_not_kill_the_incarnations_of_another(store: SQLiteStore, path: Path) -> None:
    second = SQLiteStore(path)
    announced(second, "second")
    second.retire("second")
    second.close()
    other = another_process("print(SQLiteStore(sys.argv[1]).reap().workers)", path)
    assert line_of(other) == "0"
    closed(other)


def test_closing_the_last_store_does_not_either(store: SQLiteStore, path: Path) -> None:
    store.close()
    other = another_process("print(SQLiteStore(sys.argv[1]).reap().workers)", path)
    assert line_of(other) == "0"
    closed(other)
    again = SQLiteStore(path)
    assert again.heartbeat("w") is not None
    again.retire("w")
    again.close()


def test_a_file_that_took_the_number_of_another_has_its_own_gate(store: SQLiteStore, path: Path) -> None:
    store.close()  # its incarnation lives on
    moved = path.with_name("moved.db")
    path.rename(moved)
    second = SQLiteStore(moved)
    started(second, "a")
    second.close()
    assert Path(f"{moved}-gate").exists()


def test_a_forked_child_can_tell_that_its_parent_has_died(store: SQLiteStore, path: Path) -> None:
    code = """
store = SQLiteStore(sys.argv[1])
announced(store, "other")
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.01)
    print(store.reap().workers, flush=True)
    os._exit(0)
print("here", flush=True)
sys.stdin.read()
"""
    other = another_process(code, path)
    assert line_of(other) == "here"
    other.kill()
    assert line_of(other) == "1"
    closed(other)


def test_who_leaves_the_gate_does_not_come_in_again_before_who_waits(path: Path) -> None:
    code = """
from perdure.stores.sqlite.gate import Gate
gate = Gate(sys.argv[1])
print("here", flush=True)
assert gate.enter(time.monotonic() + 20)
open(sys.argv[1] + ".been", "w").close()
gate.leave()
"""
    gate = Gate(f"{path}-gate")
    assert gate.enter(time.monotonic() + 5)
    other = another_process(code, gate.path)
    assert line_of(other) == "here"
    while _is_free(gate, TURN):
        time.sleep(0.01)
    gate.leave()
    assert gate.enter(time.monotonic() + 20)
    assert Path(f"{gate.path}.been").exists()
    gate.leave()
    gate.close()
    closed(other)


def _is_free(gate: Gate, byte: int) -> bool:
    assert gate._file is not None
    try:
        fcntl.lockf(gate._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError:
        return False
    fcntl.lockf(gate._file, fcntl.LOCK_UN, 1, byte)
    return True


def test_a_child_of_a_killed_process_does_not_keep_it_alive(store: SQLiteStore, path: Path) -> None:
    code = """
store = SQLiteStore(sys.argv[1])
announced(store, "other")
pid = os.fork()
if pid == 0:
    store.run("default", "a")
    sys.stdin.read()
    os._exit(0)
print(pid, flush=True)
sys.stdin.read()
"""
    other = another_process(code, path)
    child = int(line_of(other))
    assert store.reap() == Reaped()
    other.kill()
    other.wait()
    assert store.reap().workers == 1
    os.kill(child, signal.SIGKILL)
    closed(other)


def test_the_file_of_beats_may_be_removed_without_anybody_owning_a_run_twice(store: SQLiteStore, path: Path) -> None:
    run = started(store, "a", owner="w")
    Path(f"{path}-workers").unlink()
    other = another_process(
        "store = SQLiteStore(sys.argv[1]); announced(store, 'other'); print(store.reap().runs, flush=True)"
        "; print(len(claiming(store, 'other')), flush=True); sys.stdin.read()",
        path,
    )
    assert [line_of(other), line_of(other)] == ["1", "1"]
    assert taking(store, run) == Fenced(run=run)
    assert store.heartbeat("w") is None
    announced(store, "new life")
    closed(other)
    third = another_process("print(SQLiteStore(sys.argv[1]).reap().workers)", path)
    assert line_of(third) == "1"  # the killed one, and not the new life
    closed(third)
    assert store.heartbeat("new life") is not None


def test_many_processes_make_the_same_store_at_once(path: Path) -> None:
    code = "store = SQLiteStore(sys.argv[1]); started(store, sys.argv[2]); print('done', flush=True); store.close()"
    others = [another_process(code, path, n) for n in range(6)]
    assert [line_of(other) for other in others] == ["done"] * 6
    for other in others:
        closed(other)
    store = SQLiteStore(path)
    assert store.counts("default") == {"ready": 6}
    store.close()


def test_at_full_load_every_process_gets_its_turn(path: Path) -> None:
    """The slowest commits at least a third as much as the fastest, and no commit waits over a second."""
    code = """
store = SQLiteStore(sys.argv[1])
print("here", flush=True)
sys.stdin.readline()
until = time.monotonic() + 1.5
done, worst = 0, 0.0
while (before := time.monotonic()) < until:
    started(store, f"{sys.argv[2]} {done}")
    done += 1
    worst = max(worst, time.monotonic() - before)
print(done, worst, flush=True)
store.close()
"""
    SQLiteStore(path).close()
    others = [another_process(code, path, n) for n in range(4)]
    assert [line_of(other) for other in others] == ["here"] * 4
    for other in others:
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
    told = [line_of(other).split() for other in others]
    for other in others:
        closed(other)
    counts = [int(done) for done, _ in told]
    print(counts, [worst for _, worst in told])
    assert min(counts) * 3 >= max(counts)
    assert max(float(worst) for _, worst in told) < 1
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    db.close()


def test_a_process_killed_while_it_writes_leaves_whole_batches(store: SQLiteStore, path: Path) -> None:
    code = """
store = SQLiteStore(sys.argv[1])
n = 0
while True:
    verdicts = store.write(Batch(starts=[start(f"{n} {m}", owner="w") for m in range(10)]))
    store.write(Batch(turns=[first_turn(one.run) for one in verdicts]))
    n += 1
    print(n, flush=True)
"""
    for _ in range(3):
        other = another_process(code, path)
        while line_of(other) != "20":
            pass
        closed(other)
        with_a_turn = store.counts("default")["running"]
        assert with_a_turn % 10 == 0
        db = sqlite3.connect(path)
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        gaps = (
            "SELECT count(*) FROM perdure_runs"
            " WHERE history_events <> (SELECT count(*) FROM perdure_history WHERE run = key)"
        )
        assert db.execute(gaps).fetchone() == (0,)
        db.close()
        db = sqlite3.connect(path)
        db.execute("DELETE FROM perdure_runs")
        db.execute("DELETE FROM perdure_history")
        db.commit()
        db.close()


def test_keys_are_never_used_again(store: SQLiteStore, path: Path) -> None:
    keys = [started(store, id) for id in "abc"]
    db = sqlite3.connect(path)
    db.execute("DELETE FROM perdure_runs")
    db.execute("DELETE FROM perdure_history")
    db.commit()
    db.close()
    assert started(store, "d") > max(keys)
    assert store.write(Batch(turns=[first_turn(keys[-1])])) == [Fenced(run=keys[-1])]
    assert store.write(Batch(starts=[start("e")]))


def test_a_store_says_how_another_process_opens_it(tmp_path: Path) -> None:
    odd = tmp_path / "a b%20c?.db"
    store = SQLiteStore(odd, busy_timeout=0.5, durability="normal", hints=False)
    url = store.elsewhere()
    assert url is not None
    other = open_store(url)
    assert isinstance(other, SQLiteStore)
    assert (other._path, other.durability, other._busy_timeout, other._hints) == (str(odd), "D2", 0.5, False)
    assert other.elsewhere() == url
    other.close()
    store.close()
    clocked = SQLiteStore(tmp_path / "b.db", clock=lambda: 1)
    assert clocked.elsewhere() is None
    clocked.close()
