"""A PostgreSQL store and its server: who is refused, what is mended by itself, how many connections there are."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest

from perdure import Context, Engine, Worker, workflow
from perdure.core.errors import (
    NotAStore,
    StoreCorrupt,
    StoreError,
    StoreLocked,
    StoreReadOnly,
    StoreTooNew,
    StoreUnavailable,
)
from perdure.core.turn import Batch, Busy, Committed, Duplicate, Fenced, Kept, Reaped, Retention
from perdure.stores.opening import open_store
from perdure.stores.postgres import PostgresStore, connections, migrations
from perdure.stores.postgres.judging import Ask
from perdure.stores.postgres.pipe import REPLANNED, Pipe
from perdure.stores.postgres.queries import channel_of
from perdure.stores.postgres.transaction import StepTransaction
from perdure.testing.conformance.story import (
    EVENT,
    NAMESPACE,
    Clock,
    announce,
    claiming,
    held,
    row,
    sending,
    start,
    started,
    starting,
)
from perdure.testing.conformance.story import signal as message
from perdure.worker import suspects
from tests import servers


@pytest.fixture(scope="module")
def database() -> servers.Database:
    return servers.needed()


@pytest.fixture
def schema(database: servers.Database) -> Iterator[str]:
    with servers.schema(database) as schema:
        yield schema


Open = Callable[..., PostgresStore]


@pytest.fixture
def opened(database: servers.Database, schema: str) -> Iterator[Open]:
    stores: list[PostgresStore] = []

    def opened(**settings: object) -> PostgresStore:
        stores.append(PostgresStore(**{"url": database.url, "schema": schema, **settings}))  # type: ignore[arg-type]
        return stores[-1]

    yield opened
    for store in stores:
        store.close()


def within(url: str, parameters: str) -> str:
    return f"{url}{'&' if '?' in url else '?'}{parameters}"


def refusal(error: type[StoreError], **settings: object) -> str:
    with pytest.raises(error) as caught:
        PostgresStore(**settings)  # type: ignore[arg-type]  # as a test likes
    return str(caught.value)


# --- migrations


def test_of_many_that_start_at_once_one_migrates(opened: Open, database: servers.Database, schema: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: opened(), range(8)))
    started(stores[0])
    assert {store.counts(NAMESPACE)["ready"] for store in stores} == {1}
    with psycopg.connect(database.url) as db:
        assert migrations.applied(db, schema, "") is not None


def test_check_makes_nothing_and_names_the_remedy(database: servers.Database, schema: str) -> None:
    asked = {"url": database.url, "schema": schema, "migrate": "check"}
    assert "perdure db upgrade" in refusal(NotAStore, **asked)
    with psycopg.connect(database.url) as db:
        assert migrations.applied(db, schema, "") is None
    PostgresStore(database.url, schema=schema).close()
    PostgresStore(**asked).close()  # type: ignore[arg-type]


def test_a_later_version_beside_this_one_says_whether_it_can_be_read(
    opened: Open, database: servers.Database, schema: str
) -> None:
    store = opened()
    with psycopg.connect(database.url, autocommit=True) as db:
        db.execute(f"INSERT INTO {schema}.migrations VALUES (99, '0099_later.sql', 'x', 1, 0)".encode())
        opened()
        started(store)
        db.execute(f"UPDATE {schema}.migrations SET readable_by = 99 WHERE number = 99".encode())
        assert "0099_later.sql" in refusal(StoreTooNew, url=database.url, schema=schema)
        db.execute(f"DELETE FROM {schema}.migrations WHERE number = 99".encode())
        db.execute(f"UPDATE {schema}.migrations SET checksum = 'x'".encode())
        assert "0001_runs.sql" in refusal(StoreCorrupt, url=database.url, schema=schema)


def test_schemas_stand_side_by_side(opened: Open, database: servers.Database) -> None:
    first = opened()
    with servers.schema(database) as other:
        second = opened(schema=other)
        started(first)
        assert (dict(first.counts(NAMESPACE)), dict(second.counts(NAMESPACE))) == ({"ready": 1}, {})
        second.close()


def test_a_schema_whose_name_is_a_word_of_sql_is_none_the_less_one(database: servers.Database) -> None:
    store = PostgresStore(database.url, schema="order")
    started(store)
    store.close()
    with psycopg.connect(database.url, autocommit=True) as db:
        db.execute('DROP SCHEMA "order" CASCADE')


def test_a_role_without_the_right_to_make_tables_is_enough(
    opened: Open, database: servers.Database, schema: str
) -> None:
    opened()
    with psycopg.connect(database.url, autocommit=True) as db:
        db.execute(
            f"CREATE ROLE worker_{schema} LOGIN; GRANT USAGE ON SCHEMA {schema} TO worker_{schema};"
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO worker_{schema};"
            f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA {schema} TO worker_{schema}".encode()
        )
        try:
            url = database.url.replace("//postgres@", f"//worker_{schema}@")
            for migrate in ("check", "auto"):
                store = opened(url=url, migrate=migrate)
                holder = held(store, migrate, migrate)
                turn = holder.turn()
                step = store.transaction(turn)
                step.commit([EVENT])  # type: ignore[union-attr]  # its fence holds
                holder.follows(turn)
                holder.events += 1
                holder.ends()
                store.prune(Retention(namespace=NAMESPACE, ended_before=store.now() + 1))
                store.close()
            db.execute(f"REVOKE INSERT ON {schema}.runs FROM worker_{schema}".encode())
            with pytest.raises(NotAStore, match="Grant it"):
                started(opened(url=url), "refused")
        finally:
            db.execute(f"DROP OWNED BY worker_{schema}; DROP ROLE worker_{schema}".encode())


def test_a_role_that_may_not_make_tables_is_told_who_may(database: servers.Database, schema: str) -> None:
    with psycopg.connect(database.url, autocommit=True) as db:
        db.execute(f"CREATE ROLE nobody_{schema} LOGIN".encode())
        try:
            url = database.url.replace("//postgres@", f"//nobody_{schema}@")
            said = refusal(NotAStore, url=url, schema=f"{schema}_new")
            assert "with a role that may (CREATE on the database" in said
        finally:
            db.execute(f"DROP ROLE nobody_{schema}".encode())


def test_a_schema_with_the_longest_name_has_notifications_too(opened: Open, database: servers.Database) -> None:
    name = "s" * 63
    store = opened(schema=name)
    try:
        announce(store, "w")
        listener = store._listener
        assert listener is not None
        assert listener.first.wait(10), "it listens"
        store.wait("w", ("default",), 0)
        with psycopg.connect(database.url) as db:
            store.write_on(db, Batch(starts=[start()]))
            db.commit()
        assert store.wait("w", ("default",), 10)
        assert len(claiming(store, "w")) == 1
    finally:
        store.close()
        with psycopg.connect(database.url, autocommit=True) as db:
            db.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE".encode())


def test_schemas_of_long_names_have_channels_of_their_own() -> None:
    names = ["perdure", "s" * 55, "s" * 56, "s" * 62, "s" * 62 + "a", "s" * 62 + "b"]
    channels = {channel_of(name) for name in names}
    assert len(channels) == len(names)
    assert max(map(len, channels)) <= 63


# --- who is refused


def test_what_can_only_be_read_is_no_store(database: servers.Database, schema: str) -> None:
    url = within(database.url, "options=-cdefault_transaction_read_only%3Don")
    assert "can only be read" in refusal(StoreReadOnly, url=url, schema=schema)


def test_a_standby_is_no_store(schema: str) -> None:
    if not servers.installations():
        pytest.skip("no server of our own")
    with servers.PostgresServer() as server:
        PostgresStore(server.url).close()
        server.stop()
        signal_file = server._data / "standby.signal"
        signal_file.touch()
        if os.geteuid() == 0:
            signal_file.chmod(0o666)
        server.start()
        assert "standby" in refusal(StoreReadOnly, url=server.url)


def test_a_database_that_is_not_there_is_no_store(database: servers.Database) -> None:
    url = database.url.replace("/postgres?", "/nobody?") if "?" in database.url else f"{database.url}_nobody"
    assert "nobody" in refusal(StoreUnavailable, url=url)


def test_nobody_there_is_retryable_and_says_where() -> None:
    with pytest.raises(StoreUnavailable) as caught:
        PostgresStore("postgresql://me:secret@127.0.0.1:1/orders")
    assert caught.value.retryable
    assert "127.0.0.1:1" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert isinstance(caught.value.__cause__, psycopg.OperationalError)


def test_a_store_whose_tables_are_gone_says_so(opened: Open, database: servers.Database, schema: str) -> None:
    store = opened()
    with psycopg.connect(database.url, autocommit=True) as db:
        db.execute(f"DROP SCHEMA {schema} CASCADE".encode())
    with pytest.raises(NotAStore, match="perdure db upgrade"):
        started(store)


def test_somebody_elses_lock_is_waited_for_and_then_named(
    opened: Open, database: servers.Database, schema: str
) -> None:
    store = opened()
    with psycopg.connect(database.url) as db:
        db.execute(f"LOCK TABLE {schema}.runs IN EXCLUSIVE MODE".encode())
        # It may be held by the same run in somebody's open transaction, for all that is known of one.
        assert isinstance(starting(store), Busy)
        with pytest.raises(StoreLocked) as caught:
            store.write(Batch(starts=[start(f"run-{n}") for n in range(20)]))
        assert caught.value.retryable
    while isinstance(starting(store), Busy):
        pass
    started(store, "another")


# --- URLs, passwords, connections


def test_the_url_names_everything_but_secrets(database: servers.Database, schema: str) -> None:
    store = open_store(within(database.url, f"password=hunter2&schema={schema}&hints=false"))
    try:
        assert "hunter2" not in store.url
        assert f"schema={schema}" in store.url
        again = open_store(store.url)
        started(again)
        assert dict(store.counts(NAMESPACE)) == {"ready": 1}
        again.close()
    finally:
        store.close()


def test_a_url_cannot_have_another_encoding(database: servers.Database) -> None:
    assert "Leave that parameter out" in refusal(NotAStore, url=within(database.url, "client_encoding=LATIN1"))
    PostgresStore(within(database.url, "client_encoding=utf-8")).close()


def test_a_url_that_cannot_be_read_shows_no_password() -> None:
    secret = "zzcret"
    with pytest.raises(NotAStore) as refused:
        PostgresStore(f"postgresql://u:se%{secret}@127.0.0.1/db")
    assert secret not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize(
    ("rest", "named"),
    [
        ("127.0.0.1/db?fast=yes", "parameter fast"),
        ("127.0.0.1:99999/db", "port=99999"),
        ("127.0.0.1:abc/db", "port=abc"),
        ("127.0.0.1/db?connect_timeout=soon", "connect_timeout=soon"),
    ],
)
def test_what_is_wrong_in_a_url_is_named_before_anybody_is_asked(rest: str, named: str) -> None:
    with pytest.raises(NotAStore, match=named) as refused:
        PostgresStore(f"postgresql://u:zzcret@{rest}")
    assert refused.value.store == "", "the URL names no store"
    assert "zzcret" not in str(refused.value)


def test_a_password_that_changes_is_asked_for_at_every_connect(opened: Open) -> None:
    asked: list[int] = []

    def password() -> str:
        asked.append(len(asked))
        return f"secret-{len(asked)}"

    store = opened(password=password)
    before = len(asked)
    store._writer.drop()
    started(store)
    assert len(asked) == before + 1


def test_a_password_that_cannot_be_had_is_no_bug_of_ours_and_is_asked_for_ever_more_rarely(
    opened: Open, schema: str
) -> None:
    calls: list[float] = []
    broken = False

    def password() -> str:
        calls.append(time.monotonic())
        if broken:
            raise OSError("the vault is sealed")
        return "secret"

    store = opened(password=password)
    broken = True
    store._writer.drop()
    calls.clear()
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        with pytest.raises(StoreUnavailable, match="password= raised OSError: the vault is sealed") as refused:
            started(store)
        assert refused.value.retryable
        assert "secret" not in str(refused.value)
    assert len(calls) <= 6
    broken = False
    time.sleep(max(store._address._next_try - time.monotonic(), 0))
    started(store)
    with pytest.raises(NotAStore, match="type NoneType, which is no password"):
        opened(password=lambda: None)


def test_a_store_says_how_another_process_opens_it(opened: Open, database: servers.Database, schema: str) -> None:
    direct = within(database.url, "application_name=far")
    store = opened(password=lambda: "hunter2 &?", direct=direct, hints=False)
    url = store.elsewhere()
    assert url is not None
    assert "hunter2" not in store.url
    other = open_store(url)
    assert isinstance(other, PostgresStore)
    try:
        assert other._address.parameters["password"] == "hunter2 &?"
        assert other._direct is not None
        assert other._direct.parameters["password"] == "hunter2 &?"
        assert other._direct.parameters["application_name"] == "far"
        assert (other._schema, other._hints, other.url) == (schema, False, store.url)
    finally:
        other.close()
    assert opened(clock=lambda: 1).elsewhere() is None


def test_a_process_has_at_most_five_connections_and_says_its_name(
    opened: Open, database: servers.Database, schema: str
) -> None:
    store = opened(url=within(database.url, f"application_name={schema}"))
    holder = held(store)
    with ThreadPoolExecutor(16) as pool:
        for done in [pool.submit(store.history, holder.run) for _ in range(64)]:
            done.result(20)
        pool.submit(store.heartbeat, "worker").result(20)
        pool.submit(store.wait, "worker", ["default"], 0.1).result(20)
    holder.commits(events=[EVENT])
    assert connected(database, schema) <= 5
    store.close()
    until = time.monotonic() + 10
    while connected(database, schema):
        assert time.monotonic() < until, "connections were left behind"
        time.sleep(0.02)


def connected(database: servers.Database, name: str) -> int:
    with psycopg.connect(database.url) as db:
        asked = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE %s"
        return int(db.execute(asked, [f"%{name}%"]).fetchone()[0])  # type: ignore[index]  # a count has a row


# --- what is mended by itself


def test_a_server_that_was_killed_is_reached_again() -> None:
    if not servers.installations():
        pytest.skip("no server of our own to kill")
    with servers.PostgresServer() as server:
        store = PostgresStore(server.url)
        holder = held(store)
        holder.commits(events=[EVENT])
        server.kill()
        with pytest.raises(StoreUnavailable):
            store.write(Batch(turns=[holder.turn()]))
        with pytest.raises(StoreUnavailable):
            store.history(holder.run)
        with pytest.raises(StoreUnavailable):
            store.heartbeat("worker")
        server.start()
        holder.commits(events=[EVENT])
        assert len(store.history(holder.run)) == 3
        assert store.heartbeat("worker") is not None
        step = store.transaction(holder.turn())
        step.commit([EVENT])  # type: ignore[union-attr]  # its fence holds
        store.close()


def test_a_connection_that_was_cut_is_made_anew_and_nobody_notices(
    opened: Open, database: servers.Database, schema: str
) -> None:
    store = opened(url=within(database.url, f"application_name={schema}"))
    holder = held(store)
    cut(database, schema)
    holder.commits(events=[EVENT])
    assert store.history(holder.run)[1:] == [EVENT]
    assert store.heartbeat("worker") is not None


def cut(database: servers.Database, name: str) -> None:
    with psycopg.connect(database.url, autocommit=True) as db:
        asked = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE %s"
        db.execute(asked, [f"%{name}%"])


def test_a_client_asks_the_server_again_what_time_it_is(opened: Open) -> None:
    store = opened()
    true = store.now()
    store._server_clock.set(true - 3_600_000_000)
    assert store.now() < true, "as after the server's clock was put right"
    now, at = store._server_clock._said
    store._server_clock._said = (now, at - connections.ASKED_AGAIN)
    store.now()
    until = time.monotonic() + 60
    while store.now() < true:
        assert time.monotonic() < until, "it was not asked"
        time.sleep(0.01)


def test_what_was_committed_before_the_answer_was_lost_is_written_once(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    from perdure.testing.conformance.story import start

    store = opened()
    holder = held(store)
    receiver = started(store, "receiver")
    lost: list[object] = []
    collect = Pipe.collect

    def answers(pipe: Pipe) -> object:
        found = collect(pipe)
        if not lost:
            lost.append(found)
            raise psycopg.OperationalError("the answer was lost")
        return found

    monkeypatch.setattr(Pipe, "collect", answers)
    turn = holder.turn(events=[EVENT], starts=[start("child")], sends=[message(receiver, "of the turn")])
    begun, sent, committed = store.write(Batch(starts=[start("new")], sends=[message(receiver, "sent")], turns=[turn]))
    assert lost
    assert (begun.run, begun.version) == (store.run(NAMESPACE, "new").key, 0)  # type: ignore[union-attr]
    assert isinstance(sent, (Kept, Duplicate))
    assert committed == Committed(run=holder.run)
    assert len(store.history(holder.run)) == 2
    assert sorted(mail.id for mail in store.mailbox(receiver)) == ["of the turn", "sent"]


def test_a_database_that_was_set_back_fences_its_workers(opened: Open, database: servers.Database, schema: str) -> None:
    store = opened()
    holder = held(store)
    holder.commits(events=[EVENT])
    before = row(store, holder.run)
    holder.commits(events=[EVENT])
    with psycopg.connect(database.url, autocommit=True) as db:
        # The row and the history as a backup had them.
        db.execute(
            f"UPDATE {schema}.runs SET version = %s, turn = %s, history_events = 2 WHERE key = %s".encode(),
            [before.version, before.turn, holder.run],
        )
        db.execute(f"DELETE FROM {schema}.history WHERE run = %s AND seq > 2".encode(), [holder.run])
    assert not isinstance(holder.writes(holder.turn(events=[EVENT])), Committed)
    assert len(store.history(holder.run)) == 2


# --- who has died


WORKER = """
import sys, time
from perdure.stores.postgres import PostgresStore
from perdure.testing.conformance.story import announce, started
store = PostgresStore(sys.argv[1], schema=sys.argv[2], hints=sys.argv[3] == "hints")
announce(store, "victim")
started(store, owner="victim")
while store._hints and store._backend() == 0:
    time.sleep(0.01)
