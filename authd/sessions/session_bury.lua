-- Remembers for a while that Postgres refused to rebuild a session, so that a dead token does not ask it each time.
--
-- KEYS  1 hash of the user's sessions (expires with the last of its values)
-- ARGV  1 deadline, ms of Redis's time    2 session id    3 reason    4 a refusal's life, ms
--
-- Returns {buried, now} | {late, now}
-- include: session_format

local now = now_ms()
if now > tonumber(ARGV[1]) then return { 'late', now } end
local expires = now + tonumber(ARGV[4])
if redis.call('HSETNX', KEYS[1], ARGV[2], pack_tombstone(LOGGED, expires, ARGV[3])) == 1 then
    keep_until(KEYS[1], now, expires)
end
return { 'buried', now }
