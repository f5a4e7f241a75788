"""The same as `bench.prefix`, of two real vLLM nodes."""

import asyncio
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bench.arms import OURS
from bench.peers import NotInstalled
from bench.prefix import BLOCK, BLOCKS, PEER, PROMPTS, RANDOM, Load, measured
from bench.processes import ended, free_port
from bench.question import Asked, Question, run
from bench.rounds import tell
from bench.samples import Sample
from config.procs import spawn
from nodes.agent.build import engine_status
from nodes.agent.command import engine_command, read_model, share_hardware
from nodes.agent.supervisor import find_openmp

REAL = "2 vLLM nodes"

SHALLOW = ("--load-format", "dummy", "--hf-overrides", '{"num_hidden_layers": 2}')
"""Two layers of the model, with weights at random: what a cache holds doesn't depend on them, and answers come soon enough
for a round of many."""

METHOD = f"""\
The {PROMPTS} system prompts of *Prompts that begin alike*, before two real vLLM servers, started with
`--num-gpu-blocks-override {BLOCKS} --block-size {BLOCK}`, so that each holds a third of them. They run the first two layers
of a small model with weights at random, which caches don't know from others. 6 requests are in flight. The engines
share the two cores with everything else, so times mean nothing and are not shown."""


def measure(asked: Asked) -> list[Sample]:
    return measured(LOADS, asked)


@asynccontextmanager
async def real_engines(folder: Path) -> AsyncIterator[list[str]]:
    """Two vLLM servers, each on one core, from the environment that `make engine` builds. Raises NotInstalled."""
    status = engine_status(Path(sys.prefix) / "engine")
    if not status.is_ready:
        raise NotInstalled(status.detail)
    cores = sorted(os.sched_getaffinity(0))
    shares = share_hardware(2, gpus=(), cores=cores, openmp=find_openmp(status.python))
    cache = ["--num-gpu-blocks-override", str(BLOCKS), "--block-size", str(BLOCK)]
    processes, urls = [], []
    try:
        for number, share in enumerate(shares):
            port = free_port()
            command = engine_command(
                read_model(status.models[0]), share, python=status.python, port=port, environ=dict(os.environ)
            )
            with (folder / f"engine-{number}.log").open("wb") as output:
                processes.append(
                    spawn(
                        [*command.argv, *cache, "--enable-scale-out", *SHALLOW],
                        env={**command.env, "VLLM_SERVER_DEV_MODE": "1"}, stdin=subprocess.DEVNULL, stdout=output,
                        stderr=output,
                    )
                )  # fmt: skip
            urls.append(f"http://127.0.0.1:{port}")
        for url in urls:
            tell(f"waiting for {url}")
            await asyncio.to_thread(_await_health, url)
        yield urls
    finally:
        await ended(*processes)


def _await_health(engine: str) -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(f"{engine}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"{engine} does not start")


LOADS = {REAL: Load(480, 6, real_engines, is_timed=False)}

QUESTION = Question(
    "prefix_vllm", "Prompts that begin alike, and vLLM", METHOD, measure, rounds=3, cases=tuple(LOADS),
    arms=(OURS, RANDOM, PEER), is_compared=False,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(run(QUESTION))
