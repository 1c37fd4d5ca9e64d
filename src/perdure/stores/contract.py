"""What every store promises. Each sentence here has its test in `perdure.testing.conformance`.

A store keeps runs: rows and keys, never workflow code. It is synchronous and batch-oriented; one thread of a
process writes (the committer), any thread may read. Its clock decides every time it writes itself.

1.  `write` is one transaction: when it returns, everything it answered for survives a crash that the store's
    durability class covers; when it raises, nothing or everything was written, and asking again with the same
    ids gives the answers of the first time (a start by its seed, a send by its id, a turn by its turn id).
2.  Verdicts are per item, in the order starts, sends, turns. A fenced, refused or unstorable item harms only
    itself.
3.  A turn takes effect only if owner, epoch, version and id of the last turn all match in the statement that
    writes; it raises the version by one and stores its own id. A turn already applied answers `Committed`. A new
    run has version 0 and "" for its last turn. A move that `core/status.py` does not know is `Unstorable`.
4.  History is append-only and gap-free; (run, seq) is unique.
5.  A message is kept at most once per (run, id), for ever, also after it was consumed. Mail is read in the
    order of acceptance and taken by id.
6.  A closing turn whose `consumed` does not name all unread mail answers `MoreMail` and writes nothing; a
    forced one ends the run and lists nothing itself (its `ended` event already did).
7.  A run with unread mail, a `wake_at` that has come, or status `ready` is claimable while it has no owner and
    is not ended, held, quarantined or paused; but mail does not wake a `blocked` run (it would be tried without
    back-off), and a `scheduled` one only if it is a `cancel` (it would start early). A claim sets the owner,
    raises the epoch and makes it `running`. Two claims never return the same run under the same epoch.
8.  An ended run has one terminal status that never changes, and no owner.
9.  A reaped or retired incarnation is dead for ever: its heartbeat answers None, its turns are `Fenced`, it
    claims nothing, and what it starts is `ready` for others. One that was never announced counts as dead.
    Reaping makes the `running` runs of the dead `ready` and adds a strike to each; their `waiting` ones only
    lose the owner. Retiring makes `running` runs `ready` without a strike.
10. A start that finds its id or key taken writes nothing. The key is looked at before the id, `fail` answers
    `Taken` before anything is compared. A key is free again when its `idempotency_until` has come.
11. Nothing is readable, writable or countable across namespaces, except by key.
12. Driver errors are raised as `StoreError`s, with the driver's own as their cause.
13. A store with `transactions` opens one of its own database for a step: `transaction` begins and fences, exactly
    as a turn is fenced, before anything else happens. What is done with its connection, the fence and the events
    given to `commit` are one commit, or nothing. A turn already applied answers `Committed` and opens nothing. Nobody
    but `commit` ends it well: the connection refuses to commit, and after `roll_back`, or the store's own limit of
    time, it refuses everything.
14. `write_on` writes a batch of starts and sends inside a transaction that the caller has open on the store's own
    database: rolled back means never happened. It neither commits nor waits for other writers by itself; workers see
    it after the caller's commit.
15. `prune` removes ended runs with everything that is kept of them: row, history, mail, input, idempotency keys.
    Never a live run, nor a run that a live one may still ask about: a child that ends with its parent stays while the
    parent lives, a parent while any of its children does. A key is never used again; an id is free again. Between two
    calls a run is there or not; of a large one the newest events may have gone before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from perdure.core.errors import RolledBack
from perdure.core.turn import (
    Announced,
    Announcement,
    Batch,
    Claim,
    Head,
    Key,
    Lease,
    Mail,
    Pruned,
    Query,
    Reaped,
    Retention,
    Row,
    Turn,
    TurnVerdict,
    Verdict,
)


class OpenTransaction(Protocol):
    """A step's transaction: begun and fenced, nothing of it visible to others (promise 13)."""

    @property
    def connection(self) -> Any:
        """What the step's function works with: a `sqlite3.Connection`, a `psycopg.Connection`."""

    @property
    def gone(self) -> RolledBack | None:
        """Why it is over before its commit: the store's limit of time, or somebody's `roll_back`; else None."""

    def commit(self, events: Sequence[str]) -> None:
        """Record these events, from the turn's `first_seq` on, and commit everything.

        `RolledBack` if `roll_back` or the limit of time came first. `StoreError`: whether it is written is not known;
        ask with the same turn again. Any other error is the function's: its work could not be committed.
        """

    def roll_back(self) -> None:
        """End it without a trace, also from another thread while the function runs. Twice is once.

        Once more from the thread that began it, when the function has returned: so its connection is given back.
        """

    def repeats(self, error: BaseException) -> bool:
        """Whether this error, of the function or of `commit`, says that the same work would succeed if done again."""


