-- Ends a reservation with a success, which forgets the failures before it. Without the reservation (run again, or it
-- expired) it changes nothing: failures may have been counted since.
--
-- KEYS  1 hash, a throttle counter (expires when nothing in it counts any more)
-- ARGV  1 deadline, ms of Redis's time    2 reservation id
--
-- Returns {cleared, now} | {unknown, now}: no such reservation | {late, now}
-- include: throttle_format

local now = now_ms()
if now > tonumber(ARGV[1]) then return { 'late', now } end
local field = 'r:' .. ARGV[2]
if not load_counter(KEYS[1], now).reserved[field] then return { 'unknown', now } end

redis.call('HDEL', KEYS[1], field, 'n', 'until')
tidy(KEYS[1], now)
return { 'cleared', now }
