-- Reads the clock of the key's node. Changes nothing.
--
-- KEYS  1 any key of the bucket (not read)
-- ARGV  none
--
-- Returns {seconds, microseconds}
local _ = KEYS[1]
return redis.call('TIME')
