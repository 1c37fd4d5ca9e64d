-- name: insert_runs
-- Begin runs; one whose public id is taken is left out. An owner that is dead by now does not get its run, or nobody
-- would ever hand it back.
INSERT INTO perdure_runs (
    namespace, id, generation, kind, workflow, queue, priority, status, owner, epoch, version, turn,
    due_at, created_at, started_at, wake_at, deadline_at, attempt, strikes, parent, parent_step, parent_close,
    history_events, history_bytes, seed, digest, language, dialect, policy, tags, input
)
SELECT
    start.namespace, start.id, 1, start.kind, start.workflow, start.queue, start.priority,
    CASE WHEN worker.incarnation IS NOT NULL THEN 'running' WHEN start.wake_at IS NOT NULL THEN 'scheduled'
         ELSE 'ready' END,
    worker.incarnation,
    start.owner IS NOT NULL, 0, '',
    CASE WHEN worker.incarnation IS NULL THEN coalesce(start.wake_at, 0) END,
    start.now,
    CASE WHEN worker.incarnation IS NOT NULL THEN start.now END,
    CASE WHEN worker.incarnation IS NULL THEN start.wake_at END,
    start.deadline_at, 1, 0, start.parent, start.parent_step, start.parent_close,
    start.history_events, start.history_bytes, start.seed, start.digest, start.language, start.dialect,
    start.policy, start.tags, start.input
FROM (
    SELECT column1 AS namespace, column2 AS id, column3 AS kind, column4 AS workflow, column5 AS queue,
        column6 AS priority, column7 AS owner, column8 AS wake_at, column9 AS now, column10 AS deadline_at,
        column11 AS parent, column12 AS parent_step, column13 AS parent_close, column14 AS history_events,
        column15 AS history_bytes, column16 AS seed, column17 AS digest, column18 AS language,
        column19 AS dialect, column20 AS policy, column21 AS tags, column22 AS input
    FROM (VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?))
) AS start
LEFT JOIN perdure_workers AS worker ON worker.incarnation = start.owner AND worker.dead = 0
WHERE start.namespace IS NOT NULL
ON CONFLICT (namespace, id, generation) DO NOTHING;

-- name: insert_inputs
-- Keep large inputs beside their rows.
INSERT INTO perdure_inputs (run, input)
SELECT column1, column2 FROM (VALUES (?, ?)) WHERE column1 IS NOT NULL;

-- name: insert_keys
-- Give idempotency keys to new runs, over expired ones only. (Rows of namespace, scope, key, run, expiry; then now.)
INSERT INTO perdure_idempotency (namespace, scope, key, run, expires_at)
SELECT column1, column2, column3, column4, column5
FROM (VALUES (?, ?, ?, ?, ?)) WHERE column1 IS NOT NULL
ON CONFLICT (namespace, scope, key) DO UPDATE SET run = excluded.run, expires_at = excluded.expires_at
    WHERE perdure_idempotency.expires_at <= ?;

-- name: insert_events
-- Append to histories.
INSERT INTO perdure_history (run, seq, event)
SELECT column1, column2, column3 FROM (VALUES (?, ?, ?)) WHERE column1 IS NOT NULL;

-- name: commit_turns
-- Write the new state of every turn whose fence holds, all of it checked here, in the statement that writes: the
-- owner and its life, the epoch, the version and the last turn; that the run has not ended and may become what the
-- turn says (`before` lists from which statuses); that the events follow its history; and, where the turn ends the
-- run, that there is no unread mail it does not consume. The `+` keeps the planner from walking along all runs of
-- an owner; INDEXED BY, here and elsewhere, keeps it from being misled by statistics.
UPDATE perdure_runs AS run SET
    version = run.version + 1,
    turn = turn.id,
    status = turn.status,
    owner = turn.next_owner,
    epoch = run.epoch + (turn.owner IS NULL),
    due_at = turn.due_at,
    wake_at = turn.wake_at,
    ended_at = turn.ended_at,
    waits = turn.waits,
    strikes = run.strikes * turn.keep_strikes + turn.add_strikes,
    attempt = coalesce(turn.attempt, run.attempt),
    history_events = run.history_events + turn.events,
    history_bytes = run.history_bytes + turn.bytes,
    result = turn.result,
    error = turn.error
