-- One request against all windows and slots of all its subjects: every one of them admits it, or none is touched.
--
-- KEYS: of each record in order its key; a window of requests a minute has two, buckets and log.
-- ARGV: incarnation, flight, then seven a record: kind, group, limit, must, extra, length, late.
--   kind: l = log, b = buckets with a log beside them, t = buckets, c = slots (must: how many this process has now).
--   extra: what the process would like beyond it, for its memory; all windows of a group give the same.
-- Answer: now, 1 or 0, then four a record: used (slots: running), microseconds to wait (slots: 1 if full),
--   given beyond `must` (slots: how many this process has now), microseconds until it is as if nothing had come.

local incarnation, flight = ARGV[1], tonumber(ARGV[2])
local records, gives, is_admitted, key = {}, {}, true, 1

for at = 3, #ARGV, 7 do
    local record = {
        kind = ARGV[at], group = ARGV[at + 1], limit = tonumber(ARGV[at + 2]), must = tonumber(ARGV[at + 3]),
        extra = tonumber(ARGV[at + 4]), length = tonumber(ARGV[at + 5]), late = tonumber(ARGV[at + 6]), wait = 0,
    }
    if record.kind == 'c' then
        record.key = KEYS[key]
        local said_by, count = own_slots(record.key, incarnation)
        -- What this flight's earlier requests took is in the stored count; else the process knows better.
        record.own = said_by == flight and count or record.must
        record.is_stale = said_by > flight
        record.used = slots_of_others(record.key, incarnation) + record.own
        if record.is_stale or record.used + 1 > record.limit then
            record.wait, is_admitted = 1, false
        end
    else
        record.buckets = KEYS[key]
        if record.kind ~= 't' then
            key = key + 1
            record.log = KEYS[key]
        end
        read_window(record)
        if record.used > 0 and record.used + record.must > record.limit then
            record.wait, is_admitted = wait_of(record), false
        end
    end
    local room = record.limit - record.used - (record.kind == 'c' and 1 or record.must)
    gives[record.group] = math.max(0, math.min(gives[record.group] or record.extra, room))
    records[#records + 1] = record
    key = key + 1
end

local answer = {now, is_admitted and 1 or 0}
for _, record in ipairs(records) do
    local given, reset = 0, 0
    if is_admitted then
        given = gives[record.group]
        if record.kind == 'c' then
            record.used = record.used + 1
            given = record.own + 1 + given
            write_slots(record.key, incarnation, flight, given)
        elseif record.kind == 'l' then
            record.used, given = record.used + 1, 0
            record.logged, record.newest = record.logged + 1, now
            redis.call('RPUSH', record.log, text(now))
            keep(record.log, record)
        else
            record.used = record.used + record.must
            if record.must + given > 0 then
                add(record, record.must + given)
            end
        end
    end
    if record.kind ~= 'c' then
        reset = reset_of(record)
    end
    answer[#answer + 1] = record.used
    answer[#answer + 1] = record.wait
    answer[#answer + 1] = given
    answer[#answer + 1] = reset
end
return answer
