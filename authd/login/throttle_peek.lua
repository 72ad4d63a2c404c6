-- Reads how long a counter is locked. Changes nothing but a time that Redis's clock, set back, has left too far ahead.
--
-- KEYS  1 hash, a throttle counter (expires when nothing in it counts any more)
-- ARGV  1 limit, failures    2 the longest that failures count, ms
--
-- Returns ms until the lock ends, 0 if it is not locked
-- include: throttle_format

local now = now_ms()
local counter = load_counter(KEYS[1], now, tonumber(ARGV[2]))
if counter.failures < tonumber(ARGV[1]) then return 0 end
return counter.counts_until - now
