"""Where a request's time goes inside the worker: py-spy's samples, summed by file and drawn as a flame graph."""

import asyncio
import sys
from pathlib import Path

from bench.arms import OURS, Arm
from bench.bodies import chat_body
from bench.ground import Ground, on_ground
from bench.load import Job
from bench.processes import ROOT
from bench.question import Asked, Question, run
from bench.rounds import tell
from bench.samples import Sample
from bench.stacks import by_owner, flame, parse

SHARE = "share of the worker's main thread"
PICTURE = ROOT / "bench" / "pictures" / "profile.svg"
RATE_HZ = 250
SECONDS = 15
SHOWN = 16
REST = "the rest"
CONNECTIONS = 16
PY_SPY = Path(sys.executable).with_name("py-spy")
METHOD = f"""\
py-spy looks {RATE_HZ} times a second, for {SECONDS} s, at what the worker's main thread does while it is asked as
under *CPU a chat request* with bodies of 4 KB; C functions are seen too. Each look counts for the innermost file of
poolgate's that is running, with the libraries and system calls that it called; *event loop* is uvloop and the
kernel without any of it. Being looked at costs some time itself, evenly. It needs the right to trace (root, or
kernel.yama.ptrace_scope 0)."""


def measure(asked: Asked) -> list[Sample]:
    return on_ground(lambda ground: _measure(ground, asked))


async def _measure(ground: Ground, asked: Asked) -> list[Sample]:
    samples: list[Sample] = []
    async with ground.start(OURS) as arm:
        await ground.spend(arm, _job(arm, 2000))
        for number in range(1, asked.rounds + 1):
            samples += await _profile(ground, arm, number)
    return samples


async def _profile(ground: Ground, arm: Arm, number: int) -> list[Sample]:
    out = ground.folder / f"stacks-{number}"
    load = asyncio.create_task(_until_done(ground, arm, out))
    (pid,) = (each.pid for each in arm.clock.processes() if "gateway.worker" in each.cmdline())
    process = await asyncio.create_subprocess_exec(
        str(PY_SPY), "record", "--native", "--threads", "--format", "raw", "--rate", str(RATE_HZ), "--duration",
        str(SECONDS), "--output", str(out), "--pid", str(pid), stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, said = await process.communicate()
    if process.returncode:
        tell(f"py-spy failed: {said.decode().strip()[-300:]}")
        out.touch()
    await load
    stacks = parse(out.read_text())
    total = sum(stacks.values())
    if not total:
        return []
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(
        flame(stacks, f"poolgate: where a worker's time goes, {CONNECTIONS} connections, bodies of 4 KB")
    )
    owners = by_owner(stacks)
    rows = owners.most_common(SHOWN)
    rest = total - sum(count for _, count in rows)
    return [
        Sample(SHARE, name, OURS, "%", number, count / total * 100) for name, count in [*rows, (REST, rest)]
    ]


async def _until_done(ground: Ground, arm: Arm, out: Path) -> None:
    """Load for as long as py-spy looks."""
    while not out.exists():  # noqa: ASYNC240 - once a second
        await ground.spend(arm, _job(arm, 4000))


def _job(arm: Arm, requests: int) -> Job:
    return Job(
        arm.url, key=arm.key, body=chat_body(4096, tokens=16), connections=CONNECTIONS, requests=requests
    )


QUESTION = Question(
    "profile",
    "Where a request's time goes",
    METHOD,
    measure,
    rounds=1,
    cases=("4 KB",),
    arms=(OURS,),
    is_compared=False,
)

if __name__ == "__main__":
    sys.exit(run(QUESTION))
