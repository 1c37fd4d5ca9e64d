-- name: columns
-- One run as JSON, with the names of the fact `Row`.
json_object(
    'key', run.key, 'namespace', run.namespace, 'id', run.id, 'generation', run.generation, 'kind', run.kind,
    'workflow', run.workflow, 'queue', run.queue, 'priority', run.priority, 'status', run.status,
    'owner', run.owner, 'epoch', run.epoch, 'version', run.version, 'turn', run.turn,
    'created_at', run.created_at, 'started_at', run.started_at, 'ended_at', run.ended_at,
    'wake_at', run.wake_at, 'deadline_at', run.deadline_at, 'attempt', run.attempt, 'strikes', run.strikes,
    'waits', run.waits, 'parent', run.parent,
    'parent_id', (SELECT above.id FROM perdure_runs AS above WHERE above.key = run.parent),
    'parent_step', run.parent_step, 'parent_close', run.parent_close, 'seed', run.seed,
    'input', coalesce(run.input, (SELECT large.input FROM perdure_inputs AS large WHERE large.run = run.key)),
    'result', run.result, 'error', run.error,
    'history_events', run.history_events, 'history_bytes', run.history_bytes,
    'language', run.language, 'dialect', run.dialect, 'policy', run.policy, 'tags', run.tags
)

-- name: message
-- One unread message as JSON, with the names of the fact `Mail`.
json_object(
    'run', mail.run, 'position', mail.position, 'id', mail.id, 'kind', mail.kind, 'name', mail.name,
    'data', mail.data, 'at', mail.at
)

-- name: rows
-- The rows of a list of keys.
SELECT json_group_array(/* columns */) FROM perdure_runs AS run WHERE run.key IN (SELECT value FROM json_each(?));

-- name: newest
-- The newest generation of a public id.
SELECT /* columns */ FROM perdure_runs AS run WHERE run.namespace = ? AND run.id = ?
ORDER BY run.generation DESC LIMIT 1;

-- name: history
-- Events of a run, in order, as one text: no JSON text holds a record separator (30). Reading them one by one would
-- give up the GIL for each. (Run, after, number.)
SELECT count(*), group_concat(event, char(30)) FROM (
    SELECT event FROM perdure_history INDEXED BY perdure_history_seq
    WHERE run = ? AND seq > ? ORDER BY seq LIMIT ?
);

-- name: mail_of_owner
-- Unread mail of the runs of one incarnation.
SELECT json_group_array(/* message */) FROM perdure_mail AS mail INDEXED BY perdure_mail_owner
WHERE mail.owner = ? AND mail.unread = 1;

-- name: newest_of_owner
-- The position of the newest unread message of an incarnation's runs.
SELECT max(position) FROM perdure_mail INDEXED BY perdure_mail_owner WHERE owner = ? AND unread = 1;

-- name: mail_of_runs
-- Unread mail of a list of runs.
SELECT json_group_array(/* message */) FROM perdure_mail AS mail INDEXED BY perdure_mail_unread
WHERE mail.unread = 1 AND mail.run IN (SELECT value FROM json_each(?));

-- name: owned
-- The runs of one incarnation.
SELECT json_group_array(key) FROM perdure_runs INDEXED BY perdure_runs_owner WHERE owner = ?;

-- name: ended
-- Which runs of a list have ended or are quarantined.
SELECT json_group_array(key) FROM perdure_runs
WHERE key IN (SELECT value FROM json_each(?)) AND (ended_at IS NOT NULL OR status = 'quarantined');

-- name: children
-- The live children of a run, oldest first.
SELECT json_group_array(/* columns */) FROM (
    SELECT * FROM perdure_runs INDEXED BY perdure_runs_parent WHERE parent = ? AND ended_at IS NULL ORDER BY key
) AS run;

