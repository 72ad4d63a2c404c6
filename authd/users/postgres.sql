-- name: insert_user
-- One row, or none where the username is taken.
INSERT INTO users (username, username_key, full_name, password_hash)
VALUES ($1, $2, $3, $4)
ON CONFLICT (username_key) DO NOTHING
RETURNING id, created_at;

-- name: find_user_by_username_key
-- The user and the number of the bucket's last revocation, read in one snapshot.
SELECT u.id, u.incarnation, u.username, u.full_name, u.password_hash, u.password_version, u.version,
       u.epoch, u.disabled_at IS NOT NULL AS disabled, u.created_at, h.last_number AS revocation
FROM users u JOIN revocation_heads h ON h.bucket = u.id % 256
WHERE u.username_key = $1;

-- name: find_user
-- Without an incarnation ($2): the user who has the id now.
SELECT u.id, u.incarnation, u.username, u.full_name, u.password_hash, u.password_version, u.version,
       u.epoch, u.disabled_at IS NOT NULL AS disabled, u.created_at, h.last_number AS revocation
FROM users u JOIN revocation_heads h ON h.bucket = u.id % 256
WHERE u.id = $1 AND ($2::bigint IS NULL OR u.incarnation = $2);

-- name: find_user_of_session
-- The user, the number of the bucket's last revocation and why the session ended, if it did, in one snapshot.
SELECT u.id, u.incarnation, u.username, u.full_name, u.password_hash, u.password_version, u.version,
       u.epoch, u.disabled_at IS NOT NULL AS disabled, u.created_at, h.last_number AS revocation,
       (SELECT reason FROM revocations WHERE session_id = $3 ORDER BY number LIMIT 1) AS ended
FROM users u JOIN revocation_heads h ON h.bucket = u.id % 256
WHERE u.id = $1 AND u.incarnation = $2;

-- name: set_password_hash
-- Renewal of the hash of the same password: only if nobody changed the password meanwhile.
UPDATE users SET password_hash = $3 WHERE id = $1 AND password_hash = $2 RETURNING id;

-- name: raise_epoch
-- Ends all sessions that were opened before. Locks the user's row first: see revocations.sql.
UPDATE users SET version = version + 1, epoch = version + 1 WHERE id = $1 AND incarnation = $2
RETURNING epoch;

-- name: disable_user
-- Also ends the use of device tokens: a stolen one is useless when the user is enabled again.
UPDATE users
SET version = version + 1, epoch = version + 1, password_version = password_version + 1, disabled_at = now()
WHERE username_key = $1 AND disabled_at IS NULL
RETURNING id, incarnation, epoch;

-- name: enable_user
-- The epoch is raised too, for its revocation row drops the cached user.
UPDATE users SET version = version + 1, epoch = version + 1, disabled_at = NULL
WHERE username_key = $1 AND disabled_at IS NOT NULL
RETURNING id, incarnation, epoch;
