"""Decides how an engine is started: the command line and environment of vLLM for a model on this hardware.

Pure, so that a table of cases can hold it. Starting and watching the process is `engine`'s affair.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodes.protocol import GENERATE, POOLING

# Of the environment that the agent itself has, an engine gets neither our secrets nor our Python.
PRIVATE_PREFIXES = ("POOLGATE_",)
PRIVATE = ("DATABASE_URL", "REDIS_URL", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_PRELOAD")

CPU_BLOCK_SIZE = 32  # vLLM's own 128 finds no shared prefix in a prompt of under 128 tokens; 16 is refused
CPU_KV_GIB = 1
GPU_MEMORY_SHARE = 0.9  # of a GPU; vLLM's default, divided when engines share one
SHUTDOWN_TIMEOUT_S = (
    0  # the agent has drained it; vLLM waits out a longer time even when it is idle (measured)
)


class BadModel(ValueError):
    """The folder holds no model that an engine can be started with; the text says why."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model folder and how it is served; `context_length` None leaves it to vLLM."""

    folder: Path
    name: str
    context_length: int | None = None
    engine_args: tuple[str, ...] = ()
    vram_gb: float = 0.0  # what it is to get on a GPU; 0: as its weights say

    @property
    def kind(self) -> str:
        args = " ".join(self.engine_args)
        return POOLING if "--runner pooling" in args or "--runner=pooling" in args else GENERATE


@dataclass(frozen=True, slots=True)
class Hardware:
    """What one engine may use: its GPUs (none: it runs on the CPU) and its cores."""

    gpus: tuple[int, ...] = ()
    gpu_sharers: int = 1  # engines on the same GPU
    gpu_share: float = 0.0  # of the memory of each of its GPUs; 0: vLLM's own choice
    cores: tuple[int, ...] = ()
    openmp: Path | None = None  # Intel's OpenMP library, which the CPU engine wants preloaded


@dataclass(frozen=True, slots=True)
class Command:
    """`argv` and the whole environment of an engine's process."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


def read_model(folder: Path) -> ModelSpec:
    """The model of a folder, by its poolgate.json (name, context_length, engine_args, vram_gb) or by the folder's
    name. Raises `BadModel`."""
    folder = folder.absolute()
    if not (folder / "config.json").is_file():
        raise BadModel(f"{folder} has no config.json: it is not the folder of a Hugging Face model")
    try:
        described: Any = json.loads((folder / "poolgate.json").read_text())
    except FileNotFoundError:
        return ModelSpec(folder, folder.name)
    except (OSError, ValueError) as error:
        raise BadModel(f"{folder}/poolgate.json can't be read: {error}") from error
    if not isinstance(described, dict):
        raise BadModel(f"{folder}/poolgate.json must be a JSON object")
    name = described.get("name", folder.name)
    context = described.get("context_length")
    args = described.get("engine_args", [])
    if not isinstance(name, str) or not name:
        raise BadModel(f"{folder}/poolgate.json: name must be a string")
    if context is not None and (not isinstance(context, int) or context < 1):
        raise BadModel(f"{folder}/poolgate.json: context_length must be a whole number above 0")
    if not isinstance(args, list) or not all(isinstance(item, str) for item in args):
        raise BadModel(f"{folder}/poolgate.json: engine_args must be a list of strings")
    vram_gb = described.get("vram_gb", 0.0)
    if isinstance(vram_gb, bool) or not isinstance(vram_gb, int | float) or not 0 <= vram_gb < 10_000:
        raise BadModel(f"{folder}/poolgate.json: vram_gb must be a number of 0 or more")
    return ModelSpec(folder, name, context, tuple(args), float(vram_gb))


def engine_command(
    model: ModelSpec, hardware: Hardware, *, python: Path, port: int, environ: Mapping[str, str]
) -> Command:
    """What to run. The model's own `engine_args` come last: vLLM takes the last of a repeated option."""
    argv = [
        str(python), "-m", "vllm.entrypoints.cli.main", "serve", str(model.folder),
        "--served-model-name", model.name,
        "--host", "127.0.0.1", "--port", str(port),
        "--enable-prompt-tokens-details",  # usage tells cached tokens, which have a price of their own
        "--shutdown-timeout", str(SHUTDOWN_TIMEOUT_S),
        "--disable-uvicorn-access-log",
        "--disable-fastapi-docs",
    ]  # fmt: skip
    if model.context_length is not None:
        argv += ["--max-model-len", str(model.context_length)]
    argv += _gpu_args(hardware) if hardware.gpus else _cpu_args()
    env = {name: value for name, value in environ.items() if not _is_private(name)}
    env |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = (
        "1"  # counts only with --enable-lora, which is the model's own choice
    )
    env |= _gpu_env(hardware) if hardware.gpus else _cpu_env(hardware)
    return Command((*argv, *model.engine_args), env)