FROM (
    SELECT column1 AS run, column2 AS owner, column3 AS epoch, column4 AS version, column5 AS last, column6 AS id,
        column7 AS status, column8 AS before, column9 AS next_owner, column10 AS due_at, column11 AS wake_at,
        column12 AS ended_at, column13 AS waits, column14 AS keep_strikes, column15 AS add_strikes,
        column16 AS attempt, column17 AS follows, column18 AS events, column19 AS bytes, column20 AS result,
        column21 AS error, column22 AS heeds_mail, column23 AS consumed
    FROM (VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?))
) AS turn
WHERE run.key = turn.run
    AND run.version = turn.version
    AND run.epoch = turn.epoch
    AND run.turn = turn.last
    AND run.ended_at IS NULL
    AND (turn.owner IS NULL OR (
        +run.owner = turn.owner AND turn.owner IN (SELECT incarnation FROM perdure_workers WHERE dead = 0)
    ))
    AND instr(turn.before, run.status)
    AND (turn.follows IS NULL OR turn.follows = run.history_events)
    AND (turn.heeds_mail = 0 OR NOT EXISTS (
        SELECT 1 FROM perdure_mail AS mail INDEXED BY perdure_mail_unread
        WHERE mail.run = turn.run AND mail.unread = 1
            AND mail.id NOT IN (SELECT value FROM json_each(turn.consumed))
    ));

-- name: add_to_history
-- Count the events that a step's transaction records, in the row that its fence has written before: under this turn.
-- (Events, bytes; run, turn, events before.)
UPDATE perdure_runs SET history_events = history_events + ?, history_bytes = history_bytes + ?
WHERE key = ? AND turn = ? AND history_events = ?;

-- name: consume_mail
-- Empty messages that turns have taken into their histories. (Rows of run, id.)
UPDATE perdure_mail AS mail INDEXED BY perdure_mail_id SET unread = 0, owner = NULL, name = '', data = ''
FROM (SELECT column1 AS run, column2 AS id FROM (VALUES (?, ?))) AS taken
WHERE mail.run = taken.run AND mail.id = taken.id AND +mail.unread = 1;

-- name: insert_mail
-- Put messages into the mailboxes of live runs that have room. (Rows of run, id, kind, name, data, time, room.)
INSERT INTO perdure_mail (run, id, kind, name, data, at, unread, owner)
SELECT sent.run, sent.id, sent.kind, sent.name, sent.data, sent.at, 1, run.owner
FROM (
    SELECT column1 AS run, column2 AS id, column3 AS kind, column4 AS name, column5 AS data, column6 AS at,
        column7 AS room
    FROM (VALUES (?, ?, ?, ?, ?, ?, ?))
) AS sent
CROSS JOIN perdure_runs AS run
WHERE run.key = sent.run
    AND run.ended_at IS NULL
    AND (sent.room IS NULL OR sent.room > (
        SELECT count(*) FROM perdure_mail AS other INDEXED BY perdure_mail_unread
        WHERE other.run = sent.run AND other.unread = 1
    ))
ON CONFLICT (run, id) DO NOTHING;

-- name: others_own
-- Whether one of this list of runs is not owned by this incarnation.
SELECT 1 FROM perdure_runs WHERE key IN (SELECT value FROM json_each(?)) AND owner IS NOT ? LIMIT 1;

-- name: offer_mailed
-- Make unowned runs of this list claimable now if their mail says so. Mail wakes a run that waits; it does not start
-- one before its time, unless it asks it to end; it does not help one that is blocked.
UPDATE perdure_runs AS run SET due_at = 0
WHERE run.key IN (SELECT value FROM json_each(?))
    AND +run.owner IS NULL
    AND (
        run.status IN ('waiting', 'running') AND EXISTS (
            SELECT 1 FROM perdure_mail AS mail INDEXED BY perdure_mail_unread
            WHERE mail.run = run.key AND mail.unread = 1
        )
        OR run.status = 'scheduled' AND EXISTS (
            SELECT 1 FROM perdure_mail AS mail INDEXED BY perdure_mail_unread
            WHERE mail.run = run.key AND mail.unread = 1 AND mail.kind = 'cancel'
        )
    );

