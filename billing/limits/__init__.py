"""Rate limits: requests and tokens a minute and a day, and requests at once, of keys and of accounts.

`rules` says what limits are, `limiter` admits requests, `standing` is what a process knows of one subject, `flights`
carries questions to Valkey in order, `shared` and the Lua files count there, `local` counts in memory while Valkey is
away, `headers` tells clients. Limits fail open: a fault here admits.
"""

from billing.limits.limiter import Admission, Limiter
from billing.limits.rules import BadLimits, LimitExceeded, Limits, Subject, limits_of

__all__ = ["Admission", "BadLimits", "LimitExceeded", "Limiter", "Limits", "Subject", "limits_of"]
