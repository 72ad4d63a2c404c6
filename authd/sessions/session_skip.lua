-- Moves the bucket's last applied revocation over rows that have expired and concern no living token.
--
-- KEYS  1 string, the bucket's last applied revocation (no expiry)
-- ARGV  1 deadline, ms of Redis's time    2 the number that must be the last applied one    3 the new number
--
-- Returns {applied, now} | {moved, now, applied number} | {late, now}
-- include: session_format

local now = now_ms()
if now > tonumber(ARGV[1]) then return { 'late', now } end
local applied = applied_number(KEYS[1])
if applied ~= tonumber(ARGV[2]) then return { 'moved', now, applied } end
redis.call('SET', KEYS[1], ARGV[3])
return { 'applied', now }
