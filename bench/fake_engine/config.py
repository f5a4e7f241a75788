"""What is fixed while the process runs: the flags, spelled as vLLM spells them where vLLM has them.

What can change at run time is in `knobs`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class EngineConfig:
    host: str
    also: tuple[str, ...]
    port: int
    models: tuple[str, ...]
    root: str
    max_model_len: int
    block_size: int
    num_gpu_blocks: int
    fingerprint: str
    pooling: bool
    embedding_size: int
    prompt_tokens_details: bool
    per_request_metrics: bool
    request_id_headers: bool
    load_tracking: bool
    auto_tool_choice: bool
    dev_mode: bool
    enable_lora: bool
    scale_out: bool
    record: bool
    record_bodies: bool
    record_file: Path | None
    replay_dir: str | None
    parent_stdin: bool
    start_delay_s: float
    shutdown_timeout_s: float
    knobs: dict[str, Any]


def parse_flags(argv: Sequence[str], environ: dict[str, str]) -> EngineConfig:
    """Read the flags; `serve MODEL ...` (the form of the vllm command) ignores flags it does not know."""
    parser = _parser()
    as_vllm = bool(argv) and argv[0] == "serve"
    if as_vllm:
        known, _ = parser.parse_known_args(["--model", *argv[1:]])
    else:
        known = parser.parse_args(argv)
    return EngineConfig(
        host=known.host,
        also=tuple(known.also),
        port=known.port,
        models=tuple(known.served_model_name or [known.model]),
        root=known.root,
        max_model_len=known.max_model_len,
        block_size=known.block_size,
        num_gpu_blocks=known.num_gpu_blocks,
        fingerprint=known.fingerprint,
        pooling=known.pooling or known.runner == "pooling",
        embedding_size=known.embedding_size,
        prompt_tokens_details=known.enable_prompt_tokens_details,
        per_request_metrics=known.enable_per_request_metrics,
        request_id_headers=known.enable_request_id_headers,
        load_tracking=known.enable_server_load_tracking,
        auto_tool_choice=known.enable_auto_tool_choice,
        dev_mode=known.dev_mode or environ.get("VLLM_SERVER_DEV_MODE") == "1",
        enable_lora=known.enable_lora,
        scale_out=known.enable_scale_out,
        record=not known.no_record,
        record_bodies=known.record_bodies,
        record_file=known.record_file,
        replay_dir=known.replay,
        parent_stdin=known.parent_stdin,
        start_delay_s=known.start_delay_s,
        shutdown_timeout_s=known.shutdown_timeout,
        knobs=_knobs(known, environ),
    )


def _knobs(known: argparse.Namespace, environ: dict[str, str]) -> dict[str, Any]:
    """Flags that are also knobs first, then what the environment and --knobs say."""
    named = json.loads(environ.get("FAKE_ENGINE_KNOBS", "{}")) | json.loads(known.knobs)
    return {"max_num_queued_reqs": known.max_num_queued_reqs, "max_num_seqs": known.max_num_seqs, **named}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.fake_engine", description=__doc__, allow_abbrev=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="HOST", help="more addresses, on the same port"
    )
    parser.add_argument("--port", type=int, default=0, help="0: the system picks one; printed as a JSON line")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--root", default="/models/smollm2", help="the local path that /v1/models leaks")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--num-gpu-blocks", type=int, default=364)
    parser.add_argument("--fingerprint", default="vllm-0.32.0-cbf671ae")
    parser.add_argument("--runner", default="generate")
    parser.add_argument("--pooling", action="store_true", help="serve /v1/embeddings and no chat")
    parser.add_argument("--embedding-size", type=int, default=576)
    parser.add_argument("--enable-prompt-tokens-details", "--prompt-tokens-details", action="store_true")
    parser.add_argument("--enable-per-request-metrics", action="store_true")
    parser.add_argument("--enable-request-id-headers", action="store_true")
    parser.add_argument("--enable-server-load-tracking", action="store_true")
    parser.add_argument("--enable-auto-tool-choice", action="store_true")
    parser.add_argument("--tool-call-parser")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--enable-scale-out", action="store_true", help="prompts as token ids, for routers")
    parser.add_argument(
        "--dev-mode", action="store_true", help="as VLLM_SERVER_DEV_MODE=1: /sleep, /pause, ..."
    )
    parser.add_argument("--max-num-queued-reqs", type=int, default=0, help="in-flight cap; 0: none")
    parser.add_argument(
        "--shutdown-timeout", type=float, default=0.0, help="seconds SIGTERM lets turns finish"
    )
    parser.add_argument("--no-record", action="store_true", help="keep counters only (benchmarks)")
    parser.add_argument("--record-bodies", action="store_true")
    parser.add_argument("--record-file", type=Path, help="write each request down here, as JSON lines, too")
    parser.add_argument("--replay", metavar="DIR", help="folder of NAME.resp files for the replay knob")
    parser.add_argument(
        "--parent-stdin", action="store_true", help="exit when standard input reaches its end"
    )
    parser.add_argument("--start-delay-s", type=float, default=0.0, help="listen only after this long")
    parser.add_argument(
        "--knobs", default="{}", help="JSON of knobs at the start; FAKE_ENGINE_KNOBS does the same"
    )
    return parser