store.heartbeat("victim")
print("ready", flush=True)
time.sleep(60)
"""


def victim(database: servers.Database, schema: str, hints: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, database.url, schema, hints], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_killed_worker_is_missed_within_a_second(opened: Open, database: servers.Database, schema: str) -> None:
    store = opened()
    with victim(database, schema, "hints") as process:
        time.sleep(0.8)
        assert store.reap().runs == 0
        assert store.rounds < 0.5, "somebody is at work: looked after often"
        assert store.worker("victim") is not None
        process.send_signal(signal.SIGKILL)
        died = time.monotonic()
        while store.worker("victim") is not None:
            assert time.monotonic() - died < 5, "it is still said to live"
            time.sleep(0.01)
        while store.reap().runs == 0:
            assert time.monotonic() - died < 5, "it was not missed"
            time.sleep(store.rounds)
    assert time.monotonic() - died < 2.0


def test_a_worker_of_whose_connection_nothing_is_known_is_not_said_to_be_dead(
    opened: Open, database: servers.Database, schema: str
) -> None:
    store = opened()
    announce(store, "unseen")
    with psycopg.connect(database.url) as db:
        db.execute(f"UPDATE {schema}.workers SET backend = 1, backend_start = NULL".encode())
    assert store.worker("unseen") is not None


class StopsInAClaim(PostgresStore):
    """Of a process that is stopped when it has taken runs and not yet committed that."""

    taken: threading.Event
    goes_on: threading.Event

    @contextmanager
    def _transaction(self) -> Iterator[Ask]:
        with super()._transaction() as ask:

            def stopping(name: str, /, **parameters: object) -> list[tuple[object, ...]]:
                answer = ask(name, **parameters)
                if name == "take":
                    self.taken.set()
                    self.goes_on.wait(60)
                return answer

            yield stopping


def test_what_a_stopped_process_is_about_to_claim_others_get(
    opened: Open, database: servers.Database, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert connections.SETTINGS["idle_in_transaction_session_timeout"] == "5s"
    monkeypatch.setattr(
        connections, "SETTINGS", {**connections.SETTINGS, "idle_in_transaction_session_timeout": "500ms"}
    )
    stopped = StopsInAClaim(database.url, schema=schema)
    stopped.taken, stopped.goes_on = threading.Event(), threading.Event()
    other = opened()
    try:
        announce(stopped, "stopped")
        announce(other, "other")
        run = started(other, id="order-1")
        with ThreadPoolExecutor(1) as pool:
            stuck = pool.submit(claiming, stopped, "stopped")
            assert stopped.taken.wait(60)
            assert claiming(other, "other") == [], "it is locked"
            until = time.monotonic() + 60
            while not (heads := claiming(other, "other")):
                assert time.monotonic() < until, "nobody gets it"
                time.sleep(0.05)
            stopped.goes_on.set()
            with pytest.raises(StoreUnavailable):
                stuck.result(60)
        assert [head.row.key for head in heads] == [run]
        assert row(other, run).owner == "other"
    finally:
        stopped.close()


def test_a_worker_that_stands_still_in_a_transaction_step_does_not_keep_its_run(opened: Open) -> None:
    stopped, other = opened(hints=False), opened(hints=False)
    announce(stopped, "stopped", ttl=500_000)
    announce(other, "other")
    holder = held(stopped, "order-1", "stopped")
    step = stopped.transaction(holder.turn(progress=True))
    assert isinstance(step, StepTransaction)
    until = time.monotonic() + 60
    while not (heads := claiming(other, "other")):
        assert time.monotonic() < until, "nobody gets it"
        time.sleep(0.05)
        other.reap()
    assert [head.row.key for head in heads] == [holder.run]
    with pytest.raises(StoreUnavailable):
        step.commit([EVENT])
    assert row(other, holder.run).owner == "other"


def test_without_hints_only_the_lease_tells(opened: Open, database: servers.Database, schema: str) -> None:
    store = opened(hints=False)
    with victim(database, schema, "none") as process:
        process.kill()
        process.wait()
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            assert store.reap().workers == 0
            time.sleep(0.1)


def test_a_worker_whose_connections_were_cut_is_not_taken_for_dead(
    opened: Open, database: servers.Database, schema: str
) -> None:
    store = opened()
    living = opened(url=within(database.url, f"application_name={schema}"))
    holder = held(living)
    until = time.monotonic() + 10
    while living._backend() == 0:
        assert time.monotonic() < until
        time.sleep(0.01)
    living.heartbeat("worker")
    for _ in range(3):
        cut(database, schema)
        watched = time.monotonic() + 1.2
        while time.monotonic() < watched:
            assert store.reap().workers == 0
            time.sleep(0.05)
    assert holder.writes(holder.turn()) == Committed(run=holder.run)


def test_a_new_connection_makes_no_lease_longer(opened: Open) -> None:
    """The loop of its worker may hang, and then others shall have the runs."""
    clock = Clock()
    store = opened(clock=clock)
    holder = held(store)
    clock.advance(seconds=10)
    store._stand_for()
    clock.advance(seconds=6)
    assert store.reap() == Reaped(workers=1, runs=1)
    assert isinstance(holder.writes(holder.turn()), Fenced)


# --- idle


def test_an_idle_worker_asks_less_than_twice_a_second(
    database: servers.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by the server: everything that a worker with nothing to do asks in ten seconds."""
    if not servers.installations():
        pytest.skip("no server of our own")
    # For so long after its start it looks more often for runs that killed their workers.
    monkeypatch.setattr(suspects, "NEAR", 1.0)

    async def idle() -> float:
        with servers.PostgresServer(settings={"log_statement": "all", "log_destination": "stderr"}) as server:
            worker = Worker(server.url, workflows=[returns_much])
            serving = asyncio.ensure_future(worker.run())
            while worker._core.shift is None or not worker._core.shift.incarnation:
                await asyncio.sleep(0.05)
            await asyncio.sleep(3)
            before = asked(server)
            await asyncio.sleep(10)
            after = asked(server)
            await worker.stop()
            await serving
            return (after - before) / 10

    def asked(server: servers.PostgresServer) -> int:
        text = (server.folder / "log").read_text(errors="replace")
        return text.count("LOG:  statement:") + text.count("LOG:  execute ")

    assert asyncio.run(idle()) < 2


