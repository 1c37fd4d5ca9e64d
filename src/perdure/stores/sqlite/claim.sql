-- name: claimable
-- What a claim may take, most urgent first, oldest first among equals: for each queue and served name the head of its
-- ready runs and of its timers that have come, so that a long line behind them costs nothing.
-- (Queues; pairs of name and kind as JSON; namespace, strikes, number; namespace, now, strikes, number; number.)
SELECT json_group_array(json_array(key, strikes, history_bytes, (
    SELECT coalesce(sum(length(CAST(mail.data AS BLOB))), 0) FROM perdure_mail AS mail INDEXED BY perdure_mail_unread
    WHERE mail.run = found.key AND mail.unread = 1
)))
FROM (
    SELECT run.key, run.strikes, run.history_bytes
    FROM json_each(?) AS queue CROSS JOIN json_each(?) AS served CROSS JOIN perdure_runs AS run NOT INDEXED
    WHERE run.key IN (
        SELECT key FROM (
            SELECT ready.key FROM perdure_runs AS ready INDEXED BY perdure_runs_due
            WHERE ready.namespace = ? AND ready.queue = queue.value
                AND ready.workflow = json_extract(served.value, '$[0]') AND ready.kind = json_extract(served.value, '$[1]')
                AND ready.due_at = 0 AND ready.strikes < ?
            ORDER BY ready.priority DESC, ready.key LIMIT ?
        )
        UNION ALL
        SELECT key FROM (
            SELECT timer.key FROM perdure_runs AS timer INDEXED BY perdure_runs_due
            WHERE timer.namespace = ? AND timer.queue = queue.value
                AND timer.workflow = json_extract(served.value, '$[0]') AND timer.kind = json_extract(served.value, '$[1]')
                AND timer.due_at > 0 AND timer.due_at <= ? AND timer.strikes < ?
            ORDER BY timer.due_at LIMIT ?
        )
    )
    ORDER BY run.priority DESC, run.key LIMIT ?
) AS found;

-- name: claimable_suspect
-- The most urgent run that killed two workers, in the same form. (Namespace, now, queues, pairs of name and kind.)
SELECT json_group_array(json_array(key, strikes, history_bytes, 0))
FROM (
    SELECT run.key, run.strikes, run.history_bytes FROM perdure_runs AS run INDEXED BY perdure_runs_struck
    WHERE run.strikes >= 2 AND run.strikes = 2 AND run.ended_at IS NULL AND +run.namespace = ?
        AND +run.due_at IS NOT NULL AND +run.due_at <= ?
        AND +run.queue IN (SELECT value FROM json_each(?))
        AND EXISTS (
            SELECT 1 FROM json_each(?) AS served
            WHERE run.workflow = json_extract(served.value, '$[0]') AND run.kind = json_extract(served.value, '$[1]')
        )
    ORDER BY run.priority DESC, run.key LIMIT 1
);

-- name: due
-- When the latest of what is due came due (0: at any time), and when the next timer comes: null where there is none.
-- (Namespace, now; namespace, now; queues; pairs of name and kind.)
SELECT
    max((
        SELECT run.due_at FROM perdure_runs AS run INDEXED BY perdure_runs_due
        WHERE run.namespace = ? AND run.queue = queue.value
            AND run.workflow = json_extract(served.value, '$[0]') AND run.kind = json_extract(served.value, '$[1]')
            AND run.due_at <= ?
        ORDER BY run.due_at DESC LIMIT 1
    )),
    min((
        SELECT run.due_at FROM perdure_runs AS run INDEXED BY perdure_runs_due
        WHERE run.namespace = ? AND run.queue = queue.value
            AND run.workflow = json_extract(served.value, '$[0]') AND run.kind = json_extract(served.value, '$[1]')
            AND run.due_at > ?
        ORDER BY run.due_at LIMIT 1
    ))
FROM json_each(?) AS queue CROSS JOIN json_each(?) AS served;

-- name: take
-- Give the runs of a list a new owner. (Owner, now, keys.)
UPDATE perdure_runs SET
    owner = ?, epoch = epoch + 1, status = 'running', due_at = NULL, started_at = coalesce(started_at, ?)
WHERE key IN (SELECT value FROM json_each(?)) AND +owner IS NULL;

-- name: hand_back_struck
-- Take runs from their dead owners: those that were running are ready again, with a strike. (Keys.)
UPDATE perdure_runs SET
    owner = NULL,
    epoch = epoch + 1,
    strikes = strikes + (status = 'running'),
    due_at = CASE WHEN status IN ('running', 'ready') THEN 0
                  WHEN status IN ('waiting', 'scheduled', 'blocked') THEN wake_at END,
    status = CASE WHEN status = 'running' THEN 'ready' ELSE status END
WHERE key IN (SELECT value FROM json_each(?));

-- name: hand_back
-- Take runs from an owner that ends in peace. (Keys.)
UPDATE perdure_runs SET
    owner = NULL,
    due_at = CASE WHEN status IN ('running', 'ready') THEN 0
                  WHEN status IN ('waiting', 'scheduled', 'blocked') THEN wake_at END,
    status = CASE WHEN status = 'running' THEN 'ready' ELSE status END
WHERE key IN (SELECT value FROM json_each(?));

-- name: owned_by
-- The keys of the runs of one incarnation.
SELECT json_group_array(key) FROM (SELECT key FROM perdure_runs INDEXED BY perdure_runs_owner WHERE owner = ? ORDER BY key);

-- name: orphans
-- The first runs whose owners are dead, of at most a number.
SELECT json_group_array(key) FROM (
    SELECT run.key
    FROM perdure_workers AS worker INDEXED BY perdure_workers_dead
    CROSS JOIN perdure_runs AS run INDEXED BY perdure_runs_owner
    WHERE worker.dead = 1 AND run.owner = worker.incarnation
    ORDER BY run.key LIMIT ?
);
