"""Waiting costs almost nothing and ends when there is something to do."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perdure.core.turn import Batch, Send, Start
from perdure.stores.sqlite import SQLiteStore
from tests.integration.sqlite_story import (
    announced,
    another_process,
    claiming,
    closed,
    first_turn,
    line_of,
    start,
    started,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteStore]:
    store = SQLiteStore(path)
    announced(store)
    yield store
    store.close()


LONG = 10.0
"""Seconds that a wait takes if nothing ends it: one that is ended takes less, however busy the machine is."""


def waited(store: SQLiteStore, timeout: float = LONG) -> tuple[bool, float]:
    before = time.monotonic()
    return store.wait("w", ["default"], timeout), time.monotonic() - before


def soon(work: Callable[[], object], delay: float = 0.1) -> threading.Timer:
    timer = threading.Timer(delay, work)
    timer.start()
    return timer


def test_nothing_to_do_is_waited_for_as_long_as_was_said(store: SQLiteStore) -> None:
    store.wait("w", ["default"], 0)
    heard, seconds = waited(store, 0.3)
    assert not heard
    assert 0.3 <= seconds < 3


def test_a_start_in_this_process_ends_the_wait_at_once(store: SQLiteStore) -> None:
    store.wait("w", ["default"], 0)
    timer = soon(lambda: started(store, "a"))
    heard, seconds = waited(store)
    timer.join()
    assert heard
    assert seconds < LONG / 2


def test_a_start_in_another_store_of_this_process_does_too(store: SQLiteStore, path: Path) -> None:
    second = SQLiteStore(path)
    store.wait("w", ["default"], 0)
    timer = soon(lambda: started(second, "a"))
    heard, seconds = waited(store)
    timer.join()
    second.close()
    assert heard
    assert seconds < LONG / 2


def test_a_start_in_another_process_ends_the_wait_soon(store: SQLiteStore, path: Path) -> None:
    code = "store = SQLiteStore(sys.argv[1]); print('here', flush=True); sys.stdin.readline(); started(store, 'a')"
    other = another_process(code, path)
    assert line_of(other) == "here"
    store.wait("w", ["default"], 0)
    assert other.stdin is not None
    other.stdin.write("\n")
    other.stdin.flush()
    heard, seconds = waited(store)
    closed(other)
    assert heard
    assert seconds < LONG / 2
    assert len(claiming(store)) == 1


def test_what_another_process_writes_for_itself_does_not_end_the_wait(store: SQLiteStore, path: Path) -> None:
    code = """
store = SQLiteStore(sys.argv[1])
announced(store, "other")
print("here", flush=True)
sys.stdin.readline()
for n in range(20):
    started(store, str(n), owner="other")
"""
    other = another_process(code, path)
    assert line_of(other) == "here"
    while store.wait("w", ["default"], 0.2):
        pass
    assert other.stdin is not None
    other.stdin.write("\n")
    other.stdin.flush()
    other.wait()
    assert waited(store, 0.3)[0] is False
    closed(other)


def test_mail_for_a_run_of_ours_from_another_process_ends_the_wait(store: SQLiteStore, path: Path) -> None:
    run = started(store, "a", owner="w")
    code = """
store = SQLiteStore(sys.argv[1])
print("here", flush=True)
sys.stdin.readline()
store.write(Batch(sends=[Send(to=int(sys.argv[2]), id="m", kind="signal")]))
"""
    other = another_process(code, path, run)
    assert line_of(other) == "here"
    while store.wait("w", ["default"], 0.2):
        pass
    assert other.stdin is not None
    other.stdin.write("\n")
    other.stdin.flush()
    heard, seconds = waited(store)
    closed(other)
    assert heard
    assert seconds < LONG / 2
    assert [message.id for message in store.mail("w")] == ["m"]


def test_a_timer_of_an_unowned_run_ends_the_wait_when_it_comes_due(store: SQLiteStore) -> None:
    run = started(store, "a", owner="w")
    due = store.now() + 300_000
    store.write(Batch(turns=[first_turn(run, status="waiting", wake_at=due, release=True)]))
    while store.wait("w", ["default"], 0):
        pass
    heard, _ = waited(store)
    assert heard
    assert 0 <= store.now() - due < 100_000
    assert len(claiming(store)) == 1


def test_a_timer_that_nobody_claims_ends_one_wait_only(store: SQLiteStore) -> None:
    run = started(store, "a", owner="w")
    store.write(Batch(turns=[first_turn(run, status="waiting", wake_at=store.now() + 50_000, release=True)]))
    time.sleep(0.1)
    assert waited(store, 0.1)[0] is True
    assert waited(store, 0.1)[0] is False


def test_work_of_ones_own_does_not_end_the_wait(store: SQLiteStore) -> None:
    store.wait("w", ["default"], 0)
    run = started(store, "a", owner="w")
    store.write(Batch(turns=[first_turn(run)]))
    assert waited(store, 0.1)[0] is False
    store.write(Batch(sends=[Send(to=run, id="m", kind="signal")]))
    assert waited(store, 0.1)[0] is True


def test_wake_ends_the_wait_also_if_it_came_before(store: SQLiteStore) -> None:
    store.wait("w", ["default"], 0)
    store.wake()
    assert waited(store)[1] < 0.1
    timer = soon(store.wake)
    assert waited(store)[1] < 0.3
    timer.join()


def test_closing_ends_the_wait(store: SQLiteStore) -> None:
    store.wait("w", ["default"], 0)
    timer = soon(store.close)
    assert waited(store)[1] < 0.5
    timer.join()


def test_an_idle_worker_costs_less_than_a_hundredth_of_a_core(store: SQLiteStore) -> None:
    waited(store, 1.2)  # the first second after work is looked at more closely
    before = time.thread_time()
    waited(store, 1.5)
    assert time.thread_time() - before < 0.015


def test_an_idle_store_has_an_empty_log(store: SQLiteStore, path: Path) -> None:
    started(store, "a")
    assert Path(f"{path}-wal").stat().st_size > 0
    waited(store, 0.1)
    waited(store, 1.5)
    assert Path(f"{path}-wal").stat().st_size == 0
    assert started(store, "b")


def test_a_busy_store_keeps_its_log_short(store: SQLiteStore, path: Path) -> None:
    for n in range(300):
        store.write(Batch(starts=[_large(n, m) for m in range(10)]))
    db = sqlite3.connect(path)
    written = db.execute("PRAGMA page_count").fetchone()[0]
    db.close()
    pages = Path(f"{path}-wal").stat().st_size // 4096
    assert written > 2000
    assert pages < 1500


def _large(n: int, m: int) -> Start:
    return start(f"{n} {m}", event='"' + "x" * 3000 + '"')
