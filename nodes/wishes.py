"""Models that turns wait for: which node, of those that have one on disk, is to load it.

Who waits, and for how long, is `gateway.starting`'s business; how the node hears of it `nodes.commands`'.
"""

import uuid
from collections.abc import Sequence

import asyncpg

WISH_KEPT_S = 120.0
"""A wish that nobody renewed for so long is over; whoever waits renews it."""


class WishStore:
    """The only place with SQL about wishes."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def wish(self, model: str, nodes: Sequence[str]) -> str | None:
        """Have one of these nodes load the model, the same one as long as that is wished; its id. None if none of them has
        room for it: nodes that have other wishes are asked last, and those that are not online never."""
        row = await self._pool.fetchval(WISH, model, [uuid.UUID(node) for node in nodes], WISH_KEPT_S)
        return None if row is None else str(row)


# Whoever comes first asks; the others renew. Two workers at the same moment may ask two nodes, which does no harm.
WISH = """
with known as (
    update model_wishes w set wished_at = clock_timestamp()
    from nodes n
    where w.model = $1 and n.id = w.node_id and n.state = 'online'
      and w.wished_at > clock_timestamp() - make_interval(secs => $3)
    returning w.node_id
), chosen as (
    select n.id from nodes n
    where n.id = any ($2) and n.state = 'online' and not exists (select from known)
    order by (
        select count(*) from model_wishes w
        where w.node_id = n.id and w.wished_at > clock_timestamp() - make_interval(secs => $3)
    ) + (select count(*) from engines e where e.node_id = n.id and e.state in ('starting', 'ready')), n.id
    limit 1
), made as (
    insert into model_wishes (node_id, model) select id, $1 from chosen
    on conflict (node_id, model) do update set wished_at = clock_timestamp()
    returning node_id
)
select node_id from known union all select node_id from made limit 1
"""
