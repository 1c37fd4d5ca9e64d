-- name: bury_retired
-- Make an incarnation that ends in peace dead for ever; whether it lived.
UPDATE perdure.workers SET dead = 1, dead_at = $now::int8 WHERE incarnation = $incarnation::text AND dead = 0
RETURNING incarnation;

-- name: bury
-- Make incarnations dead for ever: those whose lease ran out, and those of this list if they have neither beaten nor
-- connected anew since.
UPDATE perdure.workers AS worker SET dead = 1, dead_at = $now::int8
WHERE worker.dead = 0 AND (
    worker.beat_at + worker.ttl < $now::int8
    OR (worker.incarnation, worker.beat_at, worker.backend) IN (
        SELECT * FROM unnest($gone::text[], $beats::int8[], $backends::int4[])
    )
)
RETURNING worker.incarnation;

-- name: end_steps
-- End the sessions in which dead workers' transaction steps are open: nobody else can have their runs before.
SELECT count(pg_terminate_backend(backend.pid)) FROM perdure.workers AS worker
JOIN pg_stat_activity AS backend ON backend.application_name = 'perdure step ' || worker.incarnation
WHERE worker.dead = 1 AND backend.datname = current_database() AND backend.usename = current_user;

-- name: close_graves
-- Who has been dead for an hour and owns nothing will never be given anything: no transaction of its time is open.
UPDATE perdure.workers AS worker SET dead = 2
WHERE worker.dead = 1 AND worker.dead_at < $now::int8 - 3600000000
    AND (SELECT true FROM perdure.runs AS run WHERE run.owner = worker.incarnation LIMIT 1) IS NULL;

-- name: disconnected
-- A fragment: whether a worker's connection is not there any more; NULL if nothing is known of it. One that we may not
-- see has hidden columns, which is not the same as being gone. A server that started after a connection did has ended it, and no worker;
-- so has one that lost a process of its own, which forgets its statistics then and does not say that it started.
worker.backend IS NOT NULL AND worker.backend_start >= pg_postmaster_start_time()
    AND worker.backend_start >= coalesce((SELECT writer.stats_reset FROM pg_stat_bgwriter AS writer), '-infinity')
    AND NOT EXISTS (
        SELECT 1 FROM pg_stat_get_activity(worker.backend) AS session
        WHERE session.backend_start IS NULL OR session.backend_start = worker.backend_start
    )

-- name: patrol
-- What a round has to look after: whether a lease ran out or a dead worker still owns runs; when the next run is out of
-- time, and whether one has killed its workers; whether others are at work; and which living incarnations' connections
-- are not there any more, with their last beats. (A subquery for each worker, which the planner cannot begin with.)
SELECT
    EXISTS (
        SELECT 1 FROM perdure.workers AS worker WHERE worker.dead = 0 AND worker.beat_at + worker.ttl < $now::int8
    ) OR EXISTS (
        SELECT 1 FROM perdure.workers AS worker
        WHERE worker.dead = 1
            AND (SELECT true FROM perdure.runs AS run WHERE run.owner = worker.incarnation LIMIT 1)
    ),
    (
        SELECT run.deadline_at FROM perdure.runs AS run WHERE run.deadline_at IS NOT NULL AND run.ended_at IS NULL
        ORDER BY run.deadline_at LIMIT 1
    ),
    EXISTS (
        SELECT 1 FROM perdure.runs AS run
        WHERE run.strikes >= 2 AND run.strikes >= 3 AND run.ended_at IS NULL AND run.owner IS NOT DISTINCT FROM NULL
            AND run.status <> 'quarantined'
    ),
    EXISTS (
        SELECT 1 FROM perdure.workers AS worker
        WHERE worker.dead = 0 AND worker.incarnation <> ALL($own::text[])
            AND (SELECT true FROM perdure.runs AS run WHERE run.owner = worker.incarnation LIMIT 1)
    ),
    coalesce(array_agg(gone.incarnation), '{}'), coalesce(array_agg(gone.beat_at), '{}'),
    coalesce(array_agg(gone.backend), '{}')
