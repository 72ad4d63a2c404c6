-- expand
-- Events for everybody, the topic of revocations, and rows that the broker refuses.

ALTER TABLE outbox
    -- NULL: the key that the settings name for the channel.
    ADD COLUMN message_key text,
    -- NULL in a compacted topic: a tombstone.
    ALTER COLUMN value DROP NOT NULL,
    ADD COLUMN attempts integer NOT NULL DEFAULT 0,
    ADD COLUMN last_error text,
    -- Refused by the broker: the row, and what its user has behind it, waits until then.
    ADD COLUMN retry_at timestamptz,
    -- Parked after too many attempts: later rows of the user go on, an operator decides.
    ADD COLUMN parked_at timestamptz;

DROP INDEX outbox_lane;
CREATE INDEX outbox_lane ON outbox (lane, id) WHERE parked_at IS NULL;
CREATE INDEX outbox_parked ON outbox (id) WHERE parked_at IS NOT NULL;
CREATE INDEX outbox_retry ON outbox (lane, retry_at) WHERE retry_at IS NOT NULL AND parked_at IS NULL;

-- Until when a verifier that never asks authd has to know of the row; NULL when its tombstone is enqueued.
ALTER TABLE revocations ADD COLUMN announced_until timestamptz;
CREATE INDEX revocations_announced ON revocations (announced_until) WHERE announced_until IS NOT NULL;
CREATE INDEX revocations_announced_user ON revocations (user_id) WHERE announced_until IS NOT NULL;
CREATE INDEX revocations_user_epoch ON revocations (user_id, epoch) WHERE epoch IS NOT NULL;
