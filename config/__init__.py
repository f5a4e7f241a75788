"""What every part stands on: settings, stores, clock, ids, logs and metrics.

`defaults` declares each setting once, with its bound, unit and reason; `settings` builds the one frozen object from
defaults, a TOML file and `POOLGATE_*` variables. Nothing here knows of turns, nodes or money.
"""

from config import compiled

compiled.use()
