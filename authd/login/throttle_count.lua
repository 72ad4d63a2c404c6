-- Counts one event whatever becomes of it, at most the limit in a window that begins with the first and is not extended.
-- Run again after a lost reply it counts twice.
--
-- KEYS  1 hash, a throttle counter (expires when nothing in it counts any more)
-- ARGV  1 deadline, ms of Redis's time    2 limit, events    3 the window, ms
--
-- Returns {counted, now} | {locked, now, ms until the window ends} | {late, now}
-- include: throttle_format

local now = now_ms()
if now > tonumber(ARGV[1]) then return { 'late', now } end
local counter = load_counter(KEYS[1], now, tonumber(ARGV[3]))
if counter.failures >= tonumber(ARGV[2]) then return { 'locked', now, counter.counts_until - now } end

store_failures(KEYS[1], counter.failures + 1, counter.failures > 0 and counter.counts_until or now + tonumber(ARGV[3]))
tidy(KEYS[1], now)
return { 'counted', now }