def share_hardware(
    engines: int, *, gpus: Sequence[int], cores: Sequence[int], openmp: Path | None
) -> list[Hardware]:
    """Divide a host among its engines; with more engines than GPUs or cores they take turns on them."""
    return [
        Hardware(
            gpus=tuple(_share(gpus, slot, engines)),
            gpu_sharers=-(-engines // len(gpus)) if gpus and engines > len(gpus) else 1,
            cores=tuple(_share(cores, slot, engines)),
            openmp=openmp,
        )
        for slot in range(engines)
    ]


def _share(things: Sequence[int], slot: int, engines: int) -> Sequence[int]:
    if not things:
        return ()
    if engines > len(things):
        return (things[slot % len(things)],)
    return things[slot * len(things) // engines : (slot + 1) * len(things) // engines]


def _gpu_args(hardware: Hardware) -> list[str]:
    # Attention heads divide by powers of two in about every model, by 3 in few.
    parallel = 1 << (len(hardware.gpus).bit_length() - 1)
    args = ["--enable-sleep-mode"]
    if parallel > 1:
        args += ["--tensor-parallel-size", str(parallel)]
    if hardware.gpu_share:
        args += ["--gpu-memory-utilization", f"{hardware.gpu_share:.2f}"]
    elif hardware.gpu_sharers > 1:
        args += ["--gpu-memory-utilization", f"{GPU_MEMORY_SHARE / hardware.gpu_sharers:.2f}"]
    return args


def _gpu_env(hardware: Hardware) -> dict[str, str]:
    # /sleep and /wake_up are development routes, which exist on a GPU only to give its memory to another engine. They are
    # on loopback, and what a gateway may reach is a list without them.
    visible = ",".join(str(gpu) for gpu in hardware.gpus)
    return {"CUDA_VISIBLE_DEVICES": visible, "VLLM_SERVER_DEV_MODE": "1"}


def _cpu_args() -> list[str]:
    # Eager serves as fast on a CPU and starts in 23 s instead of 78.
    return ["--enforce-eager", "--block-size", str(CPU_BLOCK_SIZE)]


def _cpu_env(hardware: Hardware) -> dict[str, str]:
    # vLLM compiles its sampling steps at their first use even when eager: the first request for logprobs then
    # stood still, and every other turn with it, for 17 s; without, it is as fast (measured).
    env = {"VLLM_CPU_KVCACHE_SPACE": str(CPU_KV_GIB), "TORCH_COMPILE_DISABLE": "1"}
    if hardware.cores:  # vLLM's own choice leaves one core of two unused, and gives two engines the same ones
        env["VLLM_CPU_OMP_THREADS_BIND"] = _ranges(hardware.cores)
    if hardware.openmp is not None:
        env["LD_PRELOAD"] = str(hardware.openmp)
    return env


def _ranges(cores: Sequence[int]) -> str:
    """0-3,8 for 0, 1, 2, 3, 8."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _is_private(name: str) -> bool:
    return name in PRIVATE or name.startswith(PRIVATE_PREFIXES)
