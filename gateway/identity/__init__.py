"""Who is calling: accounts, their API keys, and what a process remembers of them.

`secrets` makes and hashes key secrets, `accounts` and `keys` are the queries, `keyring` answers from memory
on the request path. What a caller may do with the answer is decided at the edge; balances are moved by
billing.

How a revocation reaches a process: the row's trigger writes the change log in the same transaction;
config/changes.py reads it each half second, or at once on a message; the key ring forgets the key, and reads
again whatever it was reading at that moment. The next use of the key asks PostgreSQL and is refused.
"""
