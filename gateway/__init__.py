"""The gateway: one OpenAI-compatible endpoint over the pool.

`app` builds a worker's parts, `lifecycle` runs a turn through them, `relay` moves its bytes and `reach` gets them to
engines, `api` gives it a surface, `identity` knows whose it is. An error on any surface comes from the one table in
`errors`. `cli` is the command line.

`supervisor` owns the listening sockets (`sockets`) and the workers: `slots` says who serves which socket, `worker_process`
starts and hears one (`reports`), `reload` goes from one to the next, `probes` answers for all. In a worker, `accepting`
takes connections from its socket and leaves none on it.
"""

from importlib.metadata import version

from config import compiled

compiled.use()

VERSION = version("poolgate")
