"""Owns the step of `poolgate up` that makes sure an engine can be started: its environment and its model.

Building them is nodes/agent/build.py's.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from gateway.cli.output import Refused
from gateway.cli.plan import Plan, engine_folder
from gateway.cli.steps import Steps
from nodes.agent.build import BuildFailed, Progress, build
from nodes.agent.environment import engine_status


def prepare_engine(
    plan: Plan, steps: Steps, interrupting: Callable[[], AbstractContextManager[None]]
) -> tuple[Path, ...]:
    """The model folders to serve; builds the engine's environment when one is needed and not there."""
    if not plan.needs_engine:
        return ()
    if not has_own_vllm() and not engine_status(engine_folder()).is_ready:
        with steps.step("engine environment") as say, interrupting():

            def show(progress: Progress) -> None:
                if progress.state in ("done", "kept"):
                    steps.tell(f"  {progress}")
                else:
                    say(str(progress))

            steps.tell("  building the engine: about 600 MB to download, once")
            try:
                build(engine_folder(), show)
            except BuildFailed as error:
                raise Refused(str(error)) from error
    if plan.models:
        return plan.models
    models = engine_status(engine_folder()).models
    if not models:
        raise Refused("there is no model to serve: name one with --model FOLDER, or run `make engine`")
    return models[:1]


def has_own_vllm() -> bool:
    """vLLM beside us, as the extra `node` installs it on GPU hosts."""
    from importlib.util import find_spec

    return find_spec("vllm") is not None
