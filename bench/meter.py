"""What a stretch of work cost: time, CPU of this process and of the PostgreSQL server, transactions."""

from __future__ import annotations

import time
from typing import Any

import proc


class Meter:
    """Counts from its making on. On SQLite there is no server; its columns are left out."""

    def __init__(self, store: str) -> None:
        self.server = Server(store) if store.startswith("postgres") else None
        self.at, self.cpu = time.perf_counter(), time.process_time()
        self.server_cpu = self.server.cpu() if self.server else 0.0

    def per_run(self, runs: int) -> dict[str, float]:
        seconds, cpu = time.perf_counter() - self.at, time.process_time() - self.cpu
        found = {"runs_per_s": runs / seconds, "cpu_ms": 1000 * cpu / runs}
        if self.server:
            found["server_cpu_ms"] = 1000 * (self.server.cpu() - self.server_cpu) / runs
            self.server.close()
        return found


class Server:
    """A connection beside the work. The server must run on this machine: its CPU is read from `/proc`."""

    def __init__(self, store: str) -> None:
        # Only the rows on PostgreSQL need a driver.
        import psycopg

        self.db: Any = psycopg.connect(store, autocommit=True, application_name="bench")
        # A backend is a child of the postmaster.
        self.postmaster = proc.parent(self.number("SELECT pg_backend_pid()"))

    def cpu(self) -> float:
        return proc.of_server(self.postmaster)

    def transactions(self) -> int:
        """Committed in this database up to now. A backend tells its part once a second and when it ends."""
        return self.number("SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()")

    def size(self) -> int:
        """Bytes of all tables and indexes in this database."""
        return self.number("SELECT pg_database_size(current_database())")

    def log_statements(self) -> None:
        """From the next connection on the server logs each statement in this database, but none of ours."""
        name = self.db.info.dbname
        self.db.execute(f"ALTER DATABASE {name} SET log_statement = 'all'")

    def statements(self) -> int:
        """Lines of the server's log that tell of a statement."""
        said = self.db.execute("SELECT pg_read_file(pg_current_logfile())").fetchone()[0]
        return sum(" LOG:  execute " in line or " LOG:  statement: " in line for line in said.splitlines())

    def waiting_for_locks(self) -> int:
        """Sessions of this database that wait for somebody else's lock at this moment."""
        return self.number(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )

    def another(self) -> Any:
        """One more connection, as a user's program has it: a transaction begins with its first statement."""
        import psycopg

        return psycopg.connect(self.db.info.dsn)

    def number(self, sql: str) -> int:
        return int(self.db.execute(sql).fetchone()[0])

    def close(self) -> None:
        self.db.close()
