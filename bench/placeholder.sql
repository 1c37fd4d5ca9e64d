-- The floor's tables until the engine's own can be watched: the row of a run and the history of core.md 5.
CREATE TABLE perdure_runs (
    key INTEGER PRIMARY KEY, namespace TEXT NOT NULL, id TEXT NOT NULL, generation INTEGER NOT NULL,
    kind TEXT NOT NULL, workflow TEXT NOT NULL, language TEXT NOT NULL, dialect TEXT NOT NULL,
    status TEXT NOT NULL, queue TEXT NOT NULL, priority INTEGER NOT NULL, owner TEXT, epoch INTEGER NOT NULL,
    version INTEGER NOT NULL, turn TEXT, lease_until INTEGER, wake_at INTEGER, deadline_at INTEGER,
    attempt INTEGER NOT NULL, strikes INTEGER NOT NULL, waits TEXT, parent INTEGER, parent_step TEXT, seed BLOB NOT NULL,
    input TEXT, result TEXT, created_at INTEGER NOT NULL, started_at INTEGER, ended_at INTEGER
);
CREATE UNIQUE INDEX perdure_runs_id ON perdure_runs (namespace, id, generation);
CREATE INDEX perdure_runs_ready ON perdure_runs (namespace, queue, workflow, priority, wake_at) WHERE status = 'ready';
CREATE INDEX perdure_runs_owner ON perdure_runs (owner) WHERE owner IS NOT NULL;
CREATE INDEX perdure_runs_wake ON perdure_runs (wake_at) WHERE wake_at IS NOT NULL;
CREATE INDEX perdure_runs_parent ON perdure_runs (parent) WHERE parent IS NOT NULL;
CREATE TABLE perdure_history (
    run INTEGER NOT NULL, seq INTEGER NOT NULL, at INTEGER NOT NULL, kind TEXT NOT NULL, step TEXT, body TEXT NOT NULL
);
CREATE UNIQUE INDEX perdure_history_seq ON perdure_history (run, seq);
