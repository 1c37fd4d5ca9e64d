"""Fills a database with runs that have ended: `pg_fill.py URL RUNS`.

One run is watched at work; the rows that it left are then made `RUNS` times by the server itself, with keys, ids and
times of their own that lie before those of every run to come.
"""

from __future__ import annotations

import json
import sys
import time

import psycopg
from meter import Server
from pg_floor import engine_shape


def main(store: str, runs: int) -> dict[str, float]:
    began = time.perf_counter()
    shape = engine_shape(store, 3)
    with psycopg.connect(store, autocommit=True) as db:
        for statement in shape.fill if runs else ():
            # The statement is ours, made from what was watched.
            db.execute(statement.encode(), {"runs": runs})
        # As it would be after months, and not in the middle of a measurement.
        db.execute("VACUUM (ANALYZE)")
        db.execute("CHECKPOINT")
    server = Server(store)
    megabytes = server.size() / 1e6
    server.close()
    return {"mb": megabytes, "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]))))
