"""The PostgreSQL server of the benchmark: a real one, with fsync; each measurement has a database of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from tests.servers import PostgresServer

SETTINGS: Final = {
    "fsync": "on",
    "full_page_writes": "on",
    "autovacuum_naptime": "1min",
    # So that the log can be read through a connection: statements are counted there.
    "logging_collector": "on",
}
"""What the tests' own launcher sets otherwise, put back to the server's defaults."""

SHOWN = ("synchronous_commit", "fsync", "full_page_writes", "shared_buffers", "max_wal_size", "wal_sync_method")


class Postgres:
    """Started when the first database is asked for."""

    def __init__(self) -> None:
        self.server: PostgresServer | None = None
        self.made = 0

    @contextmanager
    def fresh(self) -> Iterator[str]:
        """The URL of an empty database, removed afterwards; that writes out what was left to write for it."""
        self.made += 1
        name = f"bench_{self.made}"
        with self._admin() as admin:
            admin.execute(f"CREATE DATABASE {name}")
        try:
            yield urlsplit(self._url())._replace(path=f"/{name}").geturl()
        finally:
            with self._admin() as admin:
                admin.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def settings(self) -> list[str]:
        """What the server said about itself, if there was one."""
        if self.server is None:
            return []
        with self._admin() as admin:
            found = {name: admin.execute(f"SHOW {name}").fetchone()[0] for name in ("server_version", *SHOWN)}
        version = found.pop("server_version")
        said = ", ".join(f"{name}={value}" for name, value in found.items())
        return [f"PostgreSQL {version}: {said}"]

    def stop(self) -> None:
        if self.server is not None:
            self.server.close()

    def _url(self) -> str:
        if self.server is None:
            self.server = _launched()
        return self.server.url

    def _admin(self) -> Any:
        import psycopg

        return psycopg.connect(self._url(), autocommit=True)


def _launched() -> PostgresServer:
    sys.path.append(str(Path(__file__).parents[1]))
    from tests.servers import PostgresServer

    return PostgresServer(settings=SETTINGS).start()
