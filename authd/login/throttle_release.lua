-- Ends a reservation that counts nothing. Run again, it changes nothing.
--
-- KEYS  1 hash, a throttle counter (expires when nothing in it counts any more)
-- ARGV  1 deadline, ms of Redis's time    2 reservation id
--
-- Returns {released, now} | {late, now}
-- include: throttle_format

local now = now_ms()
if now > tonumber(ARGV[1]) then return { 'late', now } end
if redis.call('HDEL', KEYS[1], 'r:' .. ARGV[2]) == 1 then tidy(KEYS[1], now) end
return { 'released', now }
