-- expand
-- Users, the revocation log, the key ring and the outbox.

CREATE TABLE users (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    username      text NOT NULL,
    -- The one form of an e-mail: see authd.users.usernames.username_key.
    username_key  text NOT NULL UNIQUE,
    full_name     text NOT NULL,
    password_hash text NOT NULL,
    -- Raised by every change of the row: a cache never replaces a higher one.
    version       bigint NOT NULL DEFAULT 1,
    -- The version at which all sessions were last ended: a session opened at a lower epoch is dead.
    epoch         bigint NOT NULL DEFAULT 1,
    disabled_at   timestamptz,
    created_at    timestamptz NOT NULL DEFAULT now()
);

-- Every ending of a session is a row, numbered without gaps in its bucket. Redis applies them in that order and keeps
-- the last number: if it goes back in time, the missing rows are applied again before it serves the bucket.
CREATE TABLE revocation_heads (
    bucket      smallint PRIMARY KEY,
    last_number bigint NOT NULL DEFAULT 0
);
INSERT INTO revocation_heads (bucket) SELECT generate_series(0, 255);

CREATE TABLE revocations (
    bucket     smallint NOT NULL,
    number     bigint NOT NULL,
    user_id    bigint NOT NULL,
    -- Exactly one of the two: the session that ended, or the epoch below which all of the user's did.
    session_id bytea CHECK (octet_length(session_id) = 16),
    epoch      bigint,
    reason     text NOT NULL,
    ended_at   timestamptz NOT NULL DEFAULT now(),
    -- When the last token that the row can concern has expired.
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (bucket, number),
    CHECK ((session_id IS NULL) <> (epoch IS NULL))
);
CREATE INDEX revocations_session ON revocations (session_id) WHERE session_id IS NOT NULL;
CREATE INDEX revocations_expiry ON revocations (expires_at);

CREATE TABLE keys (
    id         integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    -- 'mac', or the signing algorithm.
    purpose    text NOT NULL,
    kid        text NOT NULL UNIQUE,
    -- A compact JWE under AUTHD_SECRET.
    sealed     text NOT NULL,
    active_at  timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- A row leaves when the broker has acknowledged it.
CREATE TABLE outbox (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    lane       smallint NOT NULL,
    user_id    bigint NOT NULL,
    event_id   uuid NOT NULL,
    channel    text NOT NULL,
    type       text NOT NULL,
    version    smallint NOT NULL,
    value      bytea NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX outbox_lane ON outbox (lane, id);

-- The publisher locks a lane, not its rows: one sender for each user, in the order of ids.
CREATE TABLE outbox_lanes (lane smallint PRIMARY KEY);
INSERT INTO outbox_lanes SELECT generate_series(0, 255);
