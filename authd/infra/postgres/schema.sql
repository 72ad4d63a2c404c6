-- The schema that the migrations lead to, for readers: nothing runs this file. A test holds it equal to the chain of
-- migrations, which make every database, old or new.

-- Made by migrate.py before the first migration.
CREATE TABLE authd_migrations (
    name       text PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE users (
    id               bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    username         text NOT NULL,
    -- The one form of an e-mail: see authd.users.usernames.username_key.
    username_key     text NOT NULL UNIQUE,
    full_name        text NOT NULL,
    password_hash    text NOT NULL,
    -- Raised by every change of the row: a cache never replaces a higher one.
    version          bigint NOT NULL DEFAULT 1,
    -- The version at which all sessions were last ended: a session opened at a lower epoch is dead.
    epoch            bigint NOT NULL DEFAULT 1,
    disabled_at      timestamptz,
    created_at       timestamptz NOT NULL DEFAULT now(),
    -- Raised by whatever sets another password, which ends the use of device tokens.
    password_version integer NOT NULL DEFAULT 1,
    -- Tells apart two users with one id, which a restore of Postgres may give twice. 32 random bits, never 0.
    incarnation      bigint NOT NULL
        DEFAULT greatest(1, ('x' || right(gen_random_uuid()::text, 8))::bit(32)::bigint)
        CHECK (incarnation BETWEEN 1 AND 4294967295)
);

-- Every ending of a session is a row, numbered without gaps in its bucket. Redis applies them in that order and keeps
-- the last number: if it goes back in time, the missing rows are applied again before it serves the bucket.
CREATE TABLE revocation_heads (
    bucket      smallint PRIMARY KEY,
    last_number bigint NOT NULL DEFAULT 0
);
INSERT INTO revocation_heads (bucket) SELECT generate_series(0, 255);

CREATE TABLE revocations (
    bucket          smallint NOT NULL,
    number          bigint NOT NULL,
    user_id         bigint NOT NULL,
    -- Exactly one of the two: the session that ended, or the epoch below which all of the user's did.
    session_id      bytea CHECK (octet_length(session_id) = 16),
    epoch           bigint,
    reason          text NOT NULL,
    ended_at        timestamptz NOT NULL DEFAULT now(),
    -- When the last token that the row can concern has expired.
    expires_at      timestamptz NOT NULL,
    -- Until when a verifier that never asks authd has to know of the row; NULL when its tombstone is enqueued.
    announced_until timestamptz,
    -- 0: the row is older than incarnations, and its user is gone.
    incarnation     bigint NOT NULL,
    PRIMARY KEY (bucket, number),
    CHECK ((session_id IS NULL) <> (epoch IS NULL))
);
CREATE INDEX revocations_session ON revocations (session_id) WHERE session_id IS NOT NULL;
CREATE INDEX revocations_expiry ON revocations (expires_at);
CREATE INDEX revocations_announced ON revocations (announced_until) WHERE announced_until IS NOT NULL;
CREATE INDEX revocations_announced_user ON revocations (user_id) WHERE announced_until IS NOT NULL;
CREATE INDEX revocations_user_epoch ON revocations (user_id, epoch) WHERE epoch IS NOT NULL;

CREATE TABLE keys (
    id         integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- 'mac', 'data', or the signing algorithm.
    purpose    text NOT NULL,
    kid        text NOT NULL UNIQUE,
    -- A compact JWE under AUTHD_SECRET.
    sealed     text NOT NULL,
    active_at  timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- A row leaves when the broker has acknowledged it.
CREATE TABLE outbox (
    id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    lane        smallint NOT NULL,
    user_id     bigint NOT NULL,
    event_id    uuid NOT NULL,
    channel     text NOT NULL,
    type        text NOT NULL,
    version     smallint NOT NULL,
    -- NULL in a compacted topic: a tombstone.
    value       bytea,
    created_at  timestamptz NOT NULL DEFAULT now(),
    -- NULL: the key that the settings name for the channel.
    message_key text,
    attempts    integer NOT NULL DEFAULT 0,
    last_error  text,
    -- Refused by the broker: the row, and what its user has behind it, waits until then.
    retry_at    timestamptz,
    -- Parked after too many attempts: later rows of the user go on, an operator decides.
    parked_at   timestamptz
);
CREATE INDEX outbox_lane ON outbox (lane, id) WHERE parked_at IS NULL;
CREATE INDEX outbox_parked ON outbox (id) WHERE parked_at IS NOT NULL;
CREATE INDEX outbox_retry ON outbox (lane, retry_at) WHERE retry_at IS NOT NULL AND parked_at IS NULL;

-- The publisher locks a lane, not its rows: one sender for each user, in the order of ids.
CREATE TABLE outbox_lanes (lane smallint PRIMARY KEY);
INSERT INTO outbox_lanes SELECT generate_series(0, 255);

-- The services that may ask about tokens and revoke them.
CREATE TABLE clients (
    client_id   text PRIMARY KEY,
    name        text NOT NULL,
    -- SHA-256: the secret is 256 random bits, which no dictionary holds.
    secret_hash bytea NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now()
);

-- A deleted user's sessions end in the transaction of the deletion: no replica serves a user who is gone.
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
