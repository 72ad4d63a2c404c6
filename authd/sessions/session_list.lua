-- Lists a user's live sessions. Changes nothing.
--
-- KEYS  1 hash of the user's sessions    2 string, the bucket's last applied revocation
-- ARGV  1 the highest revocation number that the caller knows
--
-- Returns {listed, id, value, id, value ...} | {behind, applied number}
-- include: session_format

local applied = applied_number(KEYS[2])
if applied < tonumber(ARGV[1]) then return { 'behind', applied } end
local now, reply = now_ms(), { 'listed' }
local values = redis.call('HGETALL', KEYS[1])
for i = 1, #values, 2 do
    local s = values[i] ~= 'e' and unpack_value(values[i + 1])
    if s and s.state == LIVE and s.expires > now then
        reply[#reply + 1] = values[i]
        reply[#reply + 1] = values[i + 1]
    end
end
return reply
