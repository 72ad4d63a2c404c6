-- Applies the next row of the revocation log: ends one session, or all that were opened below an epoch.
--
-- KEYS  1 hash of the user's sessions (expires with the last of its values)
--       2 string, the bucket's last applied revocation (no expiry)
--       3 string, the cached user (expires)
--       4 hash of the user's sessions from before incarnations (expires with the last of its values)
-- ARGV  1 deadline, ms of Redis's time    2 the number that must be the last applied one    3 the row's number
--       4 session id, or ''               5 epoch, or ''                                    6 reason
--       7 a tombstone's life, ms
--
-- Returns {applied, now} | {moved, now, applied number}: another replica was faster, or Redis went back | {late, now}
-- include: session_format

local now = now_ms()
if now > tonumber(ARGV[1]) then return { 'late', now } end
local applied = applied_number(KEYS[2])
if applied ~= tonumber(ARGV[2]) then return { 'moved', now, applied } end

-- First, and whatever it finds: a Redis without memory lets only a script go on that has begun with a deletion.
redis.call('HDEL', KEYS[1], ARGV[4])
redis.call('HDEL', KEYS[4], ARGV[4])
local expires = now + tonumber(ARGV[7])
if ARGV[4] ~= '' then
    -- Also where the session is not here: a rebuild that read the log before this row was in it must not succeed.
    redis.call('HSET', KEYS[1], ARGV[4], pack_tombstone(LOGGED, expires, ARGV[6]))
    keep_until(KEYS[1], now, expires)
else
    local epoch, last = tonumber(ARGV[5]), expires
    local values = redis.call('HGETALL', KEYS[1])
    for i = 1, #values, 2 do
        local s = values[i] ~= 'e' and unpack_value(values[i + 1])
        if s and (s.state ~= LIVE or s.epoch < epoch) then
            redis.call('HDEL', KEYS[1], values[i])
        elseif s then
            last = math.max(last, s.expires)
        end
    end
    -- What is adopted later must not live again either.
    local old = redis.call('HGETALL', KEYS[4])
    for i = 1, #old, 2 do
        local value = old[i + 1]
        if old[i] ~= 'e' and struct.unpack('>B', value) == OLD_LIVE
            and struct.unpack('>I4', string.sub(value, 6, 9)) < epoch then
            redis.call('HDEL', KEYS[4], old[i])
        end
    end
    if unpack_floor(redis.call('HGET', KEYS[1], 'e')) < epoch then
        redis.call('HSET', KEYS[1], 'e', struct.pack('>I6', epoch) .. ARGV[6])
    end
    redis.call('PEXPIREAT', KEYS[1], string.format('%.0f', last))
    -- The epoch is the version that the user's row had then. A reader that still holds an older row cannot store it.
    local cached = tonumber(string.match(redis.call('GET', KEYS[3]) or '0', '^%d+'))
    if cached < epoch then redis.call('SET', KEYS[3], ARGV[5] .. '|', 'PX', ARGV[7]) end
end
redis.call('SET', KEYS[2], ARGV[3])
return { 'applied', now }
