-- The callers of bench.py: wrk -t1 -s bench.lua URL FILE. Each sends the next request
-- of the file, in which NUL separates them. The last line of the output is JSON.

requests, statuses = {}, {}
made = -1   -- wrk calls request() once before it begins

function setup(thread)
   callers = thread   -- the only one
end

function init(args)
   for request in io.open(args[1], "rb"):read("*a"):gmatch("[^%z]+") do
      table.insert(requests, request)
   end
end

function request()
   made = made + 1
   return requests[made % #requests + 1]   -- after the last one, the first again
end

function response(status)
   statuses[status] = (statuses[status] or 0) + 1
end

function done(summary, latency)
   local counts, errors = {}, summary.errors
   for status, count in pairs(callers:get("statuses")) do
      table.insert(counts, ('"%d": %d'):format(status, count))
   end
   print(('{"statuses": {%s}, "made": %d, "errors": %d, "seconds": %f, "p50": %f, '
          .. '"p99": %f}'):format(
      table.concat(counts, ", "), callers:get("made"),
      errors.connect + errors.read + errors.write + errors.timeout,
      summary.duration / 1e6,
      latency:percentile(50) / 1e6, latency:percentile(99) / 1e6))
end
