-- name: lock_targets
-- Hold the runs that this batch sends mail to, so that none of them can end before the mail is there; and nothing
-- else, so that they can be committed meanwhile. Taken before any other lock, in the order of keys.
SELECT count(*) FROM (
    SELECT run.key FROM perdure.runs AS run
    WHERE run.key IN (
        SELECT unnest($to_run::int8[])
        UNION
        SELECT (
            SELECT newest.key FROM perdure.runs AS newest
            WHERE newest.namespace = named.namespace AND newest.id = named.id
            ORDER BY newest.generation DESC LIMIT 1
        )
        FROM unnest($to_namespace::text[], $to_id::text[]) AS named (namespace, id)
        UNION
        SELECT (
            SELECT max(child.key) FROM perdure.runs AS child
            WHERE child.parent = above.run AND child.parent_step = above.step
        )
        FROM unnest($to_parent::int8[], $to_step::text[]) AS above (run, step)
    )
    ORDER BY run.key
    FOR KEY SHARE OF run
) AS held;

-- name: lock_ending
-- Hold the runs that are to end, those that nobody else holds: a sender's open transaction keeps its run from ending.
-- Which were got is kept until the transaction ends, for the next statement, which has a later snapshot and so sees all
-- mail that was sent to them.
SELECT set_config('perdure_batch.ending', coalesce(string_agg(held.key::text, ','), ''), true)
FROM (
    SELECT run.key FROM perdure.runs AS run WHERE run.key = ANY($run::int8[]) ORDER BY run.key
    FOR UPDATE OF run SKIP LOCKED
) AS held;

-- name: turn_state
-- A row as a turn leaves it. -1 stands for null, which would cost more to pack. Bits of `flags`: 1 keeps strikes,
-- 2 adds one, 4 heeds unread mail, 8 ends the run, 16 gives the owner up.
        version = run.version + 1,
        turn = turn.id,
        status = turn.status,
        owner = CASE WHEN turn.flags & 16 = 0 THEN run.owner END,
        epoch = CASE WHEN turn.owner IS NULL THEN run.epoch + 1 ELSE run.epoch END,
        due_at = nullif(turn.due_at, -1),
        wake_at = nullif(turn.wake_at, -1),
        ended_at = CASE WHEN turn.flags & 8 <> 0 THEN $now::int8 END,
        waits = turn.waits,
        strikes = run.strikes * (turn.flags & 1) + (turn.flags >> 1 & 1),
        attempt = CASE WHEN turn.attempt = -1 THEN run.attempt ELSE turn.attempt END,
        history_events = run.history_events + turn.events,
        history_bytes = run.history_bytes + turn.bytes,
        result = turn.result,
        error = turn.error

-- name: turn_fence
-- The owner and its life, the epoch, the version and the last turn; that the run has not ended and may become what the
-- turn says (`before` lists from which statuses); that the events follow its history. IS NOT DISTINCT FROM keeps the
-- planner from walking along all runs of an owner.
        run.key = turn.run
        AND run.version = turn.version
        AND run.epoch = turn.epoch
        AND run.turn = turn.last
        AND run.ended_at IS NULL
        AND (turn.owner IS NULL OR (
            run.owner IS NOT DISTINCT FROM turn.owner
            AND turn.owner IN (SELECT worker.incarnation FROM perdure.workers AS worker WHERE worker.dead = 0)
        ))
        AND strpos(turn.before, run.status) > 0
        AND (turn.follows = -1 OR turn.follows = run.history_events)

