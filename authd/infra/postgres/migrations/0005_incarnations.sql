-- contract: no row of the log can be added without an incarnation, so no older authd can end a session.
-- An id may be given twice after a restore or a failover of Postgres. What tokens and Redis hold of a user therefore
-- names its incarnation too, which is drawn for each row. A function that is volatile fills the rows of before one by one.

ALTER TABLE users
    -- 32 random bits (the last of a UUID of version 4), never 0.
    ADD COLUMN incarnation bigint NOT NULL
        DEFAULT greatest(1, ('x' || right(gen_random_uuid()::text, 8))::bit(32)::bigint)
        CHECK (incarnation BETWEEN 1 AND 4294967295);

-- 0: a row of before whose user is gone.
ALTER TABLE revocations ADD COLUMN incarnation bigint;
UPDATE revocations r
SET incarnation = coalesce((SELECT u.incarnation FROM users u WHERE u.id = r.user_id), 0);
ALTER TABLE revocations ALTER COLUMN incarnation SET NOT NULL;

-- A user that is deleted, by whomever, ends: the row of the log is in the transaction of the deletion, so that no replica
-- serves a session of a user who is gone. It is kept as long as a session may live at most (AUTHD_SESSION_TTL_S).
-- Unlike the endings that authd writes, it is not announced: SQL knows neither topics nor the form of records.
CREATE FUNCTION end_sessions_of_deleted_user() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
DECLARE
    taken bigint;
BEGIN
    UPDATE revocation_heads SET last_number = last_number + 1 WHERE bucket = OLD.id % 256
    RETURNING last_number INTO STRICT taken;
    INSERT INTO revocations (bucket, number, user_id, incarnation, epoch, reason, expires_at)
    VALUES (OLD.id % 256, taken, OLD.id, OLD.incarnation, OLD.version + 1, 'user_deleted', now() + interval '366 days');
    RETURN NULL;
END
$$;
CREATE TRIGGER user_deleted AFTER DELETE ON users
    FOR EACH ROW EXECUTE FUNCTION end_sessions_of_deleted_user();

-- What is true of the deployment as a whole: one row.
CREATE TABLE deployment_state (
    is_only     boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    -- When `authd restored` was last run: Postgres may have forgotten what was used up before.
    restored_at timestamptz,
    -- Another one after each restore: numbers of the log of before mean nothing then.
    log_id      uuid NOT NULL DEFAULT gen_random_uuid()
);
INSERT INTO deployment_state DEFAULT VALUES;
