"""The facts that cross the store contract: what a process asks a store to write, and what the store answers.

All of them are frozen and hold plain values; times are microseconds since the epoch, UTC. Payloads and
events are JSON text that the codec has already judged: a store never looks inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

Key = int
"""A run inside one store, given by the store at its start; no event and no reader sees it."""


class _Fact(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A fact; built by name, never changed. It holds no cycle, so the collector need not look at it."""


# --- asked for ----------------------------------------------------------------------------------------


class ParentLink(_Fact, frozen=True, kw_only=True):
    """Which step of which run a child or activity belongs to."""

    run: Key
    step: str


class Start(_Fact, frozen=True, kw_only=True):
    """A new run. Written with its `started` event, or answered by what is already there.

    if_exists: `use` (the existing run, whatever its status; another workflow or digest is a conflict) or
        `fail`. With a parent: a run that is not this parent's own under the id is `child_ended` (RunExists)
        in the parent's mailbox if `awaited`, else only an answer.
    idempotency_key: unique per (namespace, `idempotency_scope`) until `idempotency_until`; the same key with
        another digest is a conflict.
    owner: the incarnation that starts it embedded (epoch 1, status `running`), else None (status `ready`, or
        `scheduled` with a `start_at` in the future).
    event: the stored `started` event, empty for an activity, which has no history.
    """

    namespace: str
    id: str
    workflow: str
    input: str
    digest: str
    seed: str
    event: str
    kind: str = "workflow"
    queue: str = "default"
    priority: int = 0
    start_at: int | None = None
    deadline_at: int | None = None
    parent: ParentLink | None = None
    parent_close: str = "cancel"
    awaited: bool = True
    if_exists: str = "use"
    idempotency_scope: str = ""
    idempotency_key: str | None = None
    idempotency_until: int | None = None
    owner: str | None = None
    language: str = ""
    dialect: str = "named/1"
    policy: str = ""
    tags: str = ""


class Address(_Fact, frozen=True, kw_only=True):
    """The newest generation of a public run id."""

    namespace: str
    id: str


class Send(_Fact, frozen=True, kw_only=True):
    """A message for a run's mailbox, idempotent by (run, id).

    to: a key, a public address, or a parent link (the child that this step of this run started).
    kind: `signal`, `cancel`, `child_ended`, `activity_ended`. data: JSON text.
    limit: unread messages the mailbox may hold; None for messages of the engine itself, which always fit.
    """

    to: Key | Address | ParentLink
    id: str
    kind: str
    name: str = ""
    data: str = "null"
    limit: int | None = None


class Turn(_Fact, frozen=True, kw_only=True):
    """One commit of a run: all of it or nothing, and only if its fence holds.

    The fence: `owner`, `epoch`, `version` and `last` (the id of the turn before) must all match in the
    statement that writes. owner None: an end without code, made by whoever acts: matched by epoch, version
    and last alone, raises the epoch, takes the run from its owner.
    first_seq: sequence number of the first event (they are counted from 1); events: their stored forms.
    consumed: ids of mail this commit takes out of the mailbox.
    status, wake_at, waits: written as they are; an ended status gives the owner up by itself.
    closing: True if the status ends the run: newer unread mail, not in `consumed`, answers `MoreMail` unless
        `forced`.
    release: give the owner up with this commit.
    progress: True if an outcome is recorded, a step's or the run's: clears the strikes. strike: True adds one (code
        that did not rest).
    starts: children and activities; sends: messages to other runs. Both take effect only with the turn, and
        a send that finds no live run is no failure of the turn.
    """

    run: Key
    owner: str | None
    epoch: int
    version: int
    last: str
    id: str
    first_seq: int
    events: Sequence[str] = ()
    consumed: Sequence[str] = ()
    status: str
    wake_at: int | None = None
    waits: str = ""
    closing: bool = False
    forced: bool = False
    release: bool = False
    progress: bool = False
    strike: bool = False
    result: str | None = None
    error: str | None = None
    starts: Sequence[Start] = ()
    sends: Sequence[Send] = ()
    attempt: int | None = None


class Batch(_Fact, frozen=True, kw_only=True):
    """What one process writes in one transaction. No two starts in it share an id or an idempotency key.

    by: the incarnation that writes, if it looks for mail to its own runs by itself, right after: nobody else waits
        for such mail, so nobody is woken for it.
    """

    starts: Sequence[Start] = ()
    sends: Sequence[Send] = ()
    turns: Sequence[Turn] = ()
    by: str | None = None


class Claim(_Fact, frozen=True, kw_only=True):
    """Work wanted: at most `limit` runs whose histories and mail together stay near `max_bytes` (one always fits).

    alone: also runs with two strikes, which must be executed with nothing beside them (one such run at most,
        and then nothing else, comes back); without it they are passed over. Runs with three are never claimed.
    only_suspects: nothing but one run with two strikes, whatever waits before it: for a process of its own.
    """

    incarnation: str
    namespace: str
    queues: Sequence[str]
    workflows: Sequence[str]
    activities: Sequence[str] = ()
    limit: int = 100
    max_bytes: int = 32_000_000
    alone: bool = False
    only_suspects: bool = False


class Announced(_Fact, frozen=True, kw_only=True):
    """A workflow or activity that a worker serves, with what a client without its code needs to start it.

    queue: where its runs go unless told otherwise. live, queues: answered, whether any living worker serves it, and
    the queues from which those take.
    """

    name: str
    kind: str = "workflow"
    queue: str = "default"
    signature: Any = None
    live: bool = True
    queues: Sequence[str] = ()


