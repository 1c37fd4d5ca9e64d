-- name: workers
-- All incarnations that live or still own runs.
SELECT incarnation, name, namespace, queues, serves, ttl, slot, locked, announced_at, dead
FROM perdure_workers INDEXED BY perdure_workers_dead WHERE dead < 2;

-- name: worker
-- One incarnation, also a dead one.
SELECT incarnation, name, namespace, queues, serves, ttl, slot, locked, announced_at, dead FROM perdure_workers
WHERE incarnation = ?;

-- name: announce
-- Keep an incarnation's row; announcing again replaces it.
INSERT INTO perdure_workers (incarnation, name, namespace, queues, serves, ttl, slot, locked, announced_at)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (incarnation) DO UPDATE SET
    name = excluded.name, namespace = excluded.namespace, queues = excluded.queues, serves = excluded.serves,
    ttl = excluded.ttl, slot = excluded.slot, locked = excluded.locked, announced_at = excluded.announced_at;

-- name: serve
-- Keep what was announced, the newest announcement of a name over older ones.
INSERT INTO perdure_served (namespace, kind, name, queue, signature, announced_at)
SELECT column1, column2, column3, column4, column5, column6
FROM (VALUES (?, ?, ?, ?, ?, ?)) WHERE column1 IS NOT NULL
ON CONFLICT (namespace, kind, name) DO UPDATE SET
    queue = excluded.queue, signature = excluded.signature, announced_at = excluded.announced_at;

-- name: served
-- All that was ever announced in a namespace.
SELECT kind, name, queue, signature FROM perdure_served WHERE namespace = ? ORDER BY kind, name;

-- name: unblock
-- Make blocked runs of workflows due now. (Now, now, namespace, names, now.)
UPDATE perdure_runs INDEXED BY perdure_runs_status SET wake_at = ?, due_at = ?
WHERE namespace = ? AND workflow IN (SELECT value FROM json_each(?)) AND status = 'blocked'
    AND +owner IS NULL AND (wake_at IS NULL OR wake_at > ?);

-- name: bury
-- Make an incarnation dead for ever. (2 if it owns nothing any more, now, incarnation.)
UPDATE perdure_workers SET dead = ?, dead_at = ?, slot = NULL WHERE incarnation = ? AND dead = 0;

-- name: close_graves
-- The dead own nothing any more.
UPDATE perdure_workers SET dead = 2 WHERE dead = 1;
