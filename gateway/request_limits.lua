-- Counts requests. KEYS: a log of times (a list, oldest first) for each subject. ARGV: length of their windows in microseconds, then each
-- one's limit. Admits (0) only where all have room; else in how many microseconds all have. Times are this server's.

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000000 + tonumber(clock[2])
local length = tonumber(ARGV[1])
local wait = 0

for i, key in ipairs(KEYS) do
    local head = redis.call('LINDEX', key, 0)
    -- A time in the future was told by a clock that was set back since.
    while head and (tonumber(head) <= now - length or tonumber(head) > now) do
        redis.call('LPOP', key)
        head = redis.call('LINDEX', key, 0)
    end
    local over = redis.call('LLEN', key) - tonumber(ARGV[i + 1])
    if over >= 0 then
        wait = math.max(wait, tonumber(redis.call('LINDEX', key, over)) + length - now)
    end
end
if wait > 0 then
    return wait
end
for _, key in ipairs(KEYS) do
    redis.call('RPUSH', key, string.format('%.0f', now))
    redis.call('PEXPIRE', key, math.ceil(length / 1000) + 1000)
end
return 0
