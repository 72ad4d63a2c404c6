-- name: add_event
INSERT INTO outbox (lane, user_id, event_id, channel, type, version, message_key, value)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8);

-- name: lock_lane
-- No row: another replica is sending this lane. While it is sent the transaction is silent for longer than others ($2,
-- ms).
SELECT lane, set_config('idle_in_transaction_session_timeout', $2, true) FROM outbox_lanes
WHERE lane = $1 FOR UPDATE SKIP LOCKED;

-- name: list_lane
-- Without users who have a row that is not due yet: their later rows stay behind it. Without channels whose topic
-- accepts nothing now ($3): however many rows wait, they fill no lane.
SELECT id, user_id, event_id, channel, type, version, message_key, value, attempts FROM outbox
WHERE lane = $1 AND parked_at IS NULL AND channel <> ALL ($3::text[])
  AND user_id NOT IN (SELECT user_id FROM outbox WHERE lane = $1 AND parked_at IS NULL AND retry_at > now())
ORDER BY id LIMIT $2;

-- name: delete_events
DELETE FROM outbox WHERE id = ANY ($1::bigint[]);

-- name: note_refusal
-- Without a time to wait ($3) the row is parked.
UPDATE outbox
SET attempts = attempts + 1, last_error = $2, retry_at = now() + $3::interval,
    parked_at = CASE WHEN $3::interval IS NULL THEN now() END
WHERE id = $1;

-- name: postpone_event
UPDATE outbox SET retry_at = now() + $2::interval WHERE id = $1;

-- name: list_waiting_lanes
SELECT lane FROM outbox_lanes l WHERE EXISTS (
    SELECT FROM outbox WHERE outbox.lane = l.lane AND parked_at IS NULL AND channel <> ALL ($1::text[])
);

-- name: backlog
-- Counted only so far ($1): an outbox of many millions is not read through every few seconds.
SELECT (SELECT count(*) FROM (SELECT FROM outbox WHERE parked_at IS NULL LIMIT $1) waiting) AS events,
       (SELECT count(*) FROM (SELECT FROM outbox WHERE parked_at IS NOT NULL LIMIT $1) parked) AS parked,
       coalesce(extract(epoch FROM now() - (
           SELECT created_at FROM outbox WHERE parked_at IS NULL ORDER BY id LIMIT 1
       )), 0)::float8 AS oldest_s;

-- name: list_parked
-- Never the value, which is about a person.
SELECT id, type, channel, user_id, attempts, last_error,
       extract(epoch FROM now() - created_at)::float8 AS age_s
FROM outbox WHERE parked_at IS NOT NULL ORDER BY id LIMIT $1;

-- name: lock_users_of_parked
-- A transaction that adds events of a user holds this lock: nothing newer arrives in between.
SELECT FROM users WHERE id IN (
    SELECT user_id FROM outbox WHERE parked_at IS NOT NULL AND ($1::bigint[] IS NULL OR id = ANY ($1))
)
ORDER BY id FOR NO KEY UPDATE;

-- name: delete_overtaken
-- Parked rows of the compacted topic that, sent now, would replace a newer record of their key, or for ever: those
-- that concern no token any more, records of an epoch below a later one, and tombstones of a key that is announced.
DELETE FROM outbox o
WHERE parked_at IS NOT NULL AND ($1::bigint[] IS NULL OR id = ANY ($1))
  AND CASE
      WHEN channel <> 'revocations' THEN false
      WHEN value IS NULL THEN EXISTS (
          SELECT FROM revocations r
          WHERE r.user_id = o.user_id AND r.announced_until IS NOT NULL AND (
              CASE WHEN r.session_id IS NULL THEN 'user:' || r.user_id
              ELSE rtrim(translate(encode(r.session_id, 'base64'), '+/', '-_'), '=') END
          ) = o.message_key
      )
      ELSE (convert_from(value, 'UTF8')::jsonb ->> 'until')::timestamptz < now() OR EXISTS (
          SELECT FROM revocations r
          WHERE r.user_id = o.user_id AND r.epoch > (convert_from(o.value, 'UTF8')::jsonb ->> 'epoch')::bigint
      )
  END
RETURNING id;

-- name: unpark_events
UPDATE outbox SET parked_at = NULL, retry_at = NULL, attempts = 0
WHERE parked_at IS NOT NULL AND ($1::bigint[] IS NULL OR id = ANY ($1))
RETURNING id;

-- name: drop_parked
DELETE FROM outbox WHERE id = ANY ($1::bigint[]) AND parked_at IS NOT NULL RETURNING id;