def test_texts_come_back_as_they_were(opened: Open) -> None:
    store = opened()
    for n, text in enumerate(
        ('"\\u0000"', '"日本語 🎉 \u2028 \x1e \x7f"', '"' + "ü" * 300_000 + '"', '"\\\\ % %s $1 {}"')
    ):
        holder = held(store, f"run-{n}", input=f"[[{text}],{{}}]")
        holder.commits(events=[text], waits=text)
        sending(store, holder.run, data=text)
        assert store.history(holder.run)[1] == text
        assert (holder.row.waits, holder.row.input) == (text, f"[[{text}],{{}}]")
        assert store.mailbox(holder.run)[0].data == text


def test_raw_nul_is_unstorable_and_harms_only_itself(opened: Open) -> None:
    store = opened()
    bad, good = held(store, "bad"), held(store, "good")
    verdicts = store.write(Batch(turns=[bad.turn(events=['"\0"']), good.turn(events=[EVENT])]))
    assert [type(verdict).__name__ for verdict in verdicts] == ["Unstorable", "Committed"]
    assert len(store.history(bad.run)) == 1


def test_a_forked_child_makes_connections_of_its_own(opened: Open) -> None:
    store = opened()
    holder = held(store)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, str(len(store.history(holder.run))).encode())
            started(store, "of the child")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 10) == b"1"
    os.close(reading)
    os.close(writing)
    holder.commits(events=[EVENT])
    assert store.run(NAMESPACE, "of the child") is not None


