"""The pool: nodes that run our agent, the engines on them, and the choice of one for a turn.

`registry` keeps what PostgreSQL knows of nodes as an immutable snapshot in memory, `routing` chooses from it,
`breaker` and the load on each engine are this process's own view. `reach` says how an engine is got at, `networks` which
addresses may be called, `tunnel` what flows where there are none. `agent` is the program on a GPU host; it
ships alone and speaks `protocol`. Nothing here knows of money.
"""

from config import compiled

compiled.use()