-- name: suspects
-- Whether a run that killed two workers waits for one that serves it. (Namespace, now, queues, pairs of name and kind.)
SELECT EXISTS (
    SELECT 1 FROM perdure_runs AS run INDEXED BY perdure_runs_struck
    WHERE run.strikes >= 2 AND run.strikes = 2 AND run.ended_at IS NULL AND +run.namespace = ?
        AND +run.due_at IS NOT NULL AND +run.due_at <= ?
        AND +run.queue IN (SELECT value FROM json_each(?))
        AND EXISTS (
            SELECT 1 FROM json_each(?) AS served
            WHERE run.workflow = json_extract(served.value, '$[0]') AND run.kind = json_extract(served.value, '$[1]')
        )
);

-- name: overdue
-- Live runs past their deadline, and unowned ones that killed three workers. (Now, number, number, number.)
SELECT json_group_array(/* columns */) FROM (
    SELECT * FROM perdure_runs NOT INDEXED WHERE key IN (
        SELECT key FROM (
            SELECT key FROM perdure_runs INDEXED BY perdure_runs_deadline
            WHERE deadline_at <= ? AND ended_at IS NULL ORDER BY deadline_at LIMIT ?
        )
        UNION
        SELECT key FROM (
            SELECT key FROM perdure_runs INDEXED BY perdure_runs_struck
            WHERE strikes >= 2 AND strikes >= 3 AND ended_at IS NULL AND +owner IS NULL AND +status <> 'quarantined' LIMIT ?
        )
    )
    ORDER BY key LIMIT ?
) AS run;

-- name: workflows
-- The names of workflows that have runs in a namespace: one step of the index for each, not one for each run.
-- (Namespace, namespace.)
WITH RECURSIVE names (name) AS (
    SELECT * FROM (SELECT workflow FROM perdure_runs INDEXED BY perdure_runs_status
        WHERE namespace = ? ORDER BY workflow LIMIT 1)
    UNION ALL
    SELECT (
        SELECT workflow FROM perdure_runs INDEXED BY perdure_runs_status
        WHERE namespace = ? AND workflow > names.name ORDER BY workflow LIMIT 1
    )
    FROM names WHERE names.name IS NOT NULL
)
SELECT json_group_array(name) FROM names WHERE name IS NOT NULL;

-- name: page
-- A page of runs, newest first: the newest of each workflow and status, then the newest of these. (Workflows,
-- statuses; namespace, below this key, created after, created before, number; number.)
SELECT json_group_array(/* columns */) FROM (
    SELECT found.* FROM json_each(?) AS workflow CROSS JOIN json_each(?) AS status CROSS JOIN perdure_runs AS found NOT INDEXED
    WHERE found.key IN (
        SELECT one.key FROM perdure_runs AS one INDEXED BY perdure_runs_status
        WHERE one.namespace = ? AND one.workflow = workflow.value AND one.status = status.value
            AND one.key < ? AND one.created_at > ? AND one.created_at < ?
        ORDER BY one.key DESC LIMIT ?
    )
    ORDER BY found.key DESC LIMIT ?
) AS run;

-- name: page_of_children
-- A page of the children of a run, newest first. (Parent, namespace, workflows, statuses, below this key, created
-- after, created before, number.)
SELECT json_group_array(/* columns */) FROM (
    SELECT * FROM perdure_runs INDEXED BY perdure_runs_parent
    WHERE parent = ? AND +namespace = ?
        AND +workflow IN (SELECT value FROM json_each(?)) AND +status IN (SELECT value FROM json_each(?))
        AND key < ? AND created_at > ? AND created_at < ?
    ORDER BY key DESC LIMIT ?
) AS run;

-- name: counts
-- Runs by status. (Namespace, workflows.)
SELECT status, count(*) FROM perdure_runs INDEXED BY perdure_runs_status
WHERE namespace = ? AND workflow IN (SELECT value FROM json_each(?)) GROUP BY status;

-- name: counts_of_queue
-- Runs of a queue by status. (Namespace, workflows, queue.)
SELECT status, count(*) FROM perdure_runs INDEXED BY perdure_runs_status
WHERE namespace = ? AND workflow IN (SELECT value FROM json_each(?)) AND queue = ? GROUP BY status;
