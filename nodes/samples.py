"""What is kept of heartbeats beside the lease: a node's GPUs, how long it was heard of, samples, its engines' counts.

Reading `gpu_status` is `telemetry`'s, what follows from it all `reputation`'s and `events`'.
"""

import uuid
from collections.abc import Sequence
from typing import Any

from nodes.protocol import EngineReport, Heartbeat
from nodes.telemetry import telemetry_of


async def keep_sample(
    connection: Any, beat: Heartbeat, engines: Sequence[EngineReport], credit_s: float
) -> bool:
    """Write it in the heartbeat's transaction, whose node and engines are there; whether the node is new.

    The time since the node was last heard of counts as up, at most `credit_s` of it.
    """
    gpus = telemetry_of(beat.gpu_status)
    telling = [engine for engine in engines if engine.tells_usage]
    is_new: bool = await connection.fetchval(
        KEEP, uuid.UUID(beat.node_id), gpus.gpu_name, gpus.gpu_count, gpus.vram_mib, gpus.compute_capability,
        gpus.cuda_version, gpus.driver_version, gpus.util_pct, gpus.vram_used_mib, gpus.vram_free_mib, gpus.temp_c,
        gpus.power_w, credit_s, [engine.engine_id for engine in telling],
        [engine.prompt_tokens for engine in telling], [engine.completion_tokens for engine in telling],
    )  # fmt: skip
    return is_new


# One round trip. A host without a GPU has no samples. An engine's counters begin anew with each of its starts; what it told
# before it was first heard counts for nothing.
KEEP = """
with facts as (
    insert into node_facts as f (node_id, gpu_name, gpu_count, vram_mib, compute_capability, cuda_version, driver_version)
    values ($1, $2, $3, $4, $5, $6, $7)
    on conflict (node_id) do update set
        gpu_name = excluded.gpu_name, gpu_count = excluded.gpu_count, vram_mib = excluded.vram_mib,
        compute_capability = excluded.compute_capability, cuda_version = excluded.cuda_version,
        driver_version = excluded.driver_version,
        up_s = f.up_s + least(extract(epoch from excluded.heard_at - f.heard_at), $13),
        heard_at = excluded.heard_at
    returning xmax = 0 as is_new
), sample as (
    insert into gpu_samples (node_id, minute, util_pct, vram_used_mib, vram_free_mib, temp_c, power_w)
    select $1, date_trunc('minute', clock_timestamp()), $8, $9, $10, $11, $12 where $3 > 0
    on conflict (node_id, minute) do update set
        util_pct = excluded.util_pct, vram_used_mib = excluded.vram_used_mib,
        vram_free_mib = excluded.vram_free_mib, temp_c = excluded.temp_c, power_w = excluded.power_w
), counted as (
    insert into engine_usage as u (node_id, engine_id, counter_prompt, counter_completion)
    select $1, * from unnest($14::text[], $15::bigint[], $16::bigint[])
    on conflict (node_id, engine_id) do update set
        reported_prompt = u.reported_prompt + excluded.counter_prompt - case
            when u.counter_prompt is null then excluded.counter_prompt
            when excluded.counter_prompt >= u.counter_prompt then u.counter_prompt else 0 end,
        reported_completion = u.reported_completion + excluded.counter_completion - case
            when u.counter_completion is null then excluded.counter_completion
            when excluded.counter_completion >= u.counter_completion then u.counter_completion else 0 end,
        checked_relayed_prompt = case
            when u.counter_prompt is null then u.relayed_prompt else u.checked_relayed_prompt end,
        checked_relayed_completion = case
            when u.counter_completion is null then u.relayed_completion else u.checked_relayed_completion end,
        counter_prompt = excluded.counter_prompt,
        counter_completion = excluded.counter_completion
)
select is_new from facts
"""
