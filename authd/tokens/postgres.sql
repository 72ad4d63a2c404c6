-- name: lock_keys
-- One replica at a time makes keys.
LOCK TABLE keys IN SHARE ROW EXCLUSIVE MODE;

-- name: list_keys
-- A key is over when its successor has signed for longer than any token of the key lives ($1: mac, $2: others).
SELECT k.id, k.purpose, k.kid, k.sealed, k.active_at, k.created_at, k.purpose <> 'data' AND EXISTS (
    SELECT FROM keys later
    WHERE later.purpose = k.purpose AND (later.active_at, later.id) > (k.active_at, k.id)
      AND later.active_at + CASE k.purpose WHEN 'mac' THEN $1::interval ELSE $2::interval END < now()
) AS is_over
FROM keys k ORDER BY k.active_at, k.id;

-- name: delete_keys_over
-- The same condition: what a replica has read before may be wrong by now.
DELETE FROM keys k WHERE k.purpose <> 'data' AND EXISTS (
    SELECT FROM keys later
    WHERE later.purpose = k.purpose AND (later.active_at, later.id) > (k.active_at, k.id)
      AND later.active_at + CASE k.purpose WHEN 'mac' THEN $1::interval ELSE $2::interval END < now()
);

-- name: insert_next_key
INSERT INTO keys (purpose, kid, sealed, active_at) VALUES ($1, $2, $3, now() + $4);

-- name: insert_key_if_due
-- The first key of a purpose is active from the beginning, for a replica whose clock is behind must be able to use it.
-- Another one is due when the newest is older than $5, which is never where $5 is NULL.
INSERT INTO keys (purpose, kid, sealed, active_at)
SELECT $1, $2, $3, CASE WHEN count(*) = 0 THEN to_timestamp(0) ELSE now() + $4 END
FROM keys WHERE purpose = $1
HAVING count(*) = 0 OR max(greatest(active_at, created_at)) + $5::interval < now();

-- name: set_seal
UPDATE keys SET sealed = $2 WHERE id = $1;