-- name: readdress_mail
-- Say in the unread mail of this list of runs who owns them now.
UPDATE perdure_mail INDEXED BY perdure_mail_unread
SET owner = (SELECT run.owner FROM perdure_runs AS run WHERE run.key = perdure_mail.run)
WHERE unread = 1 AND run IN (SELECT value FROM json_each(?));

-- name: judge_turns
-- What the fence of each run of this list looks at.
SELECT json_group_array(json_array(
    key, owner, owner IN (SELECT incarnation FROM perdure_workers WHERE dead = 0), epoch, version, turn, status,
    history_events, ended_at
))
FROM perdure_runs WHERE key IN (SELECT value FROM json_each(?));

-- name: judge_mail
-- The ids of unread messages of each run of this list.
SELECT json_group_array(json_array(run, id))
FROM perdure_mail INDEXED BY perdure_mail_unread
WHERE unread = 1 AND run IN (SELECT value FROM json_each(?));

-- name: judge_start
-- The run of an idempotency key that has not expired, then the newest run of a public id; the last column says which.
-- (Namespace, scope, key, now; namespace, id.)
SELECT run.key, run.id, run.workflow, run.digest, run.seed, run.parent, run.parent_step, run.created_at, found.by_key
FROM (
    SELECT same.run AS key, 1 AS by_key FROM perdure_idempotency AS same
    WHERE same.namespace = ? AND same.scope = ? AND same.key = ? AND (same.expires_at IS NULL OR same.expires_at > ?)
    UNION ALL
    SELECT * FROM (
        SELECT same.key, 0 FROM perdure_runs AS same INDEXED BY perdure_runs_id
        WHERE same.namespace = ? AND same.id = ?
        ORDER BY same.generation DESC LIMIT 1
    )
) AS found
CROSS JOIN perdure_runs AS run ON run.key = found.key;

-- name: find_addresses
-- The newest generations of public ids, given as [place, namespace, id]; the answer is [[place, key], …].
SELECT json_group_array(json_array(json_extract(wanted.value, '$[0]'), (
    SELECT run.key FROM perdure_runs AS run INDEXED BY perdure_runs_id
    WHERE run.namespace = json_extract(wanted.value, '$[1]') AND run.id = json_extract(wanted.value, '$[2]')
    ORDER BY run.generation DESC LIMIT 1
)))
FROM json_each(?) AS wanted;

-- name: find_children
-- The newest children that steps have started, given as [place, parent, step]; the answer is [[place, key], …].
SELECT json_group_array(json_array(json_extract(wanted.value, '$[0]'), (
    SELECT max(run.key) FROM perdure_runs AS run INDEXED BY perdure_runs_parent
    WHERE run.parent = json_extract(wanted.value, '$[1]') AND run.parent_step = json_extract(wanted.value, '$[2]')
)))
FROM json_each(?) AS wanted;

-- name: judge_sends
-- What became of messages given as [run, id]: [key, status if it has ended, position of the message if it is there].
SELECT json_group_array(json_array(
    run.key,
    CASE WHEN run.ended_at IS NOT NULL THEN run.status END,
    (SELECT mail.position FROM perdure_mail AS mail INDEXED BY perdure_mail_id
     WHERE mail.run = run.key AND mail.id = json_extract(sent.value, '$[1]')),
    (SELECT count(*) FROM perdure_mail AS mail INDEXED BY perdure_mail_unread
     WHERE mail.run = run.key AND mail.unread = 1)
))
FROM json_each(?) AS sent LEFT JOIN perdure_runs AS run ON run.key = json_extract(sent.value, '$[0]');
