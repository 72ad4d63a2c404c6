-- A counter is one hash: `n` failures, which count until `until`, and a field `r:<id>` for each reservation with its
-- expiry. Times are ms of Redis's clock. A counter is locked while n is at its limit: `until` is then the lock's end.

local function now_ms()
    local time = redis.call('TIME')
    return time[1] * 1000 + math.floor(time[2] / 1000)
end

local tidy

-- What counts now: failures whose time has passed are 0, expired reservations are only listed, to be removed.
-- A time that is further ahead than `counts_max` ms for failures, or `life_max` for a reservation, was set before Redis's
-- clock was set back. It is cut to that here and in Redis, so that it ends: the next reader finds it cut. Without the
-- two nothing is cut.
local function load_counter(key, now, counts_max, life_max)
    local is_cut = false
    local counter = { failures = 0, counts_until = 0, reserved = {}, live = 0, last_expiry = 0, expired = {} }
    local values = redis.call('HGETALL', key)
    for i = 1, #values, 2 do
        local name, number = values[i], tonumber(values[i + 1])
        if name == 'n' then
            counter.failures = number
        elseif name == 'until' then
            if counts_max and number > now + counts_max then
                number, is_cut = now + counts_max, true
                redis.call('HSET', key, name, string.format('%.0f', number))
            end
            counter.counts_until = number
        elseif number > now then
            if life_max and number > now + life_max then
                number, is_cut = now + life_max, true
                redis.call('HSET', key, name, string.format('%.0f', number))
            end
            counter.reserved[name] = number
            counter.live = counter.live + 1
            counter.last_expiry = math.max(counter.last_expiry, number)
        else
            table.insert(counter.expired, name)
        end
    end
    if counter.counts_until <= now then counter.failures, counter.counts_until = 0, 0 end
    if is_cut then tidy(key, now) end
    return counter
end

local function store_failures(key, failures, counts_until)
    if failures > 0 then
        redis.call('HSET', key, 'n', failures, 'until', string.format('%.0f', counts_until))
    else
        redis.call('HDEL', key, 'n', 'until')
    end
end

-- The key lives exactly as long as something in it counts.
function tidy(key, now)
    local counter = load_counter(key, now)
    for _, name in ipairs(counter.expired) do redis.call('HDEL', key, name) end
    redis.call('PEXPIREAT', key, string.format('%.0f', math.max(counter.counts_until, counter.last_expiry)))
end
