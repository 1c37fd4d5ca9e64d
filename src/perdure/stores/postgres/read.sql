-- name: columns
-- One run, in the order of the fields of the fact `Row`.
run.key, run.namespace, run.id, run.generation, run.kind, run.workflow, run.queue, run.priority, run.status, run.owner,
run.epoch, run.version, run.turn, run.created_at, run.started_at, run.ended_at, run.wake_at, run.deadline_at,
run.attempt, run.strikes, run.waits, run.parent,
(SELECT above.id FROM perdure.runs AS above WHERE above.key = run.parent) AS parent_id,
run.parent_step, run.parent_close, run.seed,
coalesce(run.input, (SELECT large.input FROM perdure.inputs AS large WHERE large.run = run.key)) AS input,
run.result, run.error, run.history_events, run.history_bytes, run.language, run.dialect, run.policy, run.tags

-- name: message
-- One message, in the order of the fields of the fact `Mail`.
mail.run, mail.position, mail.id, mail.kind, mail.name, mail.data, mail.at

-- name: rows
-- The rows of a list of keys.
SELECT /* columns */ FROM perdure.runs AS run WHERE run.key = ANY($keys::int8[]);

-- name: newest
-- The newest generation of a public id.
SELECT /* columns */ FROM perdure.runs AS run WHERE run.namespace = $namespace::text AND run.id = $id::text
ORDER BY run.generation DESC LIMIT 1;

-- name: history
-- Events of a run, in order.
SELECT event FROM perdure.history WHERE run = $run::int8 AND seq > $after::int8 ORDER BY seq;

-- name: histories
-- All events of a list of runs.
SELECT run, event FROM perdure.history WHERE run = ANY($keys::int8[]) ORDER BY run, seq;

-- name: mail_of_owner
-- Unread mail of the runs of one incarnation: all of it calls.
SELECT /* message */ FROM perdure.mail AS mail
WHERE mail.calls AND mail.unread
    AND (SELECT run.owner = $incarnation::text FROM perdure.runs AS run WHERE run.key = mail.run)
ORDER BY mail.run, mail.position;

-- name: newest_of_owner
-- The position of the newest unread message of an incarnation's runs.
SELECT max(mail.position) FROM perdure.mail AS mail
WHERE mail.calls AND mail.unread
    AND (SELECT run.owner = $incarnation::text FROM perdure.runs AS run WHERE run.key = mail.run);

-- name: mail_of_runs
-- Unread mail of a list of runs.
SELECT /* message */ FROM perdure.mail AS mail WHERE mail.run = ANY($keys::int8[]) AND mail.unread
ORDER BY mail.run, mail.position;

-- name: held
-- Whether an open transaction holds this run, so that its end has to wait.
SELECT 0 = (
    SELECT count(*) FROM (
        SELECT run.key FROM perdure.runs AS run WHERE run.key = $run::int8 FOR UPDATE OF run SKIP LOCKED
    ) AS free
);

-- name: owned
-- The runs of one incarnation.
SELECT run.key FROM perdure.runs AS run WHERE run.owner = $incarnation::text;

-- name: ended
-- Which runs of a list have ended or are quarantined.
SELECT run.key FROM perdure.runs AS run
WHERE run.key = ANY($keys::int8[]) AND (run.ended_at IS NOT NULL OR run.status = 'quarantined');

-- name: children
-- The live children of a run, oldest first.
SELECT /* columns */ FROM perdure.runs AS run WHERE run.parent = $run::int8 AND run.ended_at IS NULL ORDER BY run.key;

-- name: suspects
-- Whether a run that killed two workers waits for one that serves it.
SELECT EXISTS (
    SELECT 1 FROM perdure.runs AS run
    WHERE run.strikes >= 2 AND run.strikes = 2 AND run.ended_at IS NULL AND run.namespace = $namespace::text
        AND run.due_at <= $now::int8 AND run.queue = ANY($queues::text[])
        AND (run.workflow, run.kind) IN (SELECT * FROM unnest($names::text[], $kinds::text[]))
);