class Store(Protocol):
    """Where runs are kept."""

    url: str
    """How to open the same store elsewhere, without a password; also what logs print."""

    durability: str
    """`D3` (survives power loss), `D2` (a process crash) or `D1` (memory)."""

    transactions: bool
    """Whether steps and callers can work in one transaction with it; without, `transaction` and `write_on` refuse."""

    rounds: float
    """Seconds between two rounds of housekeeping (`reap`, `overdue`) that suit the store now."""

    def now(self) -> int:
        """The store's clock, in microseconds since the epoch, UTC; a lower bound if it is far away."""

    def elsewhere(self) -> str | None:
        """A URL by which another process opens the same store in the same way; None if none can.

        It holds the password as it is now: not to be shown.
        """

    # --- writing ---

    def write(self, batch: Batch) -> list[Verdict]:
        """Write one batch in one transaction (promises 1 to 6)."""

    def write_at_once(self, batch: Batch) -> list[Verdict]:
        """As `write`, but `StoreLocked` instead of waiting for anybody else who is writing, or for a network."""

    def transaction(self, turn: Turn) -> OpenTransaction | TurnVerdict:
        """Begin a transaction for a step and fence it by this turn, or answer why not (promise 13).

        turn: what the row says after it; without events, starts, sends and consumed mail. Until `commit` or
        `roll_back` nothing else of this process may wait for it in the same thread.
        """

    def write_on(self, connection: Any, batch: Batch) -> list[Verdict]:
        """Write starts and sends inside the caller's own transaction (promise 14). No start in it has an owner.

        `TypeError` for a connection of another kind, `ValueError` for one to another database, or without an open
        transaction where none would begin by itself.
        """

    def prune(self, retention: Retention) -> Pruned:
        """Remove a small batch of ended runs (promise 15)."""

    def claim(self, claim: Claim) -> list[Head]:
        """Take runs, most urgent first (the greatest priority), oldest first among equals (promise 7)."""

    def announce(self, announcement: Announcement) -> Lease:
        """Begin an incarnation: keep what it serves, and make blocked runs of its workflows due now."""

    def heartbeat(self, incarnation: str) -> Lease | None:
        """Say that the incarnation lives; None if it has been reaped. Never waits for the committer."""

    def reap(self, *, limit: int = 1000) -> Reaped:
        """Find dead incarnations and hand at most `limit` of their runs back (promise 9)."""

    def retire(self, incarnation: str) -> int:
        """End an incarnation in peace: hand its runs back at once; how many there were. Twice is once."""

    # --- reading ---

    def history(self, run: Key, after: int = 0) -> list[str]:
        """The stored events with a sequence number above `after`, in order."""

    def histories(self, runs: Sequence[Key]) -> Mapping[Key, list[str]]:
        """All stored events of each of these runs, in order. A run without any may be missing."""

    def mail(self, incarnation: str) -> list[Mail]:
        """Unread mail of all the runs this incarnation owns, by run and position."""

    def mail_is_likely(self, incarnation: str) -> bool:
        """For who has just claimed: whether a look at `mail` is worth its while, as far as the claim has seen."""

    def mailbox(self, run: Key) -> list[Mail]:
        """Unread mail of one run, in order."""

    def owned(self, incarnation: str) -> list[Key]:
        """The runs this incarnation owns, in no order: also those of which its answer was lost on the way."""

    def run(self, namespace: str, id: str) -> Row | None:
        """The newest generation of a public run id."""

    def rows(self, keys: Sequence[Key]) -> list[Row]:
        """The rows of these keys, those that exist, in no order."""

    def ended(self, keys: Sequence[Key]) -> list[Key]:
        """Which of these runs have ended or are quarantined."""

    def counts(self, namespace: str, *, workflow: str | None = None, queue: str | None = None) -> Mapping[str, int]:
        """How many retained runs have each status; only those above zero."""

    def children(self, run: Key) -> list[Row]:
        """The live children and activities of a run, oldest first."""

    def suspects(self, claim: Claim) -> bool:
        """Whether a run with two strikes waits that this claim, if it were `alone`, might take."""

    def overdue(self, *, limit: int = 100) -> list[Row]:
        """Live runs past their `deadline_at`, and unowned ones with three strikes not yet quarantined."""

    def announced(self, namespace: str) -> list[Announced]:
        """Everything any worker of the namespace ever announced; `live` if one that serves it lives now.

        `queues`: from which queues the living ones that serve it take, sorted.
        """

    def worker(self, incarnation: str) -> str | None:
        """A living worker's own name, for people to read; None if it is dead or unknown."""

    # Last of those that answer lists: in annotations below it, `list` would mean this method.
    def list(self, query: Query) -> list[Row]:
        """A page of runs, newest first."""

    # --- waiting ---

    def wait(self, incarnation: str, queues: Sequence[str], timeout: float) -> bool:
        """Block until something may have changed for this incarnation, at most `timeout` seconds.

        What counts: work became claimable (a start, mail for an unowned run, a run handed back, the `wake_at`
        of an unowned run came), mail for a run it owns, or `wake` was called.
        A hint: True may be wrong, and losing every True costs latency only.
        """

    def held_open(self, run: Key) -> bool:
        """Whether somebody's open transaction holds this run's end up, as far as can be seen at this moment."""

    def wake(self) -> None:
        """Make a `wait` in another thread return at once."""

    def close(self) -> None:
        """Give files and connections back. Twice is once."""
