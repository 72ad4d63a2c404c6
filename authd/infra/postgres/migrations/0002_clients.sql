-- expand
-- The services that may ask about tokens and revoke them.

CREATE TABLE clients (
    client_id   text PRIMARY KEY,
    name        text NOT NULL,
    -- SHA-256: the secret is 256 random bits, which no dictionary holds.
    secret_hash bytea NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now()
);
