-- readable by: 1
-- (The first version of the tables, by its number, whose processes may go on beside this one: a rolling deploy.)
-- The tables of a Perdure store, in a schema of their own. `perdure.` stands for that schema, whatever its name.
-- Times are microseconds since the epoch, UTC. Text is compared byte by byte (COLLATE "C"): quicker, and no upgrade of
-- the system's locales can put an index out of order.

-- One row per run (an activity is a run without a history). `due_at` says when a claim may take the run: null while it
-- is owned, over or put aside, 0 for now, else its next timer. An input over 1,000 characters is kept beside, in
-- inputs, and null here, since every turn writes its whole row anew.
--
-- Fillfactor 45: two of three turns find room for the new row beside the old one and touch no index. Dead rows are
-- taken away early, or a busy table would grow with its turns.
CREATE SEQUENCE perdure.keys AS bigint;
CREATE TABLE perdure.runs (
    key bigint NOT NULL PRIMARY KEY,
    epoch bigint NOT NULL,
    version bigint NOT NULL,
    due_at bigint,
    created_at bigint NOT NULL,
    started_at bigint,
    ended_at bigint,
    wake_at bigint,
    deadline_at bigint,
    lease_until bigint,
    parent bigint,
    history_bytes bigint NOT NULL,
    history_events integer NOT NULL,
    generation integer NOT NULL,
    priority integer NOT NULL,
    attempt integer NOT NULL,
    strikes integer NOT NULL,
    namespace text COLLATE "C" NOT NULL,
    id text COLLATE "C" NOT NULL,
    kind text COLLATE "C" NOT NULL,
    workflow text COLLATE "C" NOT NULL,
    queue text COLLATE "C" NOT NULL,
    status text COLLATE "C" NOT NULL,
    owner text COLLATE "C",
    turn text COLLATE "C" NOT NULL,
    parent_step text COLLATE "C",
    parent_close text COLLATE "C" NOT NULL,
    seed text COLLATE "C" NOT NULL,
    digest text COLLATE "C" NOT NULL,
    language text COLLATE "C" NOT NULL,
    dialect text COLLATE "C" NOT NULL,
    policy text COLLATE "C" NOT NULL,
    tags text COLLATE "C" NOT NULL,
    limits text COLLATE "C" NOT NULL DEFAULT '',
    waits text COLLATE "C" NOT NULL DEFAULT '',
    input text COLLATE "C",
    result text COLLATE "C",
    error text COLLATE "C"
) WITH (
    fillfactor = 45,
    autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
    autovacuum_analyze_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0
);

-- A public id; its newest generation is the last entry.
CREATE UNIQUE INDEX runs_id ON perdure.runs (namespace, id, generation);

-- What can be claimed, now (due_at = 0, most urgent first, oldest first among equals) or later (by due_at).
CREATE INDEX runs_due ON perdure.runs (namespace, queue, workflow, kind, due_at, priority DESC, key)
    WHERE due_at IS NOT NULL;

-- What an incarnation owns: for handing it back.
CREATE INDEX runs_owner ON perdure.runs (owner) WHERE owner IS NOT NULL;

-- Lists and counts.
CREATE INDEX runs_status ON perdure.runs (namespace, workflow, status, key);

-- Children by their parent's step.
CREATE INDEX runs_parent ON perdure.runs (parent, parent_step) WHERE parent IS NOT NULL;

-- Live runs with a deadline, and those that are executed alone or may have to be quarantined.
CREATE INDEX runs_deadline ON perdure.runs (deadline_at) WHERE deadline_at IS NOT NULL AND ended_at IS NULL;
CREATE INDEX runs_struck ON perdure.runs (strikes) WHERE strikes >= 2 AND ended_at IS NULL;

CREATE TABLE perdure.inputs (
    run bigint NOT NULL PRIMARY KEY,
    input text COLLATE "C" NOT NULL
);

