-- A user's sessions are one hash. Its fields are session ids (16 bytes), each with one of these packed values, and `e`.
--   live       4, MAC key id u32, epoch u32, counter u48, created u48, issued u48, expires u48,
--              authenticated u32 s, factors u8, kind u8: of the login; they never change
--              elevated u32 s, factors u8: of a step-up, or 0
--              then the client's bytes
--   tombstone  2 (not known to be in the log) or 3 (in the log), expires u48, then the reason
--   e          the epoch below which every session is dead u48, then the reason
-- Times are ms of Redis's clock since the epoch, or s where it says so. The client's bytes are the business of
-- authd/sessions/redis.py. A live value of before began with 1 and had the client's bytes after `expires`: see
-- session_adopt.lua.
local OLD_LIVE, UNLOGGED, LOGGED, LIVE = 1, 2, 3, 4

local function now_ms()
    local time = redis.call('TIME')
    return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function unpack_value(value)
    if not value then return nil end
    local state = struct.unpack('>B', value)
    if state ~= LIVE then
        local _, expires, rest = struct.unpack('>BI6', value)
        return { state = state, expires = expires, reason = string.sub(value, rest) }
    end
    local _, key_id, epoch, counter, created, issued, expires, login = struct.unpack('>BI4I4I6I6I6I6', value)
    return { state = LIVE, key_id = key_id, epoch = epoch, counter = counter, created = created, issued = issued,
             expires = expires, login = string.sub(value, login, login + 10), client = string.sub(value, login + 11) }
end

-- What a session keeps of its login, before any step-up.
local function pack_login(authenticated, factors, kind)
    return struct.pack('>I4BBI4B', authenticated, factors, kind, 0, 0)
end

local function pack_live(s)
    return struct.pack('>BI4I4I6I6I6I6', LIVE, s.key_id, s.epoch, s.counter, s.created, s.issued, s.expires)
        .. s.login .. s.client
end

local function pack_tombstone(state, expires, reason)
    return struct.pack('>BI6', state, expires) .. reason
end

local function unpack_floor(value)
    if not value then return 0, '' end
    local epoch, rest = struct.unpack('>I6', value)
    return epoch, string.sub(value, rest)
end

-- The key lives as long as the longest-lived of its values. (PEXPIREAT's GT came with Redis 7.)
local function keep_until(key, now, expires)
    if redis.call('PTTL', key) < expires - now then redis.call('PEXPIREAT', key, string.format('%.0f', expires)) end
end

-- The number of the last row of the revocation log that was applied to the bucket.
local function applied_number(key)
    return tonumber(redis.call('GET', key) or '0')
end
