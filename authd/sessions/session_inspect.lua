-- Says whether the session of an access token lives, and hands out the cached user with it. Changes nothing.
--
-- KEYS  1 hash of the user's sessions    2 string, the bucket's last applied revocation    3 string, the cached user
-- ARGV  1 the highest revocation number that the caller knows    2 session id
--
-- Returns {live, cached user or '', value} | {dead} | {behind, applied number}
-- include: session_format

local applied = applied_number(KEYS[2])
if applied < tonumber(ARGV[1]) then return { 'behind', applied } end
local value = redis.call('HGET', KEYS[1], ARGV[2])
local s = unpack_value(value)
if not s or s.state ~= LIVE or s.expires <= now_ms() then return { 'dead' } end
return { 'live', redis.call('GET', KEYS[3]) or '', value }
