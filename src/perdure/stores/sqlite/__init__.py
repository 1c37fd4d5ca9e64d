"""Runs kept in one SQLite file: `SQLiteStore`.

`store.py` keeps the promises of the contract; `writing.py` is the one writing transaction; the statements are in
`*.sql`, the tables in `0001_runs.sql`. What the processes on one file share: `place.py`, `gate.py`, `beats.py`.
"""

from perdure.stores.sqlite.store import SQLiteStore

__all__ = ["SQLiteStore"]