class Announcement(_Fact, frozen=True, kw_only=True):
    """A worker's one row, written at its start."""

    incarnation: str
    name: str
    namespace: str
    queues: Sequence[str]
    serves: Sequence[Announced]
    ttl: int


class Query(_Fact, frozen=True, kw_only=True):
    """A page of runs, newest first. cursor: the key of the last run of the page before."""

    namespace: str
    workflow: str | None = None
    status: str | None = None
    parent: Key | None = None
    created_after: int | None = None
    created_before: int | None = None
    limit: int = 50
    cursor: Key | None = None


class Retention(_Fact, frozen=True, kw_only=True):
    """Ended runs that need not be kept any longer, and how much of that one call does.

    ended_before: microseconds; statuses: ended ones, none for all of them. workflow: only runs of it.
    limit: runs removed at most; a call also removes about 1,000 events at most, so that nobody waits long for it.
    after: the key after which to look, 0 to begin; `Pruned` says where to go on. dry_run: only count.
    """

    namespace: str
    ended_before: int
    statuses: Sequence[str] = ()
    workflow: str | None = None
    limit: int = 100
    after: Key = 0
    dry_run: bool = False


# --- answered -----------------------------------------------------------------------------------------


class Begun(_Fact, frozen=True, kw_only=True):
    """The start wrote a new run (or found its own row, by the seed, after a lost acknowledgement)."""

    run: Key
    id: str
    epoch: int
    version: int
    at: int


class Existing(_Fact, frozen=True, kw_only=True):
    """The id or idempotency key already belongs to this run, with the same workflow and input."""

    run: Key
    id: str


class Conflict(_Fact, frozen=True, kw_only=True):
    """The id or key belongs to a run of another workflow or with another input."""

    id: str
    key: str | None = None


class Taken(_Fact, frozen=True, kw_only=True):
    """`if_exists="fail"`, and there is such a run."""

    id: str


class Kept(_Fact, frozen=True, kw_only=True):
    """The message is in the mailbox."""

    run: Key


class Duplicate(_Fact, frozen=True, kw_only=True):
    """A message of this id was kept before."""

    run: Key


class Finished(_Fact, frozen=True, kw_only=True):
    """The run has ended with this status; nothing was kept."""

    run: Key
    status: str


class NotFound(_Fact, frozen=True, kw_only=True):
    """No such run."""


class MailboxFull(_Fact, frozen=True, kw_only=True):
    run: Key
    limit: int


class Committed(_Fact, frozen=True, kw_only=True):
    """The turn is written."""

    run: Key


class Fenced(_Fact, frozen=True, kw_only=True):
    """Somebody else has the run now: drop it, write nothing, log no error."""

    run: Key


class MoreMail(_Fact, frozen=True, kw_only=True):
    """The run would have ended with mail its code has not seen: nothing was written."""

    run: Key


class Busy(_Fact, frozen=True, kw_only=True):
    """Somebody's open transaction holds the item up: nothing was written, try again in 50 ms.

    A sender's does so to the end of its run, and one that has written the same id, key or message to a start or a
    message. run: the turn's; 0 for those.
    """

    run: Key


class Unstorable(_Fact, frozen=True, kw_only=True):
    """The store refused this turn's data: our bug; the run's neighbours are written."""

    run: Key
    reason: str


StartVerdict = Begun | Existing | Conflict | Taken | Busy
SendVerdict = Kept | Duplicate | Finished | NotFound | MailboxFull | Busy
TurnVerdict = Committed | Fenced | MoreMail | Busy | Unstorable
Verdict = StartVerdict | SendVerdict | TurnVerdict


class Mail(_Fact, frozen=True, kw_only=True):
    """An unread message. position: its place in the mailbox, growing in order of acceptance."""

    run: Key
    position: int
    id: str
    kind: str
    name: str
    data: str
    at: int


class Row(_Fact, frozen=True, kw_only=True):
    """Everything a store knows of a run without its history. waits, input, result, error, policy: JSON text."""

    key: Key
    namespace: str
    id: str
    generation: int
    kind: str
    workflow: str
    queue: str
    priority: int
    status: str
    owner: str | None
    epoch: int
    version: int
    turn: str
    created_at: int
    started_at: int | None
    ended_at: int | None
    wake_at: int | None
    deadline_at: int | None
    attempt: int
    strikes: int
    waits: str
    parent: Key | None
    parent_id: str | None
    parent_step: str | None
    parent_close: str
    seed: str
    input: str
    result: str | None
    error: str | None
    history_events: int
    history_bytes: int
    language: str
    dialect: str
    policy: str
    tags: str


class Head(_Fact, frozen=True, kw_only=True):
    """A claimed run: its row as the claim left it (owner, epoch, `running`), and its unread mail in order."""

    row: Row
    mail: Sequence[Mail] = ()


class Lease(_Fact, frozen=True, kw_only=True):
    """A heartbeat was kept: the lease runs until `until`, by the store's clock, which says `now`."""

    now: int
    until: int


class Reaped(_Fact, frozen=True, kw_only=True):
    """Workers found dead, and runs handed back."""

    workers: int = 0
    runs: int = 0


class Pruned(_Fact, frozen=True, kw_only=True):
    """What one call of `prune` did: runs removed (or counted). after: where the next call goes on; None: at the end."""

    runs: int = 0
    after: Key | None = None
