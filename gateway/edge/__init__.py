"""The edge: what a client's connection meets first.

`connection` owns the bytes of a connection: it cuts them into requests, times them, serves inference itself (`turns`) and
lends everything else to aiohttp (`handover`), one request at a time. `head` knows which requests are plain enough for that,
`refusals` says no in each surface's shape, `door` has all connections of a worker. `cors` tells browsers what they may read,
`forwarded` whose address a request comes from, `refused` has one log line for many requests without a valid key.
"""
