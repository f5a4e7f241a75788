"""Every setting of poolgate: its default, what is allowed, its unit and why it is what it is.

The class below is the only list. `config.settings` reads a file and the environment into it, `poolgate serve --help`
and docs/settings.md are printed from it. A name ends with its unit (`_s`, `_bytes`, `_max`).
"""

from dataclasses import dataclass, field
from typing import Any


def knob(
    default: Any,
    why: str,
    *,
    low: float | None = None,
    high: float | None = None,
    unit: str = "",
    choices: tuple[str, ...] = (),
    secret: bool = False,
) -> Any:
    """One setting: `low` and `high` are allowed themselves; `secret` values are never shown or logged."""
    meta = {"why": why, "low": low, "high": high, "unit": unit, "choices": choices, "secret": secret}
    return field(default=default, metadata=meta, repr=not secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings, checked, never changed after start."""

    # --- gateway: listening -------------------------------------------------------------------------------------
    host: str = knob("127.0.0.1", "address that the gateway listens on; 0.0.0.0 opens it to the network")
    port: int = knob(8080, "port that the gateway listens on", low=1, high=65535)
    workers: int = knob(
        1,
        "gateway processes; one fills a core at some thousand turns a second",
        low=1,
        high=256,
        unit="processes",
    )
    worker_keeps_core: bool = knob(
        True,
        "each worker keeps to a core of its own while there are as many, and moves on where that is crowded",
    )
    worker_hung_s: float = knob(
        60.0,
        "a worker whose event loop has not turned for so long is killed, and another takes its place and its queue",
        low=1,
        high=3600,
        unit="seconds",
    )
    body_bytes_max: int = knob(
        10 * 2**20,
        "largest request body: a full context as text is about 1 MiB, the rest is room for images as data: URLs",
        low=1024,
        high=512 * 2**20,
        unit="bytes",
    )
    body_timeout_s: float = knob(
        120.0,
        "a whole request body must arrive within this; a slow one holds memory (10 MiB at 0.7 Mbit/s)",
        low=1,
        high=3600,
        unit="seconds",
    )
    header_bytes_max: int = knob(
        8190,
        "longest request line and longest single header, as nginx and Apache allow",
        low=1024,
        high=65536,
        unit="bytes",
    )
    head_timeout_s: float = knob(
        20.0,
        "a new connection must bring its request's whole head within this; a slow one holds a descriptor",
        low=0.1,
        high=3600,
        unit="seconds",
    )
    client_idle_s: float = knob(
        620.0,
        "a connection without a request is closed after this: longer than balancers keep theirs (Google's 600 s)",
        low=0.1,
        high=86400,
        unit="seconds",
    )
    cors_origins: str = knob(
        "",
        "origins whose pages may read answers, comma separated, or `*`; empty: none, as keys belong on servers",
    )
    trusted_proxies: str = knob(
        "",
        "networks of the proxies in front, comma separated: only what they add to X-Forwarded-For is believed",
    )
    answer_bytes_max: int = knob(
        64 * 2**20,
        "largest answer of an engine that is not a stream (logprobs of n answers are the largest)",
        low=65536,
        high=2**30,
        unit="bytes",
    )
    shutdown_grace_s: float = knob(
        30.0,
        "how long begun turns may go on after SIGTERM before they are cut",
        low=0,
        high=3600,
        unit="seconds",
    )
    reload_ready_s: float = knob(
        60.0,
        "after SIGHUP: a worker with new settings that is not ready within this is given up, and the old one goes on",
        low=1,
        high=3600,
        unit="seconds",
    )
    probe_host: str = knob("127.0.0.1", "address of the probe listener; 0.0.0.0 opens it to the network")
    probe_port: int = knob(
        0,
        "port on which the supervisor itself answers /ready, /health and /metrics, however busy workers are; 0: none",
        low=0,
        high=65535,
    )
    tls_certificate: str = knob(
        "", "PEM file of the certificate and its chain, read again when it changes; empty: plain HTTP"
    )
    tls_key: str = knob("", "PEM file of the certificate's key, without a password")
    tls_handshake_s: float = knob(
        10.0,
        "a TLS handshake takes a few round trips; one that takes longer holds memory for nobody",
        low=0.1,
        high=120,
        unit="seconds",
    )

    drain_idle_s: float = knob(
        2.0,
        "after SIGTERM a connection without a request may bring one for so long, which is answered with a close",
        low=0,
        high=600,
        unit="seconds",
    )

    # --- relay ----------------------------------------------------------------------------------------------------
    connect_timeout_s: float = knob(
        2.0,
        "connecting to an engine; a host that takes longer is as good as gone",
        low=0.05,
        high=60,
        unit="seconds",
    )
    first_byte_timeout_s: float = knob(
        300.0,
        "from dispatch to the engine's first event: long prefill and queueing are not death",
        low=1,
        high=3600,
        unit="seconds",
    )
    chunk_timeout_s: float = knob(
        60.0,
        "silence inside a begun answer: a stopped vLLM leaves its connection open for ever",
        low=0.1,
        high=3600,
        unit="seconds",
    )
    answer_timeout_s: float = knob(
        600.0,
        "whole answer that is not a stream, OpenAI's own SDK time-out",
        low=1,
        high=7200,
        unit="seconds",
    )
    complete_timeout_s: float = knob(
        120.0,
        "/v1/complete ends with finish_reason `timeout` after this (contract)",
        low=1,
        high=3600,
        unit="seconds",
    )
    keepalive_comment_s: float = knob(
        10.0,
        "a waiting stream gets an SSE comment this often, before load balancers (30-60 s) cut it",
        low=0.05,
        high=300,
        unit="seconds",
    )
    engine_idle_s: float = knob(
        4.0,
        "idle connections older than this are not used again: vLLM's server closes them at 5 s",
        low=0,
        high=3600,
        unit="seconds",
    )
    engine_idle_connections_max: int = knob(
        256,
        "idle connections kept for one engine by one worker; more is only memory",
        low=0,
        high=65536,
        unit="connections",
    )
    engine_turns_max: int = knob(
        8192,
        "turns in flight to one engine from one worker: bounds sockets below a common descriptor limit",
        low=1,
        high=1_000_000,
        unit="turns",
    )
    stream_buffer_bytes: int = knob(
        65536,
        "bytes waiting for a slow client before its engine's socket is paused",
        low=4096,
        high=2**24,
        unit="bytes",
    )
    client_stall_s: float = knob(
        120.0,
        "a client that reads nothing for this long while bytes wait for it is taken as gone: its turn holds an engine slot",
        low=1,
        high=3600,
        unit="seconds",
    )
    event_bytes_max: int = knob(
        2**20,
        "largest single SSE event of an engine; one token with 20 logprobs is about 4 KB",
        low=4096,
        high=2**26,
        unit="bytes",
    )
    dispatch_attempts_max: int = knob(
        3, "engines tried for one turn, while nothing was sent to its client", low=1, high=16, unit="attempts"
    )

    # --- stores -----------------------------------------------------------------------------------------------
    database_url: str = knob(
        "", "PostgreSQL; empty: `poolgate up` starts its own in the data folder", secret=True
    )
    redis_url: str = knob(
        "", "Valkey or Redis; empty: `poolgate up` starts its own in the data folder", secret=True
    )
    data_dir: str = knob("data", "folder of the embedded stores, the pepper, models and logs")
    database_pool_max: int = knob(
        4,
        "PostgreSQL connections of one gateway process, beside two for the change log and chores",
        low=2,
        high=100,
        unit="connections",
    )
    database_timeout_s: float = knob(
        5.0,
        "statement time-out in PostgreSQL, and of the client waiting for it",
        low=0.1,
        high=600,
        unit="seconds",
    )
    valkey_timeout_s: float = knob(
        0.25, "every Valkey command; past it the process decides alone", low=0.005, high=30, unit="seconds"
    )
    change_poll_s: float = knob(
        0.5,
        "how often a worker reads the change log: a revoked key is refused within 1 s even without Valkey",
        low=0.05,
        high=60,
        unit="seconds",
    )

    # --- identity ---------------------------------------------------------------------------------------------
    key_pepper: str = knob(
        "",
        "secret mixed into key hashes; the same in every gateway of one database; empty: a file in data_dir",
        secret=True,
    )
    admin_token: str = knob(
        "",
        "secret that may do what admins may, in x-admin-token or as Bearer; empty: only keys with the scope `admin` may",
        secret=True,
    )
    key_cache_max: int = knob(
        200_000, "keys that a worker remembers (about 400 bytes each)", low=16, high=10_000_000, unit="keys"
    )
    unknown_key_cache_s: float = knob(
        30.0,
        "how long a refused key is refused without asking PostgreSQL (a new key clears it at once)",
        low=0,
        high=3600,
        unit="seconds",
    )
    inference_key_prefix: str = knob("sk-pg-", "what new API keys start with")
    provider_key_prefix: str = knob("dc1-provider-", "what new provider keys start with (contract)")

    # --- money ------------------------------------------------------------------------------------------------
    currency: str = knob("SAR", "ISO code of the major unit that prices and balances are in")
    minor_per_major: int = knob(
        100,
        "minor units (halala, cents) in one major unit; `cost_halala` counts these",
        low=1,
        high=1_000_000,
    )
    price_book: str = knob("", "TOML file of prices; empty: the one in the package (config/pricebook.toml)")
    provider_share_bp: int = knob(
        7500,
        "what the node's owner gets of each turn, in hundredths of a percent; the rest is the platform's fee",
        low=0,
        high=10_000,
    )
    provider_share_rounding: str = knob(
        "down",
        "which way a posting's share is rounded to whole nano; the fee takes the difference",
        choices=("down", "half_even", "up"),
    )
    batch_price_percent: int = knob(
        50, "what a turn of a batch costs, as a percentage of the price of one online", low=0, high=100
    )
    lease_block_s: float = knob(
        120.0,
        "a process leases so many seconds of an account's peak spending at once, and refills at half",
        low=1,
        high=3600,
        unit="seconds",
    )
    lease_small_holds: int = knob(
        8,
        "a wallet that buys fewer holds than this for each process is leased one turn at a time",
        low=1,
        high=1000,
        unit="holds",
    )
    lease_idle_s: float = knob(
        60.0,
        "a process returns what it has leased of an account without turns for this long",
        low=0.05,
        high=86400,
        unit="seconds",
    )
    lease_grace_s: float = knob(
        4 * 3600.0,
        "a process that PostgreSQL has not heard of for this long is given up: its leases return to the wallets",
        low=1,
        high=30 * 86400,
        unit="seconds",
    )
    lease_report_s: float = knob(
        1.0,
        "processes tell what is free and held in their leases this often: a balance read is no older",
        low=0.05,
        high=60,
        unit="seconds",
    )
    leases_max: int = knob(
        200_000,
        "accounts that a process has leases of; past it those longest without a turn are returned",
        low=16,
        high=10_000_000,
        unit="accounts",
    )
    hold_wait_s: float = knob(
        2.0,
        "how long a turn waits for money that only other turns' holds or other processes' leases keep from it",
        low=0,
        high=60,
        unit="seconds",
    )
    clamp_tokens_min: int = knob(
        16,
        "a request without a token limit is clamped to what its wallet buys if that is so much, else refused",
        low=1,
        high=1_000_000,
        unit="tokens",
    )
    tokenize_timeout_s: float = knob(
        2.0,
        "how long an engine may take to count a prompt whose bound by bytes is more than the wallet has",
        low=0.01,
        high=60,
        unit="seconds",
    )
    template_tokens_max: int = knob(
        512,
        "what a chat template may add to a prompt (a default system message, roles), for the hold's upper bound",
        low=0,
        high=1_000_000,
        unit="tokens",
    )
    output_tokens_ceiling: int = knob(
        131_072,
        "longest answer of a model whose context length nobody told, for the hold's upper bound",
        low=1,
        high=100_000_000,
        unit="tokens",
    )
    journal_dir: str = knob(
        "", "folder of the workers' journals, on a disk that survives them; empty: `journal` in data_dir"
    )
    journal_bytes_max: int = knob(
        2 * 2**30,
        "finished turns of one worker that wait for PostgreSQL on disk: 1 h of 1,400 turns a second; past it 503",
        low=2**20,
        high=2**44,
        unit="bytes",
    )
    journal_segment_bytes: int = knob(
        16 * 2**20,
        "size of one journal file; one is made ahead, and those shipped whole are removed",
        low=2**16,
        high=2**30,
        unit="bytes",
    )
    journal_fsync_s: float = knob(
        0.05,
        "the journal is forced to disk this often: what a power cut (not a killed process) can lose",
        low=0.001,
        high=60,
        unit="seconds",
    )
    usage_flush_s: float = knob(
        1.0,
        "finished turns are shipped from the journal to PostgreSQL in batches this often",
        low=0.01,
        high=60,
        unit="seconds",
    )
    usage_batch_max: int = knob(5_000, "turns in one batch", low=1, high=100_000, unit="turns")
    usage_retention_days: int = knob(
        400,
        "day partitions of usage older than this are dropped (13 months: year on year)",
        low=2,
        high=10_000,
        unit="days",
    )

    usage_hours_retention_days: int = knob(
        62,
        "usage by hour older than this is dropped (two months); usage by day is kept",
        low=2,
        high=10_000,
        unit="days",
    )
    idempotency_kept_s: float = knob(
        86400.0,
        "answers to requests with an Idempotency-Key are kept this long",
        low=1,
        high=30 * 86400,
        unit="seconds",
    )
    idempotency_bytes_max: int = knob(
        2**20,
        "largest answer that is kept; a repeat of a larger one gets 409",
        low=1024,
        high=64 * 2**20,
        unit="bytes",
    )
    idempotency_pending_max: int = knob(
        64,
        "answers that a process keeps in memory while PostgreSQL is away; repeats of further ones get 409",
        low=1,
        high=100_000,
        unit="answers",
    )

    # --- limits -----------------------------------------------------------------------------------------------
    exact_requests_minute_max: int = knob(
        600,
        "limits up to this many requests a minute are kept exactly, one Valkey command a request; higher ones by blocks",
        low=1,
        high=1_000_000,
        unit="requests",
    )
    limit_block_s: float = knob(
        1.0,
        "life of a block of a high limit that one process took: what it doesn't use is lost to the others for so long",
        low=0.05,
        high=10,
        unit="seconds",
    )
    limit_subjects_max: int = knob(
        200_000,
        "keys and accounts whose limits a process has in mind",
        low=16,
        high=10_000_000,
        unit="subjects",
    )
    valkey_retry_s: float = knob(
        1.0,
        "how long a process keeps limits by itself after Valkey failed, before it asks again",
        low=0.01,
        high=600,
        unit="seconds",
    )

    # --- nodes -------------------------------------------------------------------------------------------------
    node_networks: str = knob(
        "",
        "networks in which engines may be called over plain HTTP at the addresses that nodes report, and private ones of"
        " agents' listeners; comma separated; `poolgate up` adds this machine's own",
    )
    hop_host: str = knob(
        "127.0.0.1",
        "address on which workers take turns of other workers whose node's tunnel ends in them; with gateways on several "
        "hosts an address of a network of theirs alone, since these bytes are not encrypted",
    )
    tunnel_window_bytes: int = knob(
        131_072,
        "bytes of one stream of a tunnel under way, or waiting for a slow client; a body of 10 MiB takes 80 round trips",
        low=4096,
        high=2**24,
        unit="bytes",
    )
    tunnel_streams_max: int = knob(
        4096,
        "turns and idle connections in one tunnel; engines have some hundred turns at a time",
        low=1,
        high=1_000_000,
        unit="streams",
    )
    tunnels_max: int = knob(
        16_384, "tunnels that end in one worker, a descriptor each", low=1, high=1_000_000, unit="tunnels"
    )
    listener_check_s: float = knob(
        300.0,
        "an agent's listener is checked again this long after it was found good, at its next heartbeat",
        low=1,
        high=86400,
        unit="seconds",
    )
    heartbeat_interval_s: float = knob(
        30.0,
        "agents report this often, and at once when an engine changes state (contract)",
        low=0.1,
        high=600,
        unit="seconds",
    )
    heartbeat_grace_s: float = knob(
        90.0,
        "a node silent for this long leaves: three missed heartbeats",
        low=0.3,
        high=3600,
        unit="seconds",
    )
    agent_version_min: str = knob(
        "0.1.0", "agents older than this are told to update themselves, and do, from this gateway"
    )
    agent_exe: str = knob(
        "", "file that the .exe downloads answer with; empty: they answer 404, as Windows has a script"
    )
    public_url: str = knob(
        "",
        "base URL of this gateway as providers reach it, for installer scripts; empty: the Host header of who asks",
    )
    load_share_s: float = knob(
        0.2,
        "workers tell each other their turns in flight this often, through Valkey",
        low=0.02,
        high=60,
        unit="seconds",
    )
    breaker_failures: int = knob(
        3, "failures in a row that open an engine's breaker", low=1, high=1000, unit="failures"
    )
    breaker_successes: int = knob(2, "probes in a row that close it again", low=1, high=1000, unit="probes")
    breaker_open_s: float = knob(
        1.0,
        "first pause before a probe; doubles up to breaker_open_max_s",
        low=0.01,
        high=600,
        unit="seconds",
    )
    breaker_open_max_s: float = knob(
        30.0, "longest pause between probes", low=0.01, high=3600, unit="seconds"
    )
    choice_sample: int = knob(
        4,
        "engines scored for one turn: best of a few sampled keeps the cost constant and avoids herds",
        low=1,
        high=64,
        unit="engines",
    )
    routing_policy: str = knob(
        "prefix",
        "`prefix`: long prompts go where their beginning is cached, unless that is busier; `load`: by load alone",
        choices=("prefix", "load"),
    )
    routing_load_weight: float = knob(
        0.1,
        "tokens of uncached prompt that a token in flight weighs: a batch works at many turns at once, a prefill at one",
        low=0,
        high=100,
    )
    routing_share_max: float = knob(
        1.25,
        "an engine with more than this times its group's mean share of late turns is sent no more for its cache's sake",
        low=1,
        high=1000,
    )
    routing_region_tokens: int = knob(
        2048,
        "uncached tokens that a node outside the region asked for counts as having more",
        low=0,
        high=10_000_000,
        unit="tokens",
    )
    routing_reputation_tokens: int = knob(
        0,
        "uncached tokens that a node of reputation 0 counts as having more than one of 1; 0: reputation is not looked at",
        low=0,
        high=10_000_000,
        unit="tokens",
    )
    prefix_entries_max: int = knob(
        500_000,
        "beginnings of prompts that a worker remembers over all engines (about 300 bytes each)",
        low=16,
        high=100_000_000,
        unit="entries",
    )
    routing_sessions_max: int = knob(
        100_000,
        "sessions (header x-poolgate-session) whose engine a worker remembers",
        low=1,
        high=10_000_000,
        unit="sessions",
    )
    engine_waiting_max: int = knob(
        16,
        "an engine that reports more turns waiting inside it is full: here they wait in fair order, there first come",
        low=0,
        high=1_000_000,
        unit="turns",
    )
    model_start_wait_s: float = knob(
        55.0,
        "how long turns wait for a model that is started for them: below the minute after which balancers cut silence",
        low=0,
        high=3600,
        unit="seconds",
    )
    model_start_waiting_max: int = knob(
        256, "turns of one worker that wait for models to start", low=0, high=1_000_000, unit="turns"
    )

    # --- queue ---------------------------------------------------------------------------------------------------
    queue_turns_max: int = knob(
        1024,
        "turns that wait while every engine is full, over all workers; past it whoever waits with most is refused: 503",
        low=0,
        high=1_000_000,
        unit="turns",
    )
    queue_wait_s: float = knob(
        60.0,
        "a turn waits this long at most, then it gets 503: clients' own time-outs are about that",
        low=0.01,
        high=3600,
        unit="seconds",
    )
    queue_quantum_tokens: int = knob(
        64,
        "tokens that each account in the queue gets a round: less than most turns have, so that nobody gets many at once",
        low=1,
        high=1_000_000,
        unit="tokens",
    )
    queue_retry_s: float = knob(
        0.25,
        "an engine that said it is full is asked again after this, if none of our turns ended there meanwhile",
        low=0.01,
        high=60,
        unit="seconds",
    )

    # --- providers --------------------------------------------------------------------------------------------
    provider_approval: str = knob(
        "manual",
        "`manual`: nodes of a provider that registered take work when an admin has approved it; `automatic`: at once",
        choices=("manual", "automatic"),
    )
    provider_nodes_max: int = knob(
        10_000, "nodes of one provider; an agent that forgets its id makes a new one", low=1, unit="nodes"
    )
    register_requests_hour: int = knob(
        5, "registrations from one address in an hour (contract)", low=1, high=100_000, unit="requests"
    )
    heartbeat_requests_minute: int = knob(
        4,
        "heartbeats of one node in a minute, and bad ones of one address (contract), or twice what heartbeat_interval_s "
        "asks for; five times that of our own agent, which tells at once that an engine changed its state",
        low=1,
        high=100_000,
        unit="requests",
    )
    marketplace_requests_minute: int = knob(
        30, "/api/providers/marketplace from one address in a minute (contract)", low=1, high=100_000,
        unit="requests",
    )  # fmt: skip
    admin_requests_minute: int = knob(
        100, "/api/admin/* from one address in a minute (contract)", low=1, high=100_000, unit="requests"
    )
    api_requests_minute: int = knob(
        300,
        "other requests under /api/ from one address, and of one key, in a minute (contract)",
        low=1,
        high=100_000,
        unit="requests",
    )
    reputation_s: float = knob(
        300.0, "uptime and reliability of providers are brought up to date this often", low=0.05, high=86400,
        unit="seconds",
    )  # fmt: skip
    usage_check_s: float = knob(
        3600.0,
        "tokens that an engine reports are held against those relayed from it this often: what is in flight at the "
        "ends must be little of the whole",
        low=0.05,
        high=7 * 86400,
        unit="seconds",
    )
    usage_difference_share: float = knob(
        0.2,
        "they may differ by this share of the larger: clients leave, and failed turns are tried elsewhere",
        low=0,
        high=1,
    )

    # --- mail -------------------------------------------------------------------------------------------------
    mail_url: str = knob(
        "",
        "SMTP server: smtp://USER:PASSWORD@HOST:PORT (TLS where it is offered), or smtps://; empty: no mail, but in "
        "developer mode a file in data_dir/mail for each",
        secret=True,
    )
    mail_from: str = knob("poolgate@localhost", "sender of our mail")
    login_code_s: float = knob(
        600.0, "a mailed code is good for this long", low=10, high=86400, unit="seconds"
    )
    developer_mode: bool = knob(
        False,
        "for one machine without the world around it (`poolgate up` on loopback): mail goes to a folder",
    )

    # --- engines (agent) ----------------------------------------------------------------------------------------
    engine_start_timeout_s: float = knob(
        600.0,
        "from start to /health 200; a CPU takes 25 s, 70 B weights from a slow disk take minutes",
        low=1,
        high=7200,
        unit="seconds",
    )
    engine_drain_s: float = knob(
        30.0,
        "turns in flight may finish this long before an engine is stopped",
        low=0,
        high=3600,
        unit="seconds",
    )
    engine_restart_s: float = knob(
        1.0,
        "first pause before a dead engine is started again; doubles up to engine_restart_max_s",
        low=0.01,
        high=600,
        unit="seconds",
    )
    engine_restart_max_s: float = knob(
        60.0, "longest pause between restarts", low=0.01, high=3600, unit="seconds"
    )
    engine_poll_s: float = knob(
        1.0, "how often the agent reads an engine's health and metrics", low=0.05, high=60, unit="seconds"
    )

    temp_limit_c: int = knob(
        0,
        "a GPU this hot gets no new turns, and its engines end if that does not help; the provider's own limit, if it is"
        " lower, holds; 0: only that one",
        low=0,
        high=150,
        unit="°C",
    )
    model_source: str = knob(
        "https://huggingface.co",
        "hub that `preload_model` gets models from that are not on the host; empty: none are downloaded",
    )
    telemetry_file: str = knob(
        "",
        "JSON list of GPUs (name, vram_mib, temp_c ...) that the agent reads instead of NVML, for GPUs unknown to it",
    )

    # --- seeing it ----------------------------------------------------------------------------------------------
    log_format: str = knob("human", "`json` for machines", choices=("human", "json"))
    log_level: str = knob("info", "least level that is logged", choices=("debug", "info", "warning", "error"))
    health_interval_s: float = knob(
        2.0,
        "components are checked this often in the background; probes read the last result",
        low=0.1,
        high=60,
        unit="seconds",
    )
    default_model_tokens: int = knob(
        512,
        "`max_tokens` of /v1/complete when the request names none (contract)",
        low=1,
        high=1_000_000,
        unit="tokens",
    )
    complete_tokens_max: int = knob(
        4096, "ceiling of `max_tokens` of /v1/complete (contract)", low=1, high=1_000_000, unit="tokens"
    )
