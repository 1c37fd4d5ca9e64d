"""What `ANALYZE` and `PRAGMA optimize` have noted of our tables, which is not wanted.

SQLite believes it until the next one: newer versions (3.53 does) walk along a table that was analysed when it had few
rows, whatever it has now. The statements are made to take the right index without it.
"""

from __future__ import annotations

from sqlite3 import Connection

_OURS = "tbl GLOB 'perdure_*'"


def is_analysed(db: Connection) -> bool:
    """Whether something is noted of our tables."""
    return any(db.execute(f"SELECT 1 FROM {table} WHERE {_OURS} LIMIT 1").fetchone() for table in _tables(db))


def forget(db: Connection) -> None:
    """Remove it; connections opened from now on know nothing of it. Of other tables in the file it stays."""
    for table in _tables(db):
        db.execute(f"DELETE FROM {table} WHERE {_OURS}")


def _tables(db: Connection) -> list[str]:
    found = db.execute("SELECT name FROM sqlite_master WHERE name IN ('sqlite_stat1', 'sqlite_stat4')")
    return [name for (name,) in found.fetchall()]
