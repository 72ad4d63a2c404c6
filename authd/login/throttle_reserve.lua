-- Reserves one attempt, if failures and reservations together are below the limit: however many attempts run at once,
-- no more than the limit can fail. Run again with the same id, it answers the same and changes nothing.
--
-- KEYS  1 hash, a throttle counter (expires when nothing in it counts any more)
-- ARGV  1 deadline, ms of Redis's time    2 reservation id    3 limit, failures    4 a reservation's life, ms
--       5 the longest that failures count, ms
--
-- Returns {reserved, now} | {locked, now, ms until the lock ends} | {wait, now}: others decide first | {late, now}
-- include: throttle_format

local now = now_ms()
if now > tonumber(ARGV[1]) then return { 'late', now } end
local counter, limit = load_counter(KEYS[1], now, tonumber(ARGV[5]), tonumber(ARGV[4])), tonumber(ARGV[3])
local field = 'r:' .. ARGV[2]
if counter.reserved[field] then return { 'reserved', now } end
if counter.failures >= limit then return { 'locked', now, counter.counts_until - now } end
if counter.failures + counter.live >= limit then return { 'wait', now } end

redis.call('HSET', KEYS[1], field, string.format('%.0f', now + tonumber(ARGV[4])))
store_failures(KEYS[1], counter.failures, counter.counts_until)
tidy(KEYS[1], now)
return { 'reserved', now }
