"""A clean Debian in a folder, made by debootstrap from the mirror that this machine uses, and programs that run in it.

What pip is configured with here holds there too: its variables, its configuration as variables, and the local folders that
these name, which are mounted. Mounts and processes are in namespaces of their own, so nothing is left of either.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

PACKAGES = "ca-certificates,curl"
"""What a host has that can run the one line; not Python: the installer brings it."""

COPIED = (
    "etc/resolv.conf",
    "etc/hosts",
    "etc/apt/apt.conf.d",
    "etc/apt/auth.conf.d",
    "etc/ssl/certs/ca-certificates.crt",
    "etc/apt/sources.list.d",
)
CERTIFICATES = "etc/trusted-by-pip.crt"
"""What pip trusts on this machine, under a name of its own there: Debian writes its bundle anew as packages come."""

PASSED = re.compile(r"(pip_|https?_proxy$|no_proxy$)", re.IGNORECASE)


def make_chroot(folder: Path) -> None:
    """Takes about half a minute."""
    sources = sorted(Path("/etc/apt").glob("sources.list.d/*.sources")) + sorted(
        Path("/etc/apt").glob("**/*.list")
    )
    texts = [path.read_text() for path in sources]
    found = re.search(
        r"^(?:URIs:|deb(?: \[[^\]]*\])?) *(https?://\S+/debian/?)\s", "\n".join(texts), re.MULTILINE
    )
    assert found, "this machine's apt names no mirror of Debian"
    suite = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    assert suite, "this machine is no Debian"
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", suite[1], folder, found[1]],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    for name in COPIED:
        if Path("/", name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-aLT", f"/{name}", folder / name], check=True)
    if trusted := pip_environment().get("PIP_CERT"):
        subprocess.run(["cp", "-L", trusted, folder / CERTIFICATES], check=True)


def pip_environment() -> dict[str, str]:
    """How pip finds packages on this machine, as variables."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"^global\.([\w-]+)='(.*)'$", listed, re.MULTILINE)
    configured = {f"PIP_{name.upper().replace('-', '_')}": value.replace("\\n", " ") for name, value in found}
    return configured | {name: value for name, value in os.environ.items() if PASSED.match(name)}


def local_folders(environment: Mapping[str, str]) -> list[str]:
    """Folders and files of this machine that these variables name."""
    words = " ".join(environment.values()).replace("file://", " ").split()
    paths = {
        word if Path(word).is_file() else re.sub(r"/simple/?$", "", word)
        for word in words
        if word.startswith("/")
    }
    return sorted(path for path in paths if Path(path).exists() and not path.startswith("/etc/ssl"))


@contextmanager
def running_in(folder: Path, script: str, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """`script` as root in the chroot; at the end every process of it is gone."""
    environment = pip_environment()
    mounts = ["mount -t proc proc proc", "mount --rbind /dev dev"]
    for path in local_folders(environment):
        place = shlex.quote(path.lstrip("/"))
        make = "mkdir -p" if Path(path).is_dir() else "install -D /dev/null"
        mounts.append(f"{make} {place} && mount --bind {shlex.quote(path)} {place}")
    inside = ["env", "-i", "HOME=/root", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "NO_PROXY=127.0.0.1"]
    if "PIP_CERT" in environment:
        environment["PIP_CERT"] = f"/{CERTIFICATES}"
    inside += [f"{name}={value}" for name, value in environment.items()]
    commands = [f"cd {shlex.quote(str(folder))}", *mounts]
    commands.append(f"exec chroot . {shlex.join([*inside, 'bash', '-c', script])}")
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", " && ".join(commands)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
