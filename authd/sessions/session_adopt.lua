-- Moves what the hash of before incarnations has of the user's sessions into the user's hash, and deletes it. Needs
-- KEYS[1], the user's hash, and KEYS[4], the hash of before, which an id that was given twice shared.
--
-- `registered`: when the user's row was made, ms. What was opened before is another user's. `epoch`: the user's now. A
-- floor above it cannot come from this user's endings.
local function adopt_sessions(now, registered, epoch)
    local values = redis.call('HGETALL', KEYS[4])
    if #values == 0 then return end
    for i = 1, #values, 2 do
        local id, value = values[i], values[i + 1]
        if id == 'e' then
            local floor = unpack_floor(value)
            if floor <= epoch and floor > unpack_floor(redis.call('HGET', KEYS[1], 'e')) then
                redis.call('HSET', KEYS[1], 'e', value)
            end
        elseif struct.unpack('>B', value) == OLD_LIVE then
            local created, _, expires = struct.unpack('>I6I6I6', string.sub(value, 16, 33))
            -- The login was with a password, for there was nothing else: factor 1, kind 1.
            local login = pack_login(math.floor(created / 1000), 1, 1)
            if created >= registered and expires > now then
                redis.call('HSETNX', KEYS[1], id, string.char(LIVE) .. string.sub(value, 2, 33) .. login
                    .. string.sub(value, 34))
            end
        else
            redis.call('HSETNX', KEYS[1], id, value)
        end
    end
    keep_until(KEYS[1], now, now + redis.call('PTTL', KEYS[4]))
    redis.call('DEL', KEYS[4])
end

