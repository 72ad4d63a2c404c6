-- name: lock_keys
-- One replica at a time makes keys.
LOCK TABLE keys IN SHARE ROW EXCLUSIVE MODE;

-- name: list_keys
SELECT id, purpose, kid, sealed, active_at FROM keys ORDER BY active_at, id;

-- name: insert_first_key
-- Active since ever: a replica whose clock is behind must be able to use it.
INSERT INTO keys (purpose, kid, sealed, active_at) VALUES ($1, $2, $3, to_timestamp(0));
