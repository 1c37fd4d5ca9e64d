-- name: settle
-- Let messages that call, for runs that nobody owns, rest: those that wake their run make it due, and the others wait
-- until it is claimed. Mail wakes a run that waits; it does not start one before its time, unless it asks it to end; it
-- does not help one that is blocked. Done by whoever looks for work, never by who sends. A run that somebody else has
-- locked is left to the next who looks. (An array, and below a subquery for each message instead of a join: so that the
-- planner cannot begin with the runs, of which it would look at all that have ended.)
WITH called AS MATERIALIZED (
    SELECT run.key, run.status FROM perdure.runs AS run
    WHERE run.key = ANY(ARRAY(SELECT DISTINCT mail.run FROM perdure.mail AS mail WHERE mail.calls))
        AND run.owner IS NOT DISTINCT FROM NULL
    ORDER BY run.key
    FOR NO KEY UPDATE OF run SKIP LOCKED
), woken AS (
    UPDATE perdure.runs AS run SET due_at = 0 FROM called
    WHERE run.key = called.key AND run.due_at IS DISTINCT FROM 0 AND (
        called.status IN ('waiting', 'running')
        OR called.status = 'scheduled' AND EXISTS (
            SELECT 1 FROM perdure.mail AS mail WHERE mail.run = called.key AND mail.unread AND mail.kind = 'cancel'
        )
    )
)
UPDATE perdure.mail AS mail SET calls = false FROM called WHERE mail.run = called.key AND mail.calls;

-- name: claimable
-- What a claim may take and nobody else is taking, most urgent first, oldest first among equals: for each queue and
-- served name the head of its ready runs and of its timers that have come, so that a long line behind them costs
-- nothing. (Of those that are ready three times the number: others may be taking the first.) A sender's open
-- transaction does not stand in the way of the lock. What was chosen is looked at again under its lock, found by its
-- key and in no other way.
SELECT run.key, run.strikes, run.history_bytes, (
    SELECT coalesce(sum(octet_length(mail.data)), 0)::int8 FROM perdure.mail AS mail
    WHERE mail.run = run.key AND mail.unread
)
FROM perdure.runs AS run
WHERE run.key = ANY(ARRAY(
    SELECT offered.key
    FROM unnest($queues::text[]) AS queue (name)
    CROSS JOIN unnest($names::text[], $kinds::text[]) AS served (name, kind)
    CROSS JOIN LATERAL (
        (
            SELECT ready.key, ready.priority FROM perdure.runs AS ready
            WHERE ready.namespace = $namespace::text AND ready.queue = queue.name AND ready.workflow = served.name
                AND ready.kind = served.kind AND ready.due_at = 0 AND ready.strikes < $strikes::int4
            ORDER BY ready.priority DESC, ready.key LIMIT 3 * $number::int8
        )
        UNION ALL
        (
            SELECT timer.key, timer.priority FROM perdure.runs AS timer
            WHERE timer.namespace = $namespace::text AND timer.queue = queue.name AND timer.workflow = served.name
                AND timer.kind = served.kind AND timer.due_at > 0 AND timer.due_at <= $now::int8
                AND timer.strikes < $strikes::int4
            ORDER BY timer.due_at LIMIT $window::int8
        )
    ) AS offered
    WHERE EXISTS (
        SELECT 1 FROM perdure.workers AS worker WHERE worker.incarnation = $incarnation::text AND worker.dead = 0
    )
))
AND run.owner IS NOT DISTINCT FROM NULL AND coalesce(run.due_at, $now::int8 + 1) <= $now::int8
ORDER BY run.priority DESC, run.key LIMIT $number::int8
FOR NO KEY UPDATE OF run SKIP LOCKED;

-- name: claimable_suspect
-- The most urgent run that killed two workers, in the same form.
SELECT run.key, run.strikes, run.history_bytes, 0::int8
FROM perdure.runs AS run
WHERE run.key = ANY(ARRAY(
    SELECT suspect.key FROM perdure.runs AS suspect
    WHERE suspect.strikes >= 2 AND suspect.strikes = 2 AND suspect.ended_at IS NULL
        AND suspect.namespace = $namespace::text AND suspect.due_at <= $now::int8
        AND suspect.queue = ANY($queues::text[])
        AND EXISTS (
            SELECT 1 FROM unnest($names::text[], $kinds::text[]) AS served (name, kind)
            WHERE suspect.workflow = served.name AND suspect.kind = served.kind
        )
        AND EXISTS (
            SELECT 1 FROM perdure.workers AS worker WHERE worker.incarnation = $incarnation::text AND worker.dead = 0
        )
))
AND run.owner IS NOT DISTINCT FROM NULL AND coalesce(run.due_at, $now::int8 + 1) <= $now::int8
ORDER BY run.priority DESC, run.key LIMIT 1
FOR NO KEY UPDATE OF run SKIP LOCKED;