-- name: commit_turns
-- Write the new state of every turn whose fence holds, all of it checked here, in the statement that writes: also,
-- where the turn ends the run, that it is held and that there is no unread mail the turn does not consume. The keys of
-- what was written are the answer, and kept until the transaction ends: everything behind looks there.
--
-- IS TRUE keeps the planner from turning a list into a join, a count instead of an EXISTS from reading all unread mail
-- that there is.
WITH written AS (
    UPDATE perdure.runs AS run SET
        /* turn_state */
    FROM unnest(
        $run::int8[], $owner::text[], $epoch::int8[], $version::int8[], $last::text[], $id::text[], $status::text[],
        $before::text[], $due_at::int8[], $wake_at::int8[], $waits::text[], $flags::int4[], $attempt::int4[],
        $follows::int4[], $events::int4[], $bytes::int8[], $result::text[], $error::text[]
    ) AS turn (
        run, owner, epoch, version, last, id, status,
        before, due_at, wake_at, waits, flags, attempt,
        follows, events, bytes, result, error
    )
    WHERE
        /* turn_fence */
        AND (turn.flags & 8 = 0 OR run.key IN (
            SELECT unnest(string_to_array(current_setting('perdure_batch.ending', true), ',')::int8[])
        ))
        AND (turn.flags & 4 = 0 OR 0 = (
            SELECT count(*) FROM perdure.mail AS mail
            WHERE mail.run = turn.run AND mail.unread
                AND ((mail.run, mail.id) IN (
                    SELECT * FROM unnest($consumed_run::int8[], $consumed_id::text[])
                )) IS NOT TRUE
        ))
    RETURNING run.key
)
SELECT set_config('perdure_batch.committed', coalesce(string_agg(written.key::text, ','), ''), true) FROM written;

-- name: append_events
-- Append to the histories of turns that were written.
INSERT INTO perdure.history (run, seq, event)
SELECT new.run, new.seq, new.event
FROM unnest($run::int8[], $seq::int4[], $event::text[]) AS new (run, seq, event)
WHERE (new.run IN (
    SELECT unnest(string_to_array(current_setting('perdure_batch.committed', true), ',')::int8[])
)) IS TRUE;

-- name: consume_mail
-- Empty messages that turns have taken into their histories. (IS NOT FALSE: to be found by their ids, also where a run
-- has many that are unread.)
UPDATE perdure.mail AS mail SET unread = false, calls = false, name = '', data = ''
FROM unnest($run::int8[], $id::text[]) AS taken (run, id)
WHERE mail.run = taken.run AND mail.id = taken.id AND mail.unread IS NOT FALSE
    AND (taken.run IN (
        SELECT unnest(string_to_array(current_setting('perdure_batch.committed', true), ',')::int8[])
    )) IS TRUE;

-- name: call_again
-- Whoever acted on a run that nobody owns has set anew when it is due: its unread mail calls once more.
UPDATE perdure.mail AS mail SET calls = true WHERE mail.run = ANY($run::int8[]) AND mail.unread AND NOT mail.calls;

