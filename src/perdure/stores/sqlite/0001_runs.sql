-- The tables of a Perdure store. All names begin with perdure_, so that they may stand in a user's own database.
-- Columns are TEXT, INTEGER or BLOB; times are microseconds since the epoch, UTC.

-- One row per run (an activity is a run without a history). AUTOINCREMENT: a key is never used again, also after its
-- run was pruned. `due_at` says when a claim may take the run: null while it is owned, over or put aside, 0 for now,
-- else its next timer. An input over 1,000 characters is kept beside, in perdure_inputs, and null here, since
-- every turn writes its whole row anew.
CREATE TABLE perdure_runs (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    namespace TEXT NOT NULL,
    id TEXT NOT NULL,
    generation INTEGER NOT NULL,
    kind TEXT NOT NULL,
    workflow TEXT NOT NULL,
    queue TEXT NOT NULL,
    priority INTEGER NOT NULL,
    status TEXT NOT NULL,
    owner TEXT,
    epoch INTEGER NOT NULL,
    version INTEGER NOT NULL,
    turn TEXT NOT NULL,
    lease_until INTEGER,
    due_at INTEGER,
    created_at INTEGER NOT NULL,
    started_at INTEGER,
    ended_at INTEGER,
    wake_at INTEGER,
    deadline_at INTEGER,
    attempt INTEGER NOT NULL,
    strikes INTEGER NOT NULL,
    parent INTEGER,
    parent_step TEXT,
    parent_close TEXT NOT NULL,
    history_events INTEGER NOT NULL,
    history_bytes INTEGER NOT NULL,
    seed TEXT NOT NULL,
    digest TEXT NOT NULL,
    language TEXT NOT NULL,
    dialect TEXT NOT NULL,
    policy TEXT NOT NULL,
    tags TEXT NOT NULL,
    limits TEXT NOT NULL DEFAULT '',
    waits TEXT NOT NULL DEFAULT '',
    input TEXT,
    result TEXT,
    error TEXT
);

-- A public id; its newest generation is the last entry.
CREATE UNIQUE INDEX perdure_runs_id ON perdure_runs (namespace, id, generation);

-- What can be claimed, now (due_at = 0, most urgent first, oldest first among equals) or later (by due_at).
CREATE INDEX perdure_runs_due ON perdure_runs (namespace, queue, workflow, kind, due_at, priority DESC, key, strikes)
    WHERE due_at IS NOT NULL;

-- What an incarnation owns: for handing it back.
CREATE INDEX perdure_runs_owner ON perdure_runs (owner) WHERE owner IS NOT NULL;

-- Lists and counts.
CREATE INDEX perdure_runs_status ON perdure_runs (namespace, workflow, status);

-- Children by their parent's step.
CREATE INDEX perdure_runs_parent ON perdure_runs (parent, parent_step) WHERE parent IS NOT NULL;

-- Live runs with a deadline, and those that are executed alone or may have to be quarantined.
CREATE INDEX perdure_runs_deadline ON perdure_runs (deadline_at) WHERE deadline_at IS NOT NULL AND ended_at IS NULL;
CREATE INDEX perdure_runs_struck ON perdure_runs (strikes) WHERE strikes >= 2 AND ended_at IS NULL;

CREATE TABLE perdure_inputs (
    run INTEGER PRIMARY KEY,
    input TEXT NOT NULL
);

-- The events of all runs, only ever appended; not clustered by run, so that a batch writes to one end of the table.
CREATE TABLE perdure_history (
    run INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    event TEXT NOT NULL
);
CREATE UNIQUE INDEX perdure_history_seq ON perdure_history (run, seq);

-- Messages. A consumed one stays, emptied, until its run is pruned: its id decides what is a duplicate.
-- `owner` is the run's, while the message is unread: so an owner finds its mail without looking at its runs.
CREATE TABLE perdure_mail (
    position INTEGER PRIMARY KEY,
    run INTEGER NOT NULL,
    id TEXT NOT NULL,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    data TEXT NOT NULL,
    at INTEGER NOT NULL,
    unread INTEGER NOT NULL,
    owner TEXT
);
CREATE UNIQUE INDEX perdure_mail_id ON perdure_mail (run, id);
CREATE INDEX perdure_mail_unread ON perdure_mail (run) WHERE unread = 1;
CREATE INDEX perdure_mail_owner ON perdure_mail (owner) WHERE unread = 1 AND owner IS NOT NULL;

-- Which run an idempotency key began; expires_at null: while the run is kept.
CREATE TABLE perdure_idempotency (
    namespace TEXT NOT NULL,
    scope TEXT NOT NULL,
    key TEXT NOT NULL,
    run INTEGER NOT NULL,
    expires_at INTEGER,
    PRIMARY KEY (namespace, scope, key)
) WITHOUT ROWID;
CREATE INDEX perdure_idempotency_run ON perdure_idempotency (run);
CREATE INDEX perdure_idempotency_expiry ON perdure_idempotency (expires_at) WHERE expires_at IS NOT NULL;

-- Incarnations. dead: 0 lives, 1 is dead and may still own runs, 2 is dead and owns none. slot: its place in the
-- file of beats; locked: whether it holds a lock on that place. A dead one stays, so that it stays dead.
CREATE TABLE perdure_workers (
    incarnation TEXT NOT NULL PRIMARY KEY,
    name TEXT NOT NULL,
    namespace TEXT NOT NULL,
    queues TEXT NOT NULL,
    serves TEXT NOT NULL,
    ttl INTEGER NOT NULL,
    slot INTEGER,
    locked INTEGER NOT NULL,
    announced_at INTEGER NOT NULL,
    dead INTEGER NOT NULL DEFAULT 0,
    dead_at INTEGER
) WITHOUT ROWID;
CREATE INDEX perdure_workers_dead ON perdure_workers (dead);

-- Every workflow and activity that anybody ever announced, as it was announced last.
CREATE TABLE perdure_served (
    namespace TEXT NOT NULL,
    kind TEXT NOT NULL,
    name TEXT NOT NULL,
    queue TEXT NOT NULL,
    signature TEXT NOT NULL,
    announced_at INTEGER NOT NULL,
    PRIMARY KEY (namespace, kind, name)
) WITHOUT ROWID;