-- name: overdue
-- Live runs past their deadline, and unowned ones that killed three workers.
SELECT /* columns */ FROM perdure.runs AS run WHERE run.key = ANY(ARRAY(
    SELECT late.key FROM (
        SELECT key FROM perdure.runs WHERE deadline_at <= $now::int8 AND ended_at IS NULL
        ORDER BY deadline_at LIMIT $number::int8
    ) AS late
    UNION
    SELECT struck.key FROM (
        SELECT key FROM perdure.runs
        WHERE strikes >= 2 AND strikes >= 3 AND ended_at IS NULL AND owner IS NOT DISTINCT FROM NULL
            AND status <> 'quarantined'
        LIMIT $number::int8
    ) AS struck
))
ORDER BY run.key LIMIT $number::int8;

-- name: workflows
-- The names of workflows that have runs in a namespace: one step of the index for each, not one for each run.
WITH RECURSIVE names (name) AS (
    SELECT min(run.workflow) FROM perdure.runs AS run WHERE run.namespace = $namespace::text
    UNION ALL
    SELECT (
        SELECT min(run.workflow) FROM perdure.runs AS run
        WHERE run.namespace = $namespace::text AND run.workflow > names.name
    )
    FROM names WHERE names.name IS NOT NULL
)
SELECT names.name FROM names WHERE names.name IS NOT NULL;

-- name: page
-- A page of runs, newest first: the newest of each workflow and status, then the newest of these.
SELECT /* columns */ FROM perdure.runs AS run WHERE run.key = ANY(ARRAY(
    SELECT found.key
    FROM unnest($workflows::text[]) AS workflow (name) CROSS JOIN unnest($statuses::text[]) AS status (name)
    CROSS JOIN LATERAL (
        SELECT one.key FROM perdure.runs AS one
        WHERE one.namespace = $namespace::text AND one.workflow = workflow.name AND one.status = status.name
            AND one.key < $below::int8 AND one.created_at > $created_after::int8
            AND one.created_at < $created_before::int8
        ORDER BY one.key DESC LIMIT $number::int8
    ) AS found
    ORDER BY found.key DESC LIMIT $number::int8
))
ORDER BY run.key DESC;

-- name: page_of_children
-- A page of the children of a run, newest first.
SELECT /* columns */ FROM perdure.runs AS run
WHERE run.parent = $parent::int8 AND run.namespace = $namespace::text
    AND run.workflow = ANY($workflows::text[]) AND run.status = ANY($statuses::text[])
    AND run.key < $below::int8 AND run.created_at > $created_after::int8 AND run.created_at < $created_before::int8
ORDER BY run.key DESC LIMIT $number::int8;

-- name: counts
-- Runs by status.
SELECT run.status, count(*) FROM perdure.runs AS run
WHERE run.namespace = $namespace::text AND run.workflow = ANY($workflows::text[]) GROUP BY run.status;

-- name: counts_of_queue
-- Runs of a queue by status.
SELECT run.status, count(*) FROM perdure.runs AS run
WHERE run.namespace = $namespace::text AND run.workflow = ANY($workflows::text[]) AND run.queue = $queue::text
GROUP BY run.status;

-- name: server
-- What a new connection is asked: the server's clock and its own id, whether it may write, how lasting its commits are.
SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::int8, pg_backend_pid(), pg_is_in_recovery(),
    current_setting('default_transaction_read_only'), current_setting('synchronous_commit'), current_setting('fsync'),
    current_setting('server_version_num')::int4, current_setting('server_encoding');

-- name: home
-- Which store this is: a copy of its database has the same id elsewhere, or on a server that began at another time.
SELECT id, (SELECT oid::bigint FROM pg_database WHERE datname = current_database()),
    (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint
FROM perdure.store;