-- name: start_runs
-- Begin runs, with their keys, events and large inputs; one whose idempotency key or public id is taken is left out,
-- like those of a turn that was not written (`by_run`; -1 for none). An owner that is dead by now does not get its
-- run, or nobody would ever hand it back. The answer is the keys: drawn in the order of the batch, inserted in the
-- order of ids, so that two batches that share some wait for each other and never in a circle.
WITH given AS MATERIALIZED (
    SELECT nextval('perdure.keys') AS key, start.*
    FROM unnest(
        $by_run::int8[], $namespace::text[], $id::text[], $kind::text[], $workflow::text[], $queue::text[],
        $priority::int4[], $owner::text[], $wake_at::int8[], $deadline_at::int8[], $parent::int8[],
        $parent_step::text[], $parent_close::text[], $seed::text[], $digest::text[], $language::text[],
        $dialect::text[], $policy::text[], $tags::text[], $input::text[], $event::text[],
        $scope::text[], $idempotency_key::text[], $expires_at::int8[]
    ) AS start (
        by_run, namespace, id, kind, workflow, queue,
        priority, owner, wake_at, deadline_at, parent,
        parent_step, parent_close, seed, digest, language,
        dialect, policy, tags, input, event,
        scope, idempotency_key, expires_at
    )
    WHERE start.by_run = -1 OR start.by_run IN (
        SELECT unnest(string_to_array(current_setting('perdure_batch.committed', true), ',')::int8[])
    )
), keyed AS (
    INSERT INTO perdure.idempotency AS taken (namespace, scope, key, run, expires_at)
    SELECT given.namespace, given.scope, given.idempotency_key, given.key, nullif(given.expires_at, -1)
    FROM given WHERE given.idempotency_key IS NOT NULL
    ORDER BY given.namespace, given.scope, given.idempotency_key
    ON CONFLICT (namespace, scope, key) DO UPDATE SET run = excluded.run, expires_at = excluded.expires_at
        WHERE taken.expires_at <= $now::int8
    RETURNING taken.run
), begun AS (
    INSERT INTO perdure.runs (
        key, namespace, id, generation, kind, workflow, queue, priority, status, owner, epoch, version, turn,
        due_at, created_at, started_at, wake_at, deadline_at, attempt, strikes, parent, parent_step, parent_close,
        history_events, history_bytes, seed, digest, language, dialect, policy, tags, input
    )
    SELECT
        given.key, given.namespace, given.id, 1, given.kind, given.workflow, given.queue, given.priority,
        CASE WHEN worker.incarnation IS NOT NULL THEN 'running' WHEN given.wake_at <> -1 THEN 'scheduled'
             ELSE 'ready' END,
        worker.incarnation,
        CASE WHEN given.owner IS NULL THEN 0 ELSE 1 END, 0, '',
        CASE WHEN worker.incarnation IS NULL THEN greatest(given.wake_at, 0) END,
        $now::int8,
        CASE WHEN worker.incarnation IS NOT NULL THEN $now::int8 END,
        CASE WHEN worker.incarnation IS NULL THEN nullif(given.wake_at, -1) END,
        nullif(given.deadline_at, -1), 1, 0, nullif(given.parent, -1), given.parent_step, given.parent_close,
        CASE WHEN given.event = '' THEN 0 ELSE 1 END, octet_length(given.event),
        given.seed, given.digest, given.language, given.dialect, given.policy, given.tags,
        CASE WHEN length(given.input) <= 1000 THEN given.input END
    FROM given LEFT JOIN perdure.workers AS worker ON worker.incarnation = given.owner AND worker.dead = 0
    WHERE given.idempotency_key IS NULL OR given.key IN (SELECT keyed.run FROM keyed)
    ORDER BY given.namespace, given.id
    ON CONFLICT (namespace, id, generation) DO NOTHING
    RETURNING key
), events AS (
    INSERT INTO perdure.history (run, seq, event)
    SELECT given.key, 1, given.event FROM given
    WHERE given.event <> '' AND (given.key IN (SELECT begun.key FROM begun)) IS TRUE
), large AS (
    INSERT INTO perdure.inputs (run, input)
    SELECT given.key, given.input FROM given
    WHERE length(given.input) > 1000 AND (given.key IN (SELECT begun.key FROM begun)) IS TRUE
)
SELECT begun.key FROM begun;

-- name: drop_keys
-- Take idempotency keys back that were given to runs which then found their public id taken.
DELETE FROM perdure.idempotency AS taken
USING unnest($namespace::text[], $scope::text[], $idempotency_key::text[]) AS given (namespace, scope, key)
WHERE taken.namespace = given.namespace AND taken.scope = given.scope AND taken.key = given.key
    AND NOT EXISTS (SELECT 1 FROM perdure.runs AS run WHERE run.key = taken.run);

-- name: find_refused
-- Which children and activities, by their places in a list, were not begun because their id or idempotency key belongs
-- to a run that is not their parent's own. Kept until the transaction ends: their parents are told.
SELECT set_config('perdure_batch.refused', coalesce(string_agg(child.place::text, ','), ''), true)
FROM unnest(
    $namespace::text[], $id::text[], $seed::text[], $parent::int8[], $step::text[], $scope::text[],
    $idempotency_key::text[]
) WITH ORDINALITY AS child (namespace, id, seed, parent, step, scope, idempotency_key, place)
WHERE 0 = (
    SELECT count(*) FROM perdure.runs AS run
    WHERE run.key = ANY(ARRAY(
        SELECT same.key FROM perdure.runs AS same WHERE same.namespace = child.namespace AND same.id = child.id
        UNION ALL
        SELECT taken.run FROM perdure.idempotency AS taken
        WHERE taken.namespace = child.namespace AND taken.scope = child.scope AND taken.key = child.idempotency_key
            AND (taken.expires_at IS NULL OR taken.expires_at > $now::int8)
    ))
    AND (run.seed = child.seed OR (run.parent = child.parent AND run.parent_step = child.step))
);

