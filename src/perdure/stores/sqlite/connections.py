"""Opening the file: who may, and how every connection of ours is set."""

from __future__ import annotations

import functools
import logging
import os
import sqlite3
import stat
from sqlite3 import Connection
from typing import Any, Final
from urllib.parse import quote

from perdure.core.errors import NotAStore, StoreReadOnly, StoreUnavailable, quoted
from perdure.stores.sqlite import gate
from perdure.stores.sqlite.borrowed import Plain

log = logging.getLogger(__name__)

MENDED: Final = (3, 51, 3)
OLDEST: Final = (3, 35, 0)  # UPDATE … FROM with everything the statements here use
SYNCHRONOUS: Final = {"full": "FULL", "normal": "NORMAL"}
CHECKPOINT_PAGES: Final = 1_000
CLASSES: Final = {"full": "D3", "normal": "D2"}


def check_machine() -> None:
    """Refuse where the file could not be shared safely."""
    if sqlite3.sqlite_version_info < OLDEST:
        raise NotAStore(
            f"This Python has SQLite {sqlite3.sqlite_version}, and Perdure needs {'.'.join(map(str, OLDEST))}. "
            "Older ones cannot update many rows from a list. Use a newer Python, or a store of another kind."
        )
    if gate.fcntl is None:
        raise NotAStore(
            "A SQLite store needs fcntl locks, and this platform has none. They tell which worker has died. "
            "Run on Linux or macOS (on Windows: in WSL), or use a store of another kind."
        )


@functools.cache
def note_version() -> None:
    """Say it once if this SQLite has the WAL-reset bug: a writer beside a checkpoint can damage the file."""
    if sqlite3.sqlite_version_info < MENDED:
        log.info(
            "SQLite %s can damage a file when one process writes while another checkpoints; 3.51.3 cannot. Perdure's "
            "processes never do both at once. If other programs write to the same file, use a newer Python or SQLite.",
            sqlite3.sqlite_version,
        )


def check_path(path: str, url: str, *, create: bool) -> None:
    """Refuse what cannot be a store by its path; create the empty file if it is wanted and missing."""
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise NotAStore(
            f"The store {url} cannot be opened: there is no folder {quoted(folder)}. "
            "A store's file is created, its folder is not. Create it, or mend the path.",
            store=url,
        )
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as missing:
        if not create:
            raise NotAStore(
                f"There is no store {url}. The file does not exist, and reading does not create one. "
                "Check the path, or start a run or a worker first.",
                store=url,
            ) from missing
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        except FileExistsError:
            pass  # another process was quicker
        except PermissionError as error:
            raise _read_only(url) from error
        except OSError as error:
            raise StoreUnavailable(
                f"The store {url} cannot be created. The system says: {error.strerror}. Mend that, or the path.",
                store=url,
            ) from error
        return
    except OSError as error:
        raise StoreUnavailable(
            f"The store {url} cannot be reached. The system says: {error.strerror}. Mend that, or the path.", store=url
        ) from error
    if not stat.S_ISREG(mode):
        raise NotAStore(f"The store {url} is no file. A store is one ordinary file. Mend the path.", store=url)
    if create and not (_may_write(path) and _may_write(folder)):
        raise _read_only(url)


def connect(
    path: str, *, busy_timeout: float, durability: str, writes: bool, factory: type[Connection] = Connection
) -> Any:
    """A connection to an existing file, set as all of ours are. factory: its class, for one that users get."""
    db: Connection = sqlite3.connect(
        f"file:{quote(path)}?mode=rw",
        uri=True,
        timeout=busy_timeout,
        isolation_level=None,
        check_same_thread=False,  # one thread at a time uses it, not always the same one
        cached_statements=512,
        factory=factory,
    )
    try:
        execute = Plain(db).execute
        execute("PRAGMA mmap_size = 0")
        execute("PRAGMA foreign_keys = OFF")
        execute("PRAGMA temp_store = MEMORY")
        execute(f"PRAGMA synchronous = {SYNCHRONOUS[durability]}")
        # Only SQLite knows how long the log is. So it checkpoints by itself (PASSIVE), but on one connection only,
        # which commits inside the gate: no other process of ours writes or checkpoints then.
        execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES if writes else 0}")
        if writes:
            execute("PRAGMA cache_size = -16000")
        else:
            execute("PRAGMA query_only = ON")
    except BaseException:
        Connection.close(db)
        raise
    return db


def _may_write(path: str) -> bool:
    return os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def _read_only(url: str) -> StoreReadOnly:
    return StoreReadOnly(
        f"The store {url} cannot be written. It, or its folder, may not be written by this user; a store needs both. "
        "Mend their permissions, or open another store.",
        store=url,
    )
