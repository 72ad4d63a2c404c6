-- Opens a session after a login, or rebuilds and rotates one that Redis lost, and holds the cap.
--
-- KEYS  1 hash of the user's sessions (expires with the last of its values)
--       2 string, the bucket's last applied revocation (no expiry)
--       3 stream, the bucket's events (no expiry; the relay empties it)
--       4 hash of the user's sessions from before incarnations (expires with the last of its values)
-- ARGV  1 deadline, ms of Redis's time        2 the highest revocation number that the caller knows
--       3 session id, made by the caller      4 the user's epoch
--       5 MAC key id                          6 counter of the new token
--       7 created, ms; 0: now (a login)       8 a refresh token's life, ms
--       9 a session's life, ms               10 the cap
--      11 1: refuse at the cap, 0: evict the oldest
--      12 the client's bytes                 13 user id
--      14 the stream's bound for `session.opened`, 0: do not record it
--      15 incarnation                        16 when the user registered, ms
--      17 authenticated, s; 0: now           18 factors of the login
--      19 kind of the session
--
-- Returns {status, now} and more:
--   opened, value, 1: event dropped, stream full, evicted id ...
--     also when this very session was opened by an earlier run
--   late | behind, applied number | stale, reason: sessions of this epoch have ended | ended, reason
--   present: to be rebuilt, but here | expired | refused: at the cap | evicted: a rebuilt session older than a full set
-- include: session_format
-- include: session_adopt
-- include: events/event_add

local now = now_ms()
if now > tonumber(ARGV[1]) then return { 'late', now } end
local applied = applied_number(KEYS[2])
if applied < tonumber(ARGV[2]) then return { 'behind', now, applied } end

local id, epoch, rebuilt = ARGV[3], tonumber(ARGV[4]), ARGV[7] ~= '0'
adopt_sessions(now, tonumber(ARGV[16]), epoch)
local floor, floor_reason = unpack_floor(redis.call('HGET', KEYS[1], 'e'))
if epoch < floor then return { 'stale', now, floor_reason } end

local live, unlogged = {}, {}
local values = redis.call('HGETALL', KEYS[1])
for i = 1, #values, 2 do
    if values[i] ~= 'e' then
        local s = unpack_value(values[i + 1])
        s.id = values[i]
        if s.expires <= now or (s.state == LIVE and s.epoch < epoch) then
            redis.call('HDEL', KEYS[1], s.id)
        elseif s.id == id then
            if s.state ~= LIVE then return { 'ended', now, s.reason } end
            if rebuilt then return { 'present', now } end
            return { 'opened', now, values[i + 1], 0 }
        elseif s.state == LIVE then
            live[#live + 1] = s
        end
    end
end

local session = { key_id = tonumber(ARGV[5]), epoch = epoch, counter = tonumber(ARGV[6]), issued = now, client = ARGV[12] }
local authenticated = tonumber(ARGV[17])
if authenticated == 0 then authenticated = math.floor(now / 1000) end
session.login = pack_login(authenticated, tonumber(ARGV[18]), tonumber(ARGV[19]))
session.created = rebuilt and tonumber(ARGV[7]) or now
session.expires = math.min(now + tonumber(ARGV[8]), session.created + tonumber(ARGV[9]))
if session.expires <= now then return { 'expired', now } end

local surplus = #live + 1 - tonumber(ARGV[10])
local reply = { 'opened', now, pack_live(session), 0 }
if surplus > 0 then
    if ARGV[11] == '1' then return { 'refused', now } end
    table.sort(live, function(a, b)
        if a.created ~= b.created then return a.created < b.created end
        return a.id < b.id
    end)
    if rebuilt and session.created < live[surplus].created then
        -- As long as the token it answers for, or until the log has its row; so are those below.
        redis.call('HSET', KEYS[1], id, pack_tombstone(UNLOGGED, session.expires, 'evicted'))
        add_event(KEYS[3], nil, 'session.evicted', 'u', ARGV[13], 'i', ARGV[15], 's', id)
        keep_until(KEYS[1], now, session.expires)
        return { 'evicted', now }
    end
    for i = 1, surplus do
        redis.call('HSET', KEYS[1], live[i].id, pack_tombstone(UNLOGGED, live[i].expires, 'evicted'))
        add_event(KEYS[3], nil, 'session.evicted', 'u', ARGV[13], 'i', ARGV[15], 's', live[i].id)
        reply[#reply + 1] = live[i].id
    end
end
redis.call('HSET', KEYS[1], id, reply[3])
keep_until(KEYS[1], now, session.expires)
local stream_max = tonumber(ARGV[14])
if stream_max > 0 and not rebuilt then
    local is_recorded = add_event(KEYS[3], stream_max, 'session.opened', 'u', ARGV[13], 'i', ARGV[15], 's', id, 'c', ARGV[12])
    reply[4] = is_recorded and 0 or 1
end
return reply