FROM (
    SELECT worker.incarnation, worker.beat_at, worker.backend FROM perdure.workers AS worker
    WHERE worker.dead = 0 AND /* disconnected */
) AS gone;

-- name: worker
-- The name of an incarnation, if it lives as far as can be seen.
SELECT worker.name FROM perdure.workers AS worker
WHERE worker.incarnation = $incarnation::text AND worker.dead = 0 AND $now::int8 <= worker.beat_at + worker.ttl
    AND (/* disconnected */) IS NOT TRUE;

-- name: serving
-- What the living workers of a namespace serve, and the queues from which they take.
SELECT worker.serves, worker.queues FROM perdure.workers AS worker
WHERE worker.dead = 0 AND worker.namespace = $namespace::text AND $now::int8 <= worker.beat_at + worker.ttl
    AND (/* disconnected */) IS NOT TRUE;

-- name: announce
-- Keep an incarnation's row; announcing again replaces it, unless it is dead.
INSERT INTO perdure.workers AS known (incarnation, name, namespace, queues, serves, ttl, announced_at, beat_at)
VALUES ($incarnation::text, $name::text, $namespace::text, $queues::text, $serves::text, $ttl::int8, $now::int8, $now::int8)
ON CONFLICT (incarnation) DO UPDATE SET
    name = excluded.name, namespace = excluded.namespace, queues = excluded.queues, serves = excluded.serves,
    ttl = excluded.ttl, announced_at = excluded.announced_at, beat_at = excluded.beat_at
    WHERE known.dead = 0
RETURNING incarnation;

-- name: beat
-- An incarnation lives, and by this connection if there is one (0: none); the answer is its lease's length, and
-- the server's clock.
UPDATE perdure.workers AS worker SET
    beat_at = $now::int8,
    backend = nullif($backend::int4, 0),
    backend_start = (SELECT session.backend_start FROM pg_stat_get_activity($backend::int4) AS session)
WHERE worker.incarnation = $incarnation::text AND worker.dead = 0
RETURNING worker.ttl, (extract(epoch FROM clock_timestamp()) * 1000000)::int8;

-- name: stand_for
-- A new connection stands for incarnations. That says nothing of their leases: a worker that hangs may have it too.
UPDATE perdure.workers AS worker SET
    backend = nullif($backend::int4, 0),
    backend_start = (SELECT session.backend_start FROM pg_stat_get_activity($backend::int4) AS session)
WHERE worker.incarnation = ANY($own::text[]) AND worker.dead = 0
RETURNING worker.incarnation;

-- name: serve
-- Keep what was announced, the newest announcement of a name over older ones.
INSERT INTO perdure.served (namespace, kind, name, queue, signature, announced_at)
SELECT $namespace::text, one.kind, one.name, one.queue, one.signature, $now::int8
FROM unnest($kinds::text[], $names::text[], $queues::text[], $signatures::text[]) AS one (kind, name, queue, signature)
ORDER BY one.kind, one.name
ON CONFLICT (namespace, kind, name) DO UPDATE SET
    queue = excluded.queue, signature = excluded.signature, announced_at = excluded.announced_at;

-- name: served
-- All that was ever announced in a namespace.
SELECT kind, name, queue, signature FROM perdure.served WHERE namespace = $namespace::text ORDER BY kind, name;

-- name: unblock
-- Make blocked runs of workflows due now.
UPDATE perdure.runs AS run SET wake_at = $now::int8, due_at = $now::int8
WHERE run.key = ANY(ARRAY(
    SELECT blocked.key FROM perdure.runs AS blocked
    WHERE blocked.namespace = $namespace::text AND blocked.workflow = ANY($workflows::text[])
        AND blocked.status = 'blocked' AND blocked.owner IS NOT DISTINCT FROM NULL
        AND (blocked.wake_at IS NULL OR blocked.wake_at > $now::int8)
    ORDER BY blocked.key
    FOR NO KEY UPDATE OF blocked SKIP LOCKED
));
