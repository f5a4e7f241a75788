-- What is used of windows and slots; takes nothing.
--
-- KEYS and ARGV as admit.lua has them. Answer: used, of each record.

local answer, key = {}, 1
for at = 3, #ARGV, 7 do
    local record = {length = tonumber(ARGV[at + 5]), late = tonumber(ARGV[at + 6])}
    if ARGV[at] == 'c' then
        answer[#answer + 1] = slots_of_others(KEYS[key], '')
    else
        record.buckets = KEYS[key]
        if ARGV[at] ~= 't' then
            key = key + 1
            record.log = KEYS[key]
        end
        read_window(record)
        answer[#answer + 1] = record.used
    end
    key = key + 1
end
return answer
