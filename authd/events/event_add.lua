-- Records an event in the bucket's stream; the relay moves it to the outbox (authd/sessions/relay.py).
-- A full stream takes no best-effort event (one with a `stream_max`); what the revocation log needs is always taken.
-- The fields that follow the kind have the names of FIELDS in authd/events/redis.py.
local function add_event(key, stream_max, kind, ...)
    if stream_max and redis.call('XLEN', key) >= stream_max then return false end
    redis.call('XADD', key, '*', 't', kind, ...)
    return true
end
