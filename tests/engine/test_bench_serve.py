"""vLLM's own load generator goes through the gateway as it goes to an engine, and every token of it is metered."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from nodes.agent.build import engine_status
from tests.engine.system import KEY, MODEL, System, now

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

ENGINE = Path(sys.prefix) / "engine"
PROMPTS = 24
OUTPUT_TOKENS = 24


async def test_every_prompt_of_bench_serve_completes_and_is_metered(system: System, tmp_path: Path) -> None:
    (model,) = engine_status(ENGINE).models
    begun = now()
    result = await bench_serve(
        tmp_path,
        "--backend", "openai-chat", "--endpoint", "/v1/chat/completions", "--base-url", system.base_url,
        "--model", MODEL, "--tokenizer", str(model), "--dataset-name", "random", "--random-input-len", "32",
        "--random-output-len", str(OUTPUT_TOKENS), "--num-prompts", str(PROMPTS), "--max-concurrency", "8",
        "--ignore-eos",
    )  # fmt: skip
    assert (result["completed"], result["failed"]) == (PROMPTS, 0)
    assert result["total_output_tokens"] == PROMPTS * OUTPUT_TOKENS
    rows = await asyncio.to_thread(system.rows, begun, PROMPTS)
    assert {(row.outcome, row.stream, row.estimated) for row in rows} == {("finished", True, False)}
    assert sum(row.completion_tokens for row in rows) == result["total_output_tokens"]


async def bench_serve(folder: Path, *options: str) -> dict[str, int]:
    """Run it to its end; its results."""
    command = [
        str(ENGINE / "bin" / "python"), "-m", "vllm.entrypoints.cli.main", "bench", "serve", *options,
        "--save-result", "--result-dir", str(folder), "--result-filename", "result.json",
    ]  # fmt: skip
    environment = os.environ | {"OPENAI_API_KEY": KEY, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (folder / "bench.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=folder, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            code = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
    assert code == 0, (folder / "bench.log").read_text()[-4000:]
    result: dict[str, int] = json.loads((folder / "result.json").read_text())
    return result
