-- name: may_go
-- The next runs of all, by key: [the last of them, how many, whether the last was created too late, those that may go
-- as [key, events, messages]]. Keys grow with time, so one that was created after the time given ends the walk.
-- A child that ends with its parent stays while that lives; so does a parent while a child of it does.
-- (Ended before; namespace, ended before, statuses, workflow, workflow; after, number.)
SELECT max(seen.key), count(*), max(seen.created_at) >= ?, json_group_array(json_array(
    seen.key,
    (SELECT coalesce(max(event.seq), 0) FROM perdure_history AS event INDEXED BY perdure_history_seq
     WHERE event.run = seen.key),
    (SELECT count(*) FROM perdure_mail AS mail INDEXED BY perdure_mail_id WHERE mail.run = seen.key)
)) FILTER (WHERE seen.goes)
FROM (
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
        ) AS goes
    FROM perdure_runs AS run NOT INDEXED
    WHERE run.key > ? ORDER BY run.key LIMIT ?
) AS seen;

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
