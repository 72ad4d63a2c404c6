-- name: lock_relay
-- False: another replica is moving this bucket's events. Held until the transaction ends.
SELECT pg_try_advisory_xact_lock($1, $2);

-- name: lock_relayed_users
-- All at once and in one order, before any head: see revocations.sql.
SELECT FROM users WHERE id = ANY ($1::bigint[]) ORDER BY id FOR NO KEY UPDATE;
