-- Rotates a session's refresh token, or says why not.
--
-- KEYS  1 hash of the user's sessions (expires with the last of its values)
--       2 string, the bucket's last applied revocation (no expiry)
--       3 stream, the bucket's events (no expiry; the relay empties it)
-- ARGV  1 deadline, ms of Redis's time        2 the highest revocation number that the caller knows
--       3 session id    4 epoch    5 counter    6 issued, ms: of the token presented
--       7 MAC key id of the successor         8 grace, ms
--       9 a refresh token's life, ms         10 a session's life, ms
--      11 the client's bytes                12 expires, ms: of the token presented
--      13 user id                           14 incarnation
--
-- Returns {status, now} and more:
--   rotated, value | repeated, value: the previous token within the grace; the successor is computed again from value
--   superseded: an older token within the grace of the last rotation, or while the clock is behind it; nothing ends
--   reused: the session ends | ended, reason | expired | unknown | late | behind, applied number
-- include: session_format
-- include: events/event_add

-- What clocks are slewed by without having been set back, ms.
local CLOCK_JITTER_MS = 1000

local now = now_ms()
if now > tonumber(ARGV[1]) then return { 'late', now } end
local applied = applied_number(KEYS[2])
if applied < tonumber(ARGV[2]) then return { 'behind', now, applied } end

local id, epoch, counter, grace = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[8])
local values = redis.call('HMGET', KEYS[1], id, 'e')
local s = unpack_value(values[1])
local floor, floor_reason = unpack_floor(values[2])
if epoch < floor then return { 'ended', now, floor_reason } end
if s and s.expires <= now then
    redis.call('HDEL', KEYS[1], id)
    s = nil
end
-- A replica whose clock is behind takes the token for a living one, and would rebuild what has expired. A token that
-- lives longer than what is stored is of a rotation that Redis lost: it is rebuilt.
if not s then return { tonumber(ARGV[12]) <= now and 'expired' or 'unknown', now } end
if s.state ~= LIVE then return { 'ended', now, s.reason } end

if counter < s.counter then
    -- The clock was set back, or this node's is behind the last one's: how long ago the last rotation was is not known.
    -- No successor is given out, for the grace would last as long as the step; and nothing ends, for this may be the
    -- second tab. Once the clock has caught up, an older token is what it was.
    if now < s.issued - CLOCK_JITTER_MS then return { 'superseded', now } end
    if now <= s.issued + grace then
        if counter == s.counter - 1 then return { 'repeated', now, values[1] } end
        return { 'superseded', now }
    end
elseif s.issued <= tonumber(ARGV[6]) + grace then
    -- The current token was issued at our last rotation. One from another time, or with a counter ahead of ours, means
    -- that Redis lost writes, and perhaps that somebody else went on from an older token. It is no theft if we last
    -- rotated before that token's time.
    s.key_id, s.counter, s.issued, s.client = tonumber(ARGV[7]), counter + 1, now, ARGV[11]
    s.expires = math.min(now + tonumber(ARGV[9]), s.created + tonumber(ARGV[10]))
    local value = pack_live(s)
    redis.call('HSET', KEYS[1], id, value)
    keep_until(KEYS[1], now, s.expires)
    return { 'rotated', now, value }
end
redis.call('HSET', KEYS[1], id, pack_tombstone(UNLOGGED, s.expires, 'reused'))
add_event(KEYS[3], nil, 'session.reuse_detected', 'u', ARGV[13], 'i', ARGV[14], 's', id)
return { 'reused', now }
