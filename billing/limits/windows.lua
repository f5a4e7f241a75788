-- Rolling windows as the other scripts see them; put before each of them. Times are microseconds by this server's clock.
--
-- A window's entries stand in a log (a list of times, oldest first: exact) and in buckets (a hash: number of the bucket ->
-- amount, s = their sum, f = the first bucket there may be, l = the last one that was written). Requests a minute may have
-- both, after their limit went from low to high or back. What a bucket holds was taken within it and may be used `late`
-- longer (a block in some process's memory), so it counts until the window has left the bucket's end and that time too:
-- no rolling window is ever over, whatever lies in it.

local BUCKETS = 60
local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])

local function text(number)
    return string.format('%.0f', number)
end

local function width(window)
    return math.floor(window.length / BUCKETS)
end

-- The clock was set back: what lies far in its future would block the window until then.
local function is_from_future(time)
    return time > now + 1000000
end

local function keep(key, window)
    redis.call('PEXPIRE', key, text(math.ceil((window.length + window.late + width(window)) / 1000) + 1000))
end

local function read_log(window)
    local head = redis.call('LINDEX', window.log, 0)
    while head and tonumber(head) <= now - window.length do
        redis.call('LPOP', window.log)
        head = redis.call('LINDEX', window.log, 0)
    end
    local newest = head and redis.call('LINDEX', window.log, -1)
    if newest and is_from_future(tonumber(newest)) then
        redis.call('DEL', window.log)
        newest = nil
    end
    window.newest = newest and tonumber(newest) or nil
    window.logged = newest and redis.call('LLEN', window.log) or 0
end

local function read_buckets(window)
    local wide = width(window)
    local current = math.floor(now / wide)
    local live = math.floor((now - window.length - window.late) / wide)
    local found = redis.call('HMGET', window.buckets, 's', 'f', 'l')
    window.sum, window.first, window.last = tonumber(found[1] or 0), tonumber(found[2] or current), tonumber(found[3] or current)
    window.has_buckets = found[1] and true or false
    if window.has_buckets and (window.last < live or is_from_future(window.last * wide)) then
        redis.call('DEL', window.buckets)
        window.sum, window.first, window.last, window.has_buckets = 0, current, current, false
    elseif window.first < live then
        local old = {}
        for bucket = window.first, live - 1 do
            old[#old + 1] = text(bucket)
        end
        for _, amount in ipairs(redis.call('HMGET', window.buckets, unpack(old))) do
            window.sum = window.sum - tonumber(amount or 0)
        end
        redis.call('HDEL', window.buckets, unpack(old))
        window.first = live
        redis.call('HSET', window.buckets, 's', text(window.sum), 'f', text(live))
    end
end

local function read_window(window)
    window.logged = 0
    if window.log then
        read_log(window)
    end
    read_buckets(window)
    window.used = window.logged + window.sum
end

-- When each entry stops counting: {time, amount}, in order.
local function releases(window)
    local found = {}
    if window.logged > 0 then
        for _, time in ipairs(redis.call('LRANGE', window.log, 0, -1)) do
            found[#found + 1] = {tonumber(time) + window.length, 1}
        end
    end
    if window.has_buckets then
        local wide = width(window)
        local fields = redis.call('HGETALL', window.buckets)
        for at = 1, #fields, 2 do
            local bucket = tonumber(fields[at])
            if bucket then
                found[#found + 1] = {(bucket + 1) * wide + window.length + window.late, tonumber(fields[at + 1])}
            end
        end
        table.sort(found, function(one, other) return one[1] < other[1] end)
    end
    return found
end

-- Microseconds until `must` more fits if nothing else comes. More than the whole limit fits into an empty window.
local function wait_of(window)
    local needed = window.used + window.must - window.limit
    if needed > window.used then
        needed = window.used
    end
    if not window.has_buckets then
        return tonumber(redis.call('LINDEX', window.log, needed - 1)) + window.length - now
    end
    local free = 0
    for _, release in ipairs(releases(window)) do
        free = free + release[2]
        if free >= needed then
            return math.max(release[1] - now, 1)
        end
    end
    return 1
end

local function add(window, amount)
    local wide = width(window)
    local bucket = math.max(math.floor(now / wide), window.last)
    local held = tonumber(redis.call('HGET', window.buckets, text(bucket)) or 0)
    window.sum, window.last, window.has_buckets = window.sum + amount, bucket, true
    redis.call('HSET', window.buckets, text(bucket), text(held + amount), 's', text(window.sum),
        'f', text(window.first), 'l', text(bucket))
    keep(window.buckets, window)
end

-- Until the window is empty, if nothing more comes.
local function reset_of(window)
    local reset = 0
    if window.newest and window.logged > 0 then
        reset = window.newest + window.length - now
    end
    if window.has_buckets and window.sum > 0 then
        reset = math.max(reset, (window.last + 1) * width(window) + window.length + window.late - now)
    end
    return math.max(reset, 0)
end

-- Slots. A process writes how many it has, never by how much that changed, so nothing drifts; with the number of the
-- flight that said so, for what an earlier one said may come late (a server that was frozen). Both share one number.
local SLOTS = 1048576

local function own_slots(key, incarnation)
    local stored = tonumber(redis.call('HGET', key, incarnation) or 0)
    return math.floor(stored / SLOTS), stored % SLOTS
end

local function write_slots(key, incarnation, flight, count)
    if count > 0 then
        redis.call('HSET', key, incarnation, text(flight * SLOTS + count))
        -- Others count it from now on, also where the process has not said yet that it lives; it sees that by the 0.
        redis.call('SET', 'alive:' .. incarnation, '0', 'EX', 10, 'NX')
    else
        -- Zero is kept while others are there, for its flight's number; alone it is as good as nothing.
        if redis.call('HLEN', key) <= 1 and redis.call('HEXISTS', key, incarnation) == 1 then
            redis.call('DEL', key)
            return
        end
        redis.call('HSET', key, incarnation, text(flight * SLOTS))
    end
    redis.call('EXPIRE', key, 86400)
end

-- The slots of the other processes that live; those of the dead go with them.
local function slots_of_others(key, incarnation)
    local total = 0
    local fields = redis.call('HGETALL', key)
    for at = 1, #fields, 2 do
        if fields[at] ~= incarnation then
            if redis.call('EXISTS', 'alive:' .. fields[at]) == 1 then
                total = total + tonumber(fields[at + 1]) % SLOTS
            else
                redis.call('HDEL', key, fields[at])
            end
        end
    end
    return total
end
