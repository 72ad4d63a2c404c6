-- A counter is one hash: `n` failures, which count until `until`, and a field `r:<id>` for each reservation with its
-- expiry. Times are ms of Redis's clock. A counter is locked while n is at its limit: `until` is then the lock's end.

local function now_ms()
    local time = redis.call('TIME')
    return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- What counts now: failures whose time has passed are 0, expired reservations are only listed, to be removed.
local function load_counter(key, now)
    local counter = { failures = 0, counts_until = 0, reserved = {}, live = 0, last_expiry = 0, expired = {} }
    local values = redis.call('HGETALL', key)
    for i = 1, #values, 2 do
        local name, number = values[i], tonumber(values[i + 1])
        if name == 'n' then
            counter.failures = number
        elseif name == 'until' then
            counter.counts_until = number
        elseif number > now then
            counter.reserved[name] = number
            counter.live = counter.live + 1
            counter.last_expiry = math.max(counter.last_expiry, number)
        else
            table.insert(counter.expired, name)
        end
    end
    if counter.counts_until <= now then counter.failures, counter.counts_until = 0, 0 end
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
local function tidy(key, now)
    local counter = load_counter(key, now)
    for _, name in ipairs(counter.expired) do redis.call('HDEL', key, name) end
    redis.call('PEXPIREAT', key, string.format('%.0f', math.max(counter.counts_until, counter.last_expiry)))
end
