"""How engines are started: a table of hosts and models against command lines and environments."""

import json
from pathlib import Path

import pytest

from nodes.agent.command import (
    BadModel,
    Hardware,
    ModelSpec,
    engine_command,
    read_model,
    share_hardware,
)

PYTHON = Path("/engine/bin/python")
MODEL = ModelSpec(Path("/models/toy"), "toy", 8192)
ALWAYS = [
    "/engine/bin/python", "-m", "vllm.entrypoints.cli.main", "serve", "/models/toy", "--served-model-name", "toy",
    "--host", "127.0.0.1", "--port", "4711", "--enable-prompt-tokens-details", "--shutdown-timeout", "0",
    "--disable-uvicorn-access-log", "--disable-fastapi-docs", "--max-model-len", "8192",
]  # fmt: skip
CPU = ["--enforce-eager", "--block-size", "32"]
QUIET = {
    "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
}  # fmt: skip
GPU = ["--enable-sleep-mode"]
GPU_ENV = {**QUIET, "VLLM_SERVER_DEV_MODE": "1"}
CPU_ENV = {**QUIET, "VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1"}


@pytest.mark.parametrize(
    ("hardware", "more_args", "env"),
    [
        (Hardware(), CPU, CPU_ENV),
        (Hardware(cores=(0, 1)), CPU, {**CPU_ENV, "VLLM_CPU_OMP_THREADS_BIND": "0-1"}),
        (Hardware(cores=(3,)), CPU, {**CPU_ENV, "VLLM_CPU_OMP_THREADS_BIND": "3"}),
        (Hardware(cores=(8, 0, 1, 2)), CPU, {**CPU_ENV, "VLLM_CPU_OMP_THREADS_BIND": "0-2,8"}),
        (Hardware(openmp=Path("/lib/omp.so")), CPU, {**CPU_ENV, "LD_PRELOAD": "/lib/omp.so"}),
        (
            Hardware(gpus=(0,), cores=(0, 1), openmp=Path("/lib/omp.so")),
            GPU,
            {**GPU_ENV, "CUDA_VISIBLE_DEVICES": "0"},
        ),
        (
            Hardware(gpus=(2, 3)),
            [*GPU, "--tensor-parallel-size", "2"],
            {**GPU_ENV, "CUDA_VISIBLE_DEVICES": "2,3"},
        ),
        (
            Hardware(gpus=(0, 1, 2)),
            [*GPU, "--tensor-parallel-size", "2"],
            {**GPU_ENV, "CUDA_VISIBLE_DEVICES": "0,1,2"},
        ),
        (
            Hardware(gpus=(1,), gpu_sharers=2),
            [*GPU, "--gpu-memory-utilization", "0.45"],
            {**GPU_ENV, "CUDA_VISIBLE_DEVICES": "1"},
        ),
        (
            Hardware(gpus=(0,), gpu_sharers=2, gpu_share=0.3),
            [*GPU, "--gpu-memory-utilization", "0.30"],
            {**GPU_ENV, "CUDA_VISIBLE_DEVICES": "0"},
        ),
    ],
)
def test_command_fits_the_hardware(hardware: Hardware, more_args: list[str], env: dict[str, str]) -> None:
    command = engine_command(MODEL, hardware, python=PYTHON, port=4711, environ={})
    assert list(command.argv) == ALWAYS + more_args
    assert command.env == env


def test_a_models_own_arguments_come_last_so_that_they_win() -> None:
    model = ModelSpec(Path("/m"), "m", engine_args=("--block-size", "64"))
    argv = engine_command(model, Hardware(), python=PYTHON, port=1, environ={}).argv
    assert argv[-2:] == ("--block-size", "64")
    assert "--max-model-len" not in argv


def test_an_engine_gets_neither_our_secrets_nor_our_python() -> None:
    ours = {
        "POOLGATE_AGENT_KEY": "secret", "POOLGATE_PARENT_FD": "5", "DATABASE_URL": "postgres://", "REDIS_URL": "redis://",
        "PYTHONPATH": "/ours", "VIRTUAL_ENV": "/ours", "PATH": "/bin", "HOME": "/root",
    }  # fmt: skip
    env = engine_command(MODEL, Hardware(), python=PYTHON, port=1, environ=ours).env
    assert env == {**CPU_ENV, "PATH": "/bin", "HOME": "/root"}


@pytest.mark.parametrize(
    ("engines", "gpus", "cores", "shares"),
    [
        (1, [], [0, 1], [((), 1, (0, 1))]),
        (2, [], [0, 1], [((), 1, (0,)), ((), 1, (1,))]),
        (3, [], [0, 1], [((), 1, (0,)), ((), 1, (1,)), ((), 1, (0,))]),
        (2, [], [0, 1, 2, 3, 4], [((), 1, (0, 1)), ((), 1, (2, 3, 4))]),
        (2, [0, 1, 2, 3], [0, 1], [((0, 1), 1, (0,)), ((2, 3), 1, (1,))]),
        (3, [0, 1], [0], [((0,), 2, (0,)), ((1,), 2, (0,)), ((0,), 2, (0,))]),
        (0, [0], [0], []),
    ],
)
def test_hardware_is_divided_among_engines(
    engines: int,
    gpus: list[int],
    cores: list[int],
    shares: list[tuple[tuple[int, ...], int, tuple[int, ...]]],
) -> None:
    found = share_hardware(engines, gpus=gpus, cores=cores, openmp=None)
    assert [(share.gpus, share.gpu_sharers, share.cores) for share in found] == shares


def make_model(folder: Path, described: object = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if described is not None:
        (folder / "poolgate.json").write_text(json.dumps(described))
    return folder


def test_a_model_without_a_description_has_its_folders_name(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "llama")
    assert read_model(folder) == ModelSpec(folder, "llama")


def test_a_described_model_is_read(tmp_path: Path) -> None:
    described = {"name": "toy", "context_length": 64, "engine_args": ["--runner", "pooling"]}
    folder = make_model(tmp_path / "x", described)
    model = read_model(folder)
    assert model == ModelSpec(folder, "toy", 64, ("--runner", "pooling"))
    assert model.kind == "pooling"


@pytest.mark.parametrize(
    "described", [[], {"name": 5}, {"context_length": 0}, {"context_length": "8k"}, {"engine_args": "--x"}]
)
def test_a_wrong_description_is_refused_by_its_field(tmp_path: Path, described: object) -> None:
    with pytest.raises(BadModel, match=r"poolgate\.json"):
        read_model(make_model(tmp_path / "x", described))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match=r"no config\.json"):
        read_model(tmp_path)
