-- Forgets the failures of a counter, and so its lock. Attempts under way keep their reservations and count when they
-- fail: an operator's command gives an attacker no more than the limit.
--
-- KEYS  1 hash, a throttle counter (expires when nothing in it counts any more)
-- ARGV  1 deadline, ms of Redis's time
--
-- Returns {forgiven, now, failures that counted} | {late, now}
-- include: throttle_format

local now = now_ms()
if now > tonumber(ARGV[1]) then return { 'late', now } end
local failures = load_counter(KEYS[1], now).failures
redis.call('HDEL', KEYS[1], 'n', 'until')
tidy(KEYS[1], now)
return { 'forgiven', now, failures }
