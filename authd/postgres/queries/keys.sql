-- name: lock_keys
-- One replica at a time makes keys.
LOCK TABLE keys IN SHARE ROW EXCLUSIVE MODE;

-- name: list_keys
SELECT id, purpose, kid, sealed, active_at, created_at FROM keys ORDER BY active_at, id;

-- name: insert_next_key
INSERT INTO keys (purpose, kid, sealed, active_at) VALUES ($1, $2, $3, now() + $4);

-- name: insert_key_if_due
-- The first key of a purpose is active since ever, for a replica whose clock is behind must be able to use it. Another
-- one is due when the newest is older than $5.
INSERT INTO keys (purpose, kid, sealed, active_at)
SELECT $1, $2, $3, CASE WHEN count(*) = 0 THEN to_timestamp(0) ELSE now() + $4 END
FROM keys WHERE purpose = $1
HAVING count(*) = 0 OR max(greatest(active_at, created_at)) + $5 < now();

-- name: delete_keys
DELETE FROM keys WHERE id = ANY ($1::integer[]);
