"""The gateway: one OpenAI-compatible endpoint over the pool.

`app` builds a worker's parts, `lifecycle` runs a turn through them, `relay` moves its bytes, `api` gives it a surface,
`identity` knows whose it is. `supervisor` owns the sockets and the workers; `cli` is the command line. An error on any
surface comes from the one table in `errors`.
"""

from importlib.metadata import version

VERSION = version("poolgate")
