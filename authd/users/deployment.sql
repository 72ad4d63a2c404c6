-- name: move_user_ids
-- Ahead of every id that the restored database knows by $1, also of users who are deleted by now.
SELECT setval('users_id_seq', greatest(last_value, (SELECT max(id) FROM users)) + $1) AS last_id FROM users_id_seq;

-- name: mark_restored
INSERT INTO deployment_state (restored_at) VALUES (now())
ON CONFLICT (is_only) DO UPDATE SET restored_at = excluded.restored_at, log_id = excluded.log_id
RETURNING restored_at, log_id;
