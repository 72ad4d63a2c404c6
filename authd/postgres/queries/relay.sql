-- name: lock_relay
-- False: another replica is moving this bucket's events. Held until the transaction ends.
SELECT pg_try_advisory_xact_lock($1, $2);

-- name: lock_relayed_user
SELECT FROM users WHERE id = $1 FOR NO KEY UPDATE;

-- name: find_relayed_revocation
SELECT FROM revocations WHERE session_id = $1 LIMIT 1;
