"""What a turn may cost, what it did cost, who pays and who earns, so that no death of anything makes it wrong.

Before a turn: `prices` and `holds` bound its cost, `limits` its rate; `leases` sets the bound aside in memory, out of a
part of the wallet and of the `budgets` that this process took. After it: `journal` keeps the record on disk, `shipper`
brings it into the book, where `ledger` posts it, `usage` sums it up, `statements` and `audit` read it. When a process
dies, `recovery` ships what it left. README.md beside this file follows a nano from top-up to payout.

Nothing here knows of HTTP, nodes or the text of a turn.
"""

from config import compiled

compiled.use()
