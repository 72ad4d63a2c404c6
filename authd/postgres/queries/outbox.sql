-- name: add_event
INSERT INTO outbox (lane, user_id, event_id, channel, type, version, message_key, value)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8);

-- name: lock_lane
-- No row: another replica is sending this lane.
SELECT lane FROM outbox_lanes WHERE lane = $1 FOR UPDATE SKIP LOCKED;

-- name: list_lane
SELECT id, user_id, event_id, channel, type, version, message_key, value FROM outbox
WHERE lane = $1 AND parked_at IS NULL AND user_id <> ALL ($3::bigint[])
ORDER BY id LIMIT $2;

-- name: delete_events
DELETE FROM outbox WHERE id = ANY ($1::bigint[]);

-- name: list_waiting_lanes
SELECT lane FROM outbox_lanes l WHERE EXISTS (SELECT FROM outbox WHERE outbox.lane = l.lane);

-- name: backlog
SELECT count(*) AS events, coalesce(extract(epoch FROM now() - min(created_at)), 0)::float8 AS oldest_s FROM outbox;
