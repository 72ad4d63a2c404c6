-- name: add_revocation
-- The next number of the bucket, taken in the caller's transaction: the head's row lock orders the commits, so numbers
-- appear without gaps. A transaction locks users before heads, everywhere.
WITH head AS (
    UPDATE revocation_heads SET last_number = last_number + 1 WHERE bucket = $1 RETURNING last_number
)
INSERT INTO revocations (bucket, number, user_id, session_id, epoch, reason, expires_at, announced_until)
SELECT $1, last_number, $2, $3, $4, $5, now() + $6::interval, now() + $7::interval FROM head
RETURNING number;

-- name: list_heads
SELECT bucket, last_number FROM revocation_heads WHERE last_number > 0;

-- name: list_revocations_after
-- What Redis has not applied yet, oldest first, and the bucket's head: rows that have expired are gone from between.
SELECT h.last_number AS head, r.number, r.user_id, r.session_id, r.epoch, r.reason, r.expires_at
FROM revocation_heads h
LEFT JOIN LATERAL (
    SELECT * FROM revocations WHERE bucket = h.bucket AND number > $2 ORDER BY number LIMIT $3
) r ON true
WHERE h.bucket = $1
ORDER BY r.number;

-- name: delete_expired_revocations
-- Not before its tombstone is promised.
DELETE FROM revocations WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM revocations WHERE expires_at < now() AND announced_until IS NULL ORDER BY expires_at LIMIT $1
));

-- name: lock_user
-- Also orders the transactions that promise events of one user.
SELECT FROM users WHERE id = $1 FOR NO KEY UPDATE;

-- name: find_session_revocation
SELECT reason FROM revocations WHERE session_id = $1 LIMIT 1;

-- name: lock_user_announced_over
SELECT id FROM users
WHERE id = (
    SELECT user_id FROM revocations JOIN users ON users.id = user_id
    WHERE announced_until < now() - interval '1 minute' ORDER BY announced_until LIMIT 1
)
FOR NO KEY UPDATE;

-- name: take_announced_over
UPDATE revocations SET announced_until = NULL
WHERE user_id = $1 AND announced_until < now() - interval '1 minute'
RETURNING session_id;

-- name: list_announced
-- Each session once, and NULL where all sessions below an epoch ended.
SELECT DISTINCT session_id FROM revocations WHERE user_id = $1 AND announced_until IS NOT NULL;
