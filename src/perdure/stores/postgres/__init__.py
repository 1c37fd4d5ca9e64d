"""Runs kept in a PostgreSQL database, for any number of workers: `PostgresStore`.

`store.py` keeps the promises of the contract; `batch.py` is the one writing transaction, `writer.py` sends it; the
statements are in `*.sql`, the tables in `0001_runs.sql`.
"""

from perdure.stores.postgres.store import PostgresStore

__all__ = ["PostgresStore"]
