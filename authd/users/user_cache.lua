-- Caches a user's row, unless a newer one is there or was announced.
--
-- KEYS  1 string `<version>|<user JSON>`, or `<version>|` where only the version is known (expires)
-- ARGV  1 version    2 user JSON    3 the key's life, s
--
-- Returns 1: cached | 0: a newer one is known
local cached = tonumber(string.match(redis.call('GET', KEYS[1]) or '0', '^%d+'))
if cached > tonumber(ARGV[1]) then return 0 end
redis.call('SET', KEYS[1], ARGV[1] .. '|' .. ARGV[2], 'EX', ARGV[3])
return 1