-- name: put_mail
-- Put messages into the mailboxes of live runs that have room, in the order in which they are given; those of turns
-- that were not written (`by_run`; -1 for none) are left out, and so is what tells a parent of a refused child
-- (`refused`, its place; -1 for none) that was not refused. The answer: which of the first `asked` messages were kept,
-- and where. Where none is `limited`, nobody's mail is counted.
WITH sent AS MATERIALIZED (
    SELECT message.*, CASE
        WHEN message.to_run <> -1 THEN message.to_run
        WHEN message.to_parent <> -1 THEN (
            SELECT max(child.key) FROM perdure.runs AS child
            WHERE child.parent = message.to_parent AND child.parent_step = message.to_id
        )
        ELSE (
            SELECT newest.key FROM perdure.runs AS newest
            WHERE newest.namespace = message.to_namespace AND newest.id = message.to_id
            ORDER BY newest.generation DESC LIMIT 1
        )
    END AS run
    FROM unnest(
        $by_run::int8[], $to_run::int8[], $to_parent::int8[], $to_namespace::text[], $to_id::text[], $id::text[],
        $kind::text[], $name::text[], $data::text[], $room::int4[], $refused::int4[]
    ) WITH ORDINALITY AS message (
        by_run, to_run, to_parent, to_namespace, to_id, id,
        kind, name, data, room, refused, place
    )
    WHERE (message.by_run = -1 OR message.by_run IN (
        SELECT unnest(string_to_array(current_setting('perdure_batch.committed', true), ',')::int8[])
    ))
    AND (message.refused = -1 OR message.refused IN (
        SELECT unnest(string_to_array(current_setting('perdure_batch.refused', true), ',')::int4[])
    ))
), placed AS MATERIALIZED (
    SELECT nextval('perdure.positions') AS position, ordered.*
    FROM (
        SELECT sent.*, CASE WHEN $limited::bool THEN count(*) FILTER (WHERE $limited::bool AND 0 = (
            -- Those before it in this batch take room too, unless they were there already.
            SELECT count(*) FROM perdure.mail AS known WHERE known.run = sent.run AND known.id = sent.id
        )) OVER (PARTITION BY sent.run ORDER BY sent.place ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) END AS before
        FROM sent WHERE sent.run IS NOT NULL
        ORDER BY sent.place
    ) AS ordered
), kept AS (
    INSERT INTO perdure.mail (position, run, at, unread, calls, id, kind, name, data)
    SELECT placed.position, placed.run, $now::int8, true, true, placed.id, placed.kind, placed.name, placed.data
    FROM placed JOIN perdure.runs AS run ON run.key = placed.run AND run.ended_at IS NULL
    WHERE placed.room = -1 OR placed.room > placed.before + (
        SELECT count(*) FROM perdure.mail AS other WHERE other.run = placed.run AND other.unread
    )
    ORDER BY placed.run, placed.position
    -- Held already, but for one that was started since the targets were looked up.
    FOR KEY SHARE OF run
    ON CONFLICT (run, id) DO NOTHING
    RETURNING position
)
SELECT placed.place, placed.run FROM placed
WHERE placed.place <= $asked::int8 AND (placed.position IN (SELECT kept.position FROM kept)) IS TRUE;

-- name: judge_turns
-- What the fence of each run of this list looks at.
SELECT run.key, run.owner, EXISTS (
    SELECT 1 FROM perdure.workers AS worker WHERE worker.incarnation = run.owner AND worker.dead = 0
), run.epoch, run.version, run.turn, run.status, run.history_events, run.ended_at
FROM perdure.runs AS run WHERE run.key = ANY($run::int8[]);

-- name: judge_mail
-- The ids of unread messages of each run of this list.
SELECT mail.run, mail.id FROM perdure.mail AS mail WHERE mail.run = ANY($run::int8[]) AND mail.unread;

-- name: judge_starts
-- For each start the run of its idempotency key, unless that has expired, and the newest run of its public id; the last
-- column says which of the two it is.
SELECT start.place, run.key, run.id, run.workflow, run.digest, run.seed, run.parent, run.parent_step, run.created_at,
    found.by_key
FROM unnest($namespace::text[], $id::text[], $scope::text[], $idempotency_key::text[]) WITH ORDINALITY
    AS start (namespace, id, scope, idempotency_key, place)
