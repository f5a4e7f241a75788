"""Why an engine gets a turn and others don't: each candidate with the filters that it fails and the parts of its cost. Pure.

The choice itself computes the same in one go and keeps none of it.
"""

from typing import Any

from nodes.routing.filters import failed
from nodes.routing.router import Need, Router, hashes_of
from nodes.routing.scorers import has_its_share, score
from nodes.routing.snapshot import Engine, Snapshot

SHOWN_MAX = 64
"""Engines that are shown, those of least cost first."""


def explain(snapshot: Snapshot, need: Need, router: Router, *, shown_max: int = SHOWN_MAX) -> dict[str, Any]:
    """What `router.route` would go by now. It picks among a sample: the cheapest shown is likeliest, not certain."""
    group = snapshot.group(need.model, need.kind, need.account_id)
    engines = group.engines if group is not None else snapshot.by_model.get(need.model, ())
    policy = router.policy
    hashes = hashes_of(need) if policy.has_affinity else []
    ties = router.ties_of(group, need, hashes) if group is not None else None
    rows: list[dict[str, Any]] = []
    for engine in engines:
        is_over = group is not None and has_its_share(engine, group, policy)
        drawn = 0 if ties is None or is_over else ties.of(engine)
        parts = score(engine, group, need, drawn, policy, is_cold=ties is not None and ties.is_cold)
        rows.append(
            {
                "engine": engine.key, "failed": failed(engine, need, policy.turns_max),
                "is_roomy": group is None or group.is_roomy(engine, need.context), "has_its_share": is_over,
                "cached_tokens": 0 if ties is None else ties.matched.get(engine, 0),
                "drawn_tokens": drawn,
                "scores": {
                    "load": round(parts.load, 1), "late_turns": round(parts.late_turns, 1),
                    "uncached": parts.uncached, "region": parts.region,
                    "reputation": round(parts.reputation, 1), "total": round(parts.total, 1),
                },
                "load": load_of(engine),
            }
        )  # fmt: skip
    rows.sort(key=lambda row: (bool(row["failed"]), not row["is_roomy"], row["scores"]["total"]))
    return {
        "model": need.model, "kind": need.kind, "policy": "prefix" if policy.has_affinity else "load",
        "prompt_beginnings": len(hashes), "engines": len(engines), "candidates": rows[:shown_max],
        "cached_on": list(snapshot.cached.get(need.model, ()))[:shown_max],
    }  # fmt: skip


def load_of(engine: Engine) -> dict[str, Any]:
    """An engine's load as it is counted."""
    load = engine.load
    return {
        "turns": load.turns, "tokens": load.tokens, "others_turns": load.others_turns,
        "others_tokens": load.others_tokens, "running": load.running, "waiting": load.waiting,
        "kv_usage": round(load.kv_usage, 4),
    }  # fmt: skip
