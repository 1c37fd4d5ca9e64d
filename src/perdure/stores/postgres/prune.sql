-- name: may_go
-- The next runs of all, by key, and of each whether it may go, its events and its messages. Keys grow with time. A child
-- that ends with its parent stays while that lives; so does a parent while a child of it does.
SELECT run.key, run.created_at,
    run.namespace = $namespace::text
    AND run.ended_at IS NOT NULL AND run.ended_at < $ended_before::int8
    AND run.status = ANY($statuses::text[])
    AND ($workflow::text IS NULL OR run.workflow = $workflow::text)
    AND 0 = (
        SELECT count(*) FROM perdure.runs AS above
        WHERE above.key = run.parent AND above.ended_at IS NULL AND run.parent_close = 'cancel'
    )
    AND 0 = (
        SELECT count(*) FROM perdure.runs AS below WHERE below.parent = run.key AND below.ended_at IS NULL
    ),
    (SELECT coalesce(max(event.seq), 0) FROM perdure.history AS event WHERE event.run = run.key),
    (SELECT count(*) FROM perdure.mail AS mail WHERE mail.run = run.key)
FROM perdure.runs AS run
WHERE run.key > $after::int8
ORDER BY run.key LIMIT $number::int8;

-- name: hold_ended
-- Hold runs that are to be removed; one that a sender's open transaction holds is left for another time.
SELECT run.key FROM perdure.runs AS run WHERE run.key = ANY($keys::int8[]) ORDER BY run.key
FOR UPDATE OF run SKIP LOCKED;

-- name: forget_events
-- Remove the newest events of one run.
DELETE FROM perdure.history WHERE run = $run::int8 AND seq > $after::int8;

-- name: forget_messages
-- Remove some messages of one run.
DELETE FROM perdure.mail AS mail WHERE mail.run = $run::int8 AND mail.id = ANY(ARRAY(
    SELECT one.id FROM perdure.mail AS one WHERE one.run = $run::int8 LIMIT $number::int8
));

-- name: forget
-- Remove runs that are held: histories, messages, large inputs, the idempotency keys that began them, and their rows. The
-- keys go before the rows, as starts write them in that order: what nobody reads would go last.
WITH histories AS (DELETE FROM perdure.history WHERE run = ANY($keys::int8[])),
    messages AS (DELETE FROM perdure.mail WHERE run = ANY($keys::int8[])),
    inputs AS (DELETE FROM perdure.inputs WHERE run = ANY($keys::int8[])),
    began AS (DELETE FROM perdure.idempotency WHERE run = ANY($keys::int8[]) RETURNING run)
DELETE FROM perdure.runs WHERE key = ANY($keys::int8[]) AND (SELECT count(*) FROM began) >= 0;
