-- name: may_go
-- The next runs of all, by key, and of each whether it may go, its events and its messages. Keys grow with time. A child
-- that ends with its parent stays while that lives; so does a parent while a child of it does.
-- (Namespace, ended before, statuses, workflow; after, number.)
SELECT run.key, run.created_at,
    run.namespace = ?
    AND run.ended_at IS NOT NULL AND run.ended_at < ?
    AND run.status IN (SELECT value FROM json_each(?))
    AND run.workflow = coalesce(?, run.workflow)
    AND NOT EXISTS (
        SELECT 1 FROM perdure_runs AS above
        WHERE above.key = run.parent AND above.ended_at IS NULL AND run.parent_close = 'cancel'
    )
    AND NOT EXISTS (
        SELECT 1 FROM perdure_runs AS below INDEXED BY perdure_runs_parent
        WHERE below.parent = run.key AND below.ended_at IS NULL
    ),
    (SELECT coalesce(max(event.seq), 0) FROM perdure_history AS event INDEXED BY perdure_history_seq
     WHERE event.run = run.key),
    (SELECT count(*) FROM perdure_mail AS mail INDEXED BY perdure_mail_id WHERE mail.run = run.key)
FROM perdure_runs AS run NOT INDEXED
WHERE run.key > ? ORDER BY run.key LIMIT ?;

-- name: forget_events
-- Remove the newest events of one run. (Run, all after this.)
DELETE FROM perdure_history INDEXED BY perdure_history_seq WHERE run = ? AND seq > ?;

-- name: forget_messages
-- Remove some messages of one run. (Run, run, number.)
DELETE FROM perdure_mail INDEXED BY perdure_mail_id WHERE run = ? AND +position IN (
    SELECT some.position FROM perdure_mail AS some INDEXED BY perdure_mail_id WHERE some.run = ? LIMIT ?
);

-- name: forget_histories
-- The histories of a list of runs.
DELETE FROM perdure_history INDEXED BY perdure_history_seq WHERE run IN (SELECT value FROM json_each(?));

-- name: forget_mail
-- All their messages.
DELETE FROM perdure_mail INDEXED BY perdure_mail_id WHERE run IN (SELECT value FROM json_each(?));

-- name: forget_inputs
-- Their large inputs.
DELETE FROM perdure_inputs WHERE run IN (SELECT value FROM json_each(?));

-- name: forget_keys
-- The idempotency keys that began them.
DELETE FROM perdure_idempotency INDEXED BY perdure_idempotency_run WHERE run IN (SELECT value FROM json_each(?));

-- name: forget_runs
-- Their rows.
DELETE FROM perdure_runs WHERE key IN (SELECT value FROM json_each(?));