CROSS JOIN LATERAL (
    SELECT same.run AS key, true AS by_key FROM perdure.idempotency AS same
    WHERE same.namespace = start.namespace AND same.scope = start.scope AND same.key = start.idempotency_key
        AND (same.expires_at IS NULL OR same.expires_at > $now::int8)
    UNION ALL (
        SELECT newest.key, false FROM perdure.runs AS newest
        WHERE newest.namespace = start.namespace AND newest.id = start.id
        ORDER BY newest.generation DESC LIMIT 1
    )
) AS found
CROSS JOIN LATERAL (
    -- OFFSET 0: one by one, as PostgreSQL 13 would rather walk along all runs.
    SELECT one.* FROM perdure.runs AS one WHERE one.key = found.key OFFSET 0
) AS run
ORDER BY start.place, found.by_key DESC;

-- name: judge_sends
-- What became of messages that were not kept: their run, its status if it has ended, whether the message is there, and
-- how many are unread.
SELECT sent.place, run.key, CASE WHEN run.ended_at IS NOT NULL THEN run.status END,
    (SELECT count(*) > 0 FROM perdure.mail AS mail WHERE mail.run = run.key AND mail.id = sent.id),
    (SELECT count(*) FROM perdure.mail AS mail WHERE mail.run = run.key AND mail.unread)
FROM unnest(
    $to_run::int8[], $to_parent::int8[], $to_namespace::text[], $to_id::text[], $id::text[]
) WITH ORDINALITY AS sent (to_run, to_parent, to_namespace, to_id, id, place)
JOIN perdure.runs AS run ON run.key = CASE
    WHEN sent.to_run <> -1 THEN sent.to_run
    WHEN sent.to_parent <> -1 THEN (
        SELECT max(child.key) FROM perdure.runs AS child
        WHERE child.parent = sent.to_parent AND child.parent_step = sent.to_id
    )
    ELSE (
        SELECT newest.key FROM perdure.runs AS newest
        WHERE newest.namespace = sent.to_namespace AND newest.id = sent.to_id
        ORDER BY newest.generation DESC LIMIT 1
    )
END;

-- name: fence_step
-- Write the turn of a transaction step, if its fence holds, and promise the record of the step: the transaction cannot be
-- committed without. One turn that ends no run, with plain parameters: its plan is the same whatever they are, and so
-- it is kept also by a session that plans as a step's function would have it.
WITH written AS (
    UPDATE perdure.runs AS run SET
        /* turn_state */
    FROM (SELECT
        $run::int8 AS run, $owner::text AS owner, $epoch::int8 AS epoch, $version::int8 AS version, $last::text AS last,
        $id::text AS id, $status::text AS status, $before::text AS before, $due_at::int8 AS due_at,
        $wake_at::int8 AS wake_at, $waits::text AS waits, $flags::int4 AS flags, $attempt::int4 AS attempt,
        $follows::int4 AS follows, $events::int4 AS events, $bytes::int8 AS bytes, $result::text AS result,
        $error::text AS error
    ) AS turn
    WHERE
        /* turn_fence */
    RETURNING run.key
)
INSERT INTO perdure.pledges (run, kept) SELECT written.key, 0 FROM written RETURNING run;

-- name: record_step
-- Append the events of a step to the history, under the turn that its fence has written, and keep the promise. Where
-- that turn is not there any more it fails by a division, and with it the transaction: the function had begun another.
WITH counted AS (
    UPDATE perdure.runs AS run SET
        history_events = run.history_events + $count::int4, history_bytes = run.history_bytes + $bytes::int8
    WHERE run.key = $run::int8 AND run.turn = $turn::text AND run.history_events = $follows::int4
    RETURNING run.key
), appended AS (
    INSERT INTO perdure.history (run, seq, event)
    SELECT counted.key, $follows::int4 + new.place, new.event
    FROM counted CROSS JOIN unnest($events::text[]) WITH ORDINALITY AS new (event, place)
), kept AS (
    DELETE FROM perdure.pledges AS pledge USING counted WHERE pledge.run = counted.key
)
SELECT 1 / count(*) FROM counted;
