"""Exactly once, in the store's own database: a step whose effect and record are one commit, a start with its order."""

import sqlite3
from contextlib import closing

from perdure import NonRetryable, StepFailed, sync, workflow

FILE = "bank.db"
TABLES = """
DROP TABLE IF EXISTS accounts; CREATE TABLE accounts (name TEXT PRIMARY KEY, cents INTEGER NOT NULL);
DROP TABLE IF EXISTS parcels; CREATE TABLE parcels (number INTEGER PRIMARY KEY);
INSERT INTO accounts VALUES ('ann', 100);
"""


def withdraw(db: sqlite3.Connection, name: str, cents: int) -> int:
    """Gets the open connection first. Perdure commits when it returns, and rolls back when it raises."""
    db.execute("UPDATE accounts SET cents = cents - ? WHERE name = ?", (cents, name))
    (left,) = db.execute("SELECT cents FROM accounts WHERE name = ?", (name,)).fetchone()
    if left < 0:
        raise NonRetryable(f"the account has {left + cents}, not {cents}")
    return int(left)


@workflow
def pay(ctx: sync.Context, name: str, cents: int) -> str:
    try:
        left = ctx.step.transaction("withdraw", withdraw, name, cents)
    except StepFailed as error:
        return f"refused: {error.message}"
    return f"paid {cents}, {left} left"


@workflow
def send(ctx: sync.Context, number: int) -> None:
    ctx.step.wait_signal("packed")


def order(engine: sync.Engine, number: int, *, fails: bool) -> None:
    """The parcel and the run that sends it: both are there when this has committed, or neither."""
    with closing(sqlite3.connect(FILE)) as db, db:
        db.execute("INSERT INTO parcels VALUES (?)", (number,))
        engine.options(connection=db).start(send, number)
        if fails:
            raise ConnectionError("the customer has left")


def main() -> None:
    with sync.Engine(f"sqlite:///{FILE}", workflows=[pay, send]) as engine:
        with closing(sqlite3.connect(FILE)) as db:
            db.executescript(TABLES)
        print(engine.start(pay, "ann", 30).result())
        print(engine.start(pay, "ann", 80).result())
        for number in (1, 2):
            try:
                order(engine, number, fails=number == 2)
            except ConnectionError:
                pass
        waiting = [run for run in engine.list_runs(workflow="send").items if not run.status.ended]
        print(f"{len(waiting)} of 2 parcels waits")
        for run in waiting:
            engine.handle(run.id).terminate()


if __name__ == "__main__":
    main()