def test_a_batch_is_sent_without_waiting_and_collected_later(
    opened: Open, database: servers.Database, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.stores.postgres.writer.WAIT", 30)
    store = opened()
    holder = held(store)
    with psycopg.connect(database.url) as other:
        # Somebody's lock keeps the server from answering.
        other.execute(f"SELECT 1 FROM {schema}.runs WHERE key = %s FOR UPDATE".encode(), [holder.run])
        began = time.monotonic()
        turn = holder.turn(events=[EVENT])
        store.begin(Batch(turns=[turn]))
        assert time.monotonic() - began < 2, "begin has waited for the answer"
        assert not select.select([store.fileno()], [], [], 0.2)[0]
        other.rollback()
    assert select.select([store.fileno()], [], [], 10)[0]
    assert store.finish() == [Committed(run=holder.run)]


@workflow
async def returns_much(ctx: Context, size: int) -> int:
    return len(await ctx.step.run("much", lambda: "x" * size))


async def test_a_batch_larger_than_the_sockets_buffers_is_sent_to_its_end(
    database: servers.Database, schema: str
) -> None:
    url = f"{database.url}{'&' if '?' in database.url else '?'}schema={schema}"
    async with Engine(url, workflows=[returns_much]) as engine:
        # Once alone, so that the connection is there and the loop itself sends.
        assert await (await engine.start(returns_much, 1)).result(timeout=60) == 1
        size = 300_000
        runs = [await engine.start(returns_much, size) for _ in range(40)]
        assert await asyncio.gather(*(run.result(timeout=60) for run in runs)) == [size] * 40


def test_what_is_read_often_is_planned_once_and_anew_when_the_tables_have_grown(
    opened: Open, database: servers.Database
) -> None:
    store = opened()
    planned: list[tuple[int, int]] = []

    def look() -> None:
        # Generic and custom plans of what this reader has prepared for `rows`.
        with store._read() as db:
            found = db.execute(
                "SELECT generic_plans, custom_plans FROM pg_prepared_statements WHERE statement LIKE '%run.key = ANY%'"
            ).fetchone()
        planned.append(found or (0, 0))

    with store._read() as db:
        if db.info.server_version < 140000:
            pytest.skip("pg_prepared_statements counts plans since PostgreSQL 14")
    for _ in range(4):
        store.rows([10**12])
    look()
    assert planned[-1][0] >= 2
    assert planned[-1][1] == 0, "each time anew"
    plans = store._idle[-1].plans
    assert not plans.are_old()
    plans._made -= REPLANNED + 1
    assert plans.are_old()
    assert not plans.are_old()


def test_two_threads_may_write(opened: Open) -> None:
    store = opened()
    announce(store)
    holders = [held(store, f"run-{n}") for n in range(4)]

    def commits(n: int) -> None:
        for _ in range(25):
            holders[n].commits(events=[EVENT])

    threads = [threading.Thread(target=commits, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [len(store.history(holder.run)) for holder in holders] == [26] * 4
