-- name: add_epoch_revocation
-- The next number of the bucket, taken in the caller's transaction: the head's row lock orders the commits, so numbers
-- appear without gaps. A transaction locks users before heads, everywhere.
WITH head AS (
    UPDATE revocation_heads SET last_number = last_number + 1 WHERE bucket = $1 RETURNING last_number
)
INSERT INTO revocations (bucket, number, user_id, incarnation, epoch, reason, expires_at, announced_until)
SELECT $1, last_number, $2, $3, $4, $5, now() + $6::interval, now() + $7::interval FROM head
RETURNING number;

-- name: add_session_revocations
-- The next numbers of the bucket, in the order given; see above.
WITH head AS (
    UPDATE revocation_heads SET last_number = last_number + cardinality($4::bytea[])
    WHERE bucket = $1 RETURNING last_number
)
INSERT INTO revocations (bucket, number, user_id, incarnation, session_id, reason, expires_at, announced_until)
SELECT $1, last_number - cardinality($4::bytea[]) + place, user_id, incarnation, session_id, reason,
       now() + $6::interval, now() + $7::interval
FROM head, unnest($2::bigint[], $3::bigint[], $4::bytea[], $5::text[])
    WITH ORDINALITY AS ended (user_id, incarnation, session_id, reason, place)
RETURNING number;

-- name: list_heads
SELECT bucket, last_number FROM revocation_heads WHERE last_number > 0;

-- name: list_revocations_after
-- What Redis has not applied yet, oldest first, and the bucket's head: rows that have expired are gone from between.
SELECT h.last_number AS head, r.number, r.user_id, r.incarnation, r.session_id, r.epoch, r.reason
FROM revocation_heads h
LEFT JOIN LATERAL (
    SELECT * FROM revocations WHERE bucket = h.bucket AND number > $2 ORDER BY number LIMIT $3
) r ON true
WHERE h.bucket = $1
ORDER BY r.number;

-- name: delete_expired_revocations
-- Only after its tombstone was enqueued.
DELETE FROM revocations WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM revocations WHERE expires_at < now() AND announced_until IS NULL ORDER BY expires_at LIMIT $1
));

-- name: lock_user
-- Also orders the transactions that enqueue events of one user.
SELECT FROM users WHERE id = $1 FOR NO KEY UPDATE;

-- name: find_session_revocations
SELECT DISTINCT session_id FROM revocations WHERE session_id = ANY ($1::bytea[]);

-- name: find_user_announced_over
-- The user may be deleted.
SELECT user_id FROM revocations
WHERE announced_until < now() - interval '1 minute' ORDER BY announced_until LIMIT 1;

-- name: take_announced_over
UPDATE revocations SET announced_until = NULL
WHERE user_id = $1 AND announced_until < now() - interval '1 minute'
RETURNING session_id;

-- name: list_announced
-- Each session once, and NULL where all sessions below an epoch ended.
SELECT DISTINCT session_id FROM revocations WHERE user_id = $1 AND announced_until IS NOT NULL;

-- name: lock_relay
-- False: another replica is moving this bucket's events. Held until the transaction ends.
SELECT pg_try_advisory_xact_lock($1, $2);

-- name: lock_relayed_users
-- All at once and in one order, before any head: see lock_user.
SELECT FROM users WHERE id = ANY ($1::bigint[]) ORDER BY id FOR NO KEY UPDATE;
