-- What became known after admission: other amounts than were taken, blocks that were not used up, slots that are free.
--
-- KEYS: one a record. ARGV: incarnation, flight, then five a record: kind, amount, time, length, late.
--   kind: t = buckets (amount below 0: given back to the bucket of `time`; above: taken now), c = slots (amount: how many
--   this process has).

local incarnation, flight = ARGV[1], tonumber(ARGV[2])

local function give_back(window, amount, time)
    local bucket = math.floor(time / width(window))
    local held = redis.call('HGET', window.buckets, text(bucket))
    if not held or bucket < window.first then
        return
    end
    local less = math.min(tonumber(held), amount)
    redis.call('HSET', window.buckets, text(bucket), text(tonumber(held) - less), 's', text(window.sum - less))
end

local at = 3
for _, key in ipairs(KEYS) do
    local amount = tonumber(ARGV[at + 1])
    if ARGV[at] == 'c' then
        local said_by = own_slots(key, incarnation)
        if said_by <= flight then
            write_slots(key, incarnation, flight, amount)
        end
    else
        local window = {buckets = key, length = tonumber(ARGV[at + 3]), late = tonumber(ARGV[at + 4])}
        read_buckets(window)
        if amount > 0 then
            add(window, amount)
        elseif window.has_buckets then
            give_back(window, -amount, tonumber(ARGV[at + 2]))
        end
    end
    at = at + 5
end
return #KEYS
