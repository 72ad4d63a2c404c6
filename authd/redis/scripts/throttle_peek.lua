-- Reads how long a counter is locked. Changes nothing.
--
-- KEYS  1 hash, a throttle counter (expires when nothing in it counts any more)
-- ARGV  1 limit, failures
--
-- Returns ms until the lock ends, 0 if it is not locked
-- include: throttle_format

local now = now_ms()
local counter = load_counter(KEYS[1], now)
if counter.failures < tonumber(ARGV[1]) then return 0 end
return counter.counts_until - now
