-- Counts requests, one after the other. KEYS: of each its log of times (a list, oldest first). ARGV: of each the length of its window in
-- microseconds, and its limit. Answers each: admitted (0), or in how many microseconds there is room. Times are this server's.

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local waits = {}

for i, key in ipairs(KEYS) do
    local length = tonumber(ARGV[2 * i - 1])
    local head = redis.call('LINDEX', key, 0)
    -- A time in the future was told by a clock that was set back since.
    while head and (tonumber(head) <= now - length or tonumber(head) > now) do
        redis.call('LPOP', key)
        head = redis.call('LINDEX', key, 0)
    end
    local over = redis.call('LLEN', key) - tonumber(ARGV[2 * i])
    if over >= 0 then
        waits[i] = tonumber(redis.call('LINDEX', key, over)) + length - now
    else
        redis.call('RPUSH', key, string.format('%.0f', now))
        redis.call('PEXPIRE', key, math.ceil(length / 1000) + 1000)
        waits[i] = 0
    end
end
return waits
