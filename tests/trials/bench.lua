-- wrk runs this for bench.py: it sends the requests of a file, with NULs between them,
-- one after another, and prints what came back as a line of JSON.

local requests, answers, number = {}, {}, 0

function setup(thread)
   caller = thread      -- the only one: wrk -t 1
end

function init(arguments)
   for request in io.open(arguments[1]):read("*a"):gmatch("%Z+") do
      table.insert(requests, request)
   end
end

function request()
   number = number + 1
   return requests[(number - 1) % #requests + 1]
end

function response(status)
   answers[status] = (answers[status] or 0) + 1
   found = ""           -- a global, which done() can read
   for each, count in pairs(answers) do
      found = found .. string.format('"%d": %d, ', each, count)
   end
end

function done(summary, latency)
   local errors = summary.errors
   print(string.format(
      '{"answers": {%s}, "seconds": %f, "p50": %f, "p99": %f, "unanswered": %d}',
      (caller:get("found") or ""):sub(1, -3), summary.duration / 1e6,
      latency:percentile(50) / 1e6, latency:percentile(99) / 1e6,
      errors.connect + errors.read + errors.write + errors.timeout))
end
