"""The PostgreSQL server of the benchmark: a real one, with fsync; each measurement has a database of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from launcher import Launched

SHOWN = ("synchronous_commit", "fsync", "full_page_writes", "shared_buffers", "max_wal_size", "wal_sync_method")


class Postgres:
    """Started when the first database is asked for."""

    def __init__(self) -> None:
        self.server: Launched | None = None
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
            self.server.stop()

    def _url(self) -> str:
        if self.server is None:
            self.server = Launched()
        return self.server.url

    def _admin(self) -> Any:
        import psycopg

        return psycopg.connect(self._url(), autocommit=True)