-- The events of all runs, only ever appended; not clustered by run, so that a batch writes to one end of the table.
CREATE TABLE perdure.history (
    run bigint NOT NULL,
    seq integer NOT NULL,
    event text COLLATE "C" NOT NULL
);
CREATE UNIQUE INDEX history_seq ON perdure.history (run, seq);

-- Messages. A consumed one stays, emptied, until its run is pruned: its id decides what is a duplicate.
-- `calls`: its run's owner, or whoever may claim the run, may not have heard of it yet. A sender never writes the
-- run's row, so the message itself has to wake the run: it calls until it is consumed, or until `settle` has seen that
-- its run is due or must sleep on. Few messages call at any moment, however many are unread.
CREATE SEQUENCE perdure.positions AS bigint;
CREATE TABLE perdure.mail (
    position bigint NOT NULL,
    run bigint NOT NULL,
    at bigint NOT NULL,
    unread boolean NOT NULL,
    calls boolean NOT NULL,
    id text COLLATE "C" NOT NULL,
    kind text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    data text COLLATE "C" NOT NULL
) WITH (
    fillfactor = 70,
    autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 1000,
    autovacuum_analyze_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0
);
CREATE UNIQUE INDEX mail_id ON perdure.mail (run, id);
CREATE INDEX mail_unread ON perdure.mail (run) WHERE unread;
CREATE INDEX mail_calls ON perdure.mail (run) WHERE calls;

-- Which run an idempotency key began; expires_at null: while the run is kept.
CREATE TABLE perdure.idempotency (
    namespace text COLLATE "C" NOT NULL,
    scope text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    run bigint NOT NULL,
    expires_at bigint,
    PRIMARY KEY (namespace, scope, key)
);
CREATE INDEX idempotency_run ON perdure.idempotency (run);
CREATE INDEX idempotency_expiry ON perdure.idempotency (expires_at) WHERE expires_at IS NOT NULL;

-- Incarnations. dead: 0 lives, 1 died not long ago and may still own runs, 2 is long dead. backend, backend_start: the
-- connection it lives by, as pg_stat_activity shows it; null where it has none. A dead one stays, so that it stays dead.
CREATE TABLE perdure.workers (
    incarnation text COLLATE "C" NOT NULL PRIMARY KEY,
    name text COLLATE "C" NOT NULL,
    namespace text COLLATE "C" NOT NULL,
    queues text COLLATE "C" NOT NULL,
    serves text COLLATE "C" NOT NULL,
    ttl bigint NOT NULL,
    announced_at bigint NOT NULL,
    beat_at bigint NOT NULL,
    backend integer,
    backend_start timestamptz,
    dead integer NOT NULL DEFAULT 0,
    dead_at bigint
) WITH (fillfactor = 50);
CREATE INDEX workers_dead ON perdure.workers (dead) WHERE dead < 2;

-- Every workflow and activity that anybody ever announced, as it was announced last.
CREATE TABLE perdure.served (
    namespace text COLLATE "C" NOT NULL,
    kind text COLLATE "C" NOT NULL,
    name text COLLATE "C" NOT NULL,
    queue text COLLATE "C" NOT NULL,
    signature text COLLATE "C" NOT NULL,
    announced_at bigint NOT NULL,
    PRIMARY KEY (namespace, kind, name)
);

-- What a step's transaction owes: its record. The constraint is looked at when a transaction ends, and no migration has
-- the number 0: so nobody can commit a step's effect but together with its record, which takes this row away again.
CREATE TABLE perdure.pledges (
    run bigint NOT NULL PRIMARY KEY,
    kept integer NOT NULL CONSTRAINT a_step_is_committed_with_its_record REFERENCES perdure.migrations (number)
        DEFERRABLE INITIALLY DEFERRED
) WITH (fillfactor = 50);

-- Which store this is: one row, so that a caller's connection can be told from one to another database.
CREATE TABLE perdure.store (id text COLLATE "C" NOT NULL PRIMARY KEY);
INSERT INTO perdure.store VALUES (gen_random_uuid()::text);
