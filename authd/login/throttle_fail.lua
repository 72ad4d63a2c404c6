-- Turns a reservation into a failure. Without the reservation (run again, or it expired) it changes nothing.
--
-- KEYS  1 hash, a throttle counter (expires when nothing in it counts any more)
--       2 stream, the bucket's events (no expiry; the relay empties it)
-- ARGV  1 deadline, ms of Redis's time    2 reservation id    3 limit, failures
--       4 how long failures count after the last one, and how long the lock holds after the limit's, ms
--       5 what is counted    6 user id, 0: no user's    7 address: for the event
--       8 the stream's bound for `login.locked`, 0: do not record it
--
-- Returns {status, now} and more:
--   locked, 1: this failure set the lock, event dropped since the stream is full
--   counted | unknown: no such reservation | late
-- include: throttle_format
-- include: events/event_add

local now = now_ms()
if now > tonumber(ARGV[1]) then return { 'late', now } end
local counter, limit = load_counter(KEYS[1], now, tonumber(ARGV[4])), tonumber(ARGV[3])
local field = 'r:' .. ARGV[2]
if not counter.reserved[field] then return { 'unknown', now } end

redis.call('HDEL', KEYS[1], field)
local was_locked = counter.failures >= limit
-- A lock's end is fixed, also against replicas that still run with another limit.
local counts_until = was_locked and counter.counts_until or now + tonumber(ARGV[4])
store_failures(KEYS[1], counter.failures + 1, counts_until)
tidy(KEYS[1], now)
if not was_locked and counter.failures + 1 >= limit then
    local stream_max = tonumber(ARGV[8])
    local is_recorded = stream_max == 0
        or add_event(KEYS[2], stream_max, 'login.locked', 'k', ARGV[5], 'u', ARGV[6], 'a', ARGV[7])
    return { 'locked', now, is_recorded and 0 or 1 }
end
return { 'counted', now }