-- name: take
-- Give the runs of a list, locked by the statement before, a new owner.
UPDATE perdure.runs AS run SET
    owner = $incarnation::text, epoch = run.epoch + 1, status = 'running', due_at = NULL,
    started_at = coalesce(run.started_at, $now::int8)
WHERE run.key = ANY($keys::int8[]) AND run.owner IS NOT DISTINCT FROM NULL
RETURNING /* columns */;

-- name: call_owner
-- The new owner of runs hears of all their mail.
UPDATE perdure.mail AS mail SET calls = true WHERE mail.run = ANY($keys::int8[]) AND mail.unread AND NOT mail.calls;

-- name: due
-- When the latest of what is due came due (0: at any time), and when the next timer comes: null where there is none.
-- And whether mail calls for a run that nobody owns, and for one that this incarnation owns.
SELECT
    max((
        SELECT run.due_at FROM perdure.runs AS run
        WHERE run.namespace = $namespace::text AND run.queue = queue.name AND run.workflow = served.name
            AND run.kind = served.kind AND run.due_at <= $now::int8
        ORDER BY run.due_at DESC LIMIT 1
    )),
    min((
        SELECT run.due_at FROM perdure.runs AS run
        WHERE run.namespace = $namespace::text AND run.queue = queue.name AND run.workflow = served.name
            AND run.kind = served.kind AND run.due_at > $now::int8
        ORDER BY run.due_at LIMIT 1
    )),
    EXISTS (
        SELECT 1 FROM perdure.mail AS mail
        WHERE mail.calls AND (SELECT run.owner IS NULL FROM perdure.runs AS run WHERE run.key = mail.run)
    ),
    EXISTS (
        SELECT 1 FROM perdure.mail AS mail
        WHERE mail.calls
            AND (SELECT run.owner = $incarnation::text FROM perdure.runs AS run WHERE run.key = mail.run)
    )
FROM unnest($queues::text[]) AS queue (name)
CROSS JOIN unnest($names::text[], $kinds::text[]) AS served (name, kind);

-- name: hand_back_struck
-- Take runs from their dead owners: those that were running are ready again, with a strike. What somebody else has
-- locked, or is over the number, is left for the next time. (+ 0: found by their owners, not in the order of all keys.)
UPDATE perdure.runs AS run SET
    owner = NULL,
    epoch = run.epoch + 1,
    strikes = run.strikes + CASE WHEN run.status = 'running' THEN 1 ELSE 0 END,
    due_at = CASE WHEN run.status IN ('running', 'ready') THEN 0
                  WHEN run.status IN ('waiting', 'scheduled', 'blocked') THEN run.wake_at END,
    status = CASE WHEN run.status = 'running' THEN 'ready' ELSE run.status END
WHERE run.key = ANY(ARRAY(
    SELECT orphan.key FROM perdure.runs AS orphan
    WHERE orphan.owner = ANY(ARRAY(SELECT worker.incarnation FROM perdure.workers AS worker WHERE worker.dead = 1))
    ORDER BY orphan.key + 0 LIMIT $number::int8
    FOR NO KEY UPDATE OF orphan SKIP LOCKED
));

-- name: hand_back
-- Take runs from an owner that ends in peace.
UPDATE perdure.runs AS run SET
    owner = NULL,
    due_at = CASE WHEN run.status IN ('running', 'ready') THEN 0
                  WHEN run.status IN ('waiting', 'scheduled', 'blocked') THEN run.wake_at END,
    status = CASE WHEN run.status = 'running' THEN 'ready' ELSE run.status END
WHERE run.key = ANY(ARRAY(
    SELECT owned.key FROM perdure.runs AS owned WHERE owned.owner = $incarnation::text
    ORDER BY owned.key + 0
    FOR NO KEY UPDATE OF owned
));
