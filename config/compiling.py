"""Make machine code of the hot modules: `python -m config.compiling`, which does nothing while what was made is fresh."""

import os
import shutil
import sys
import sysconfig
from contextlib import chdir, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

from config.compiled import FOLDER, MODULES, ROOT, STAMP, digest, is_fresh, path_of

PACKAGES = ("billing", "config", "gateway", "nodes")

_JOINED = f"-flto={os.cpu_count() or 1}"
GCC_FLAGS = {
    "extra_compile_args": [_JOINED, "-fno-semantic-interposition", "-fno-plt"],
    "extra_link_args": [_JOINED, "-Wl,-Bsymbolic"],
}
"""Calls from module to module are direct, or the called is put in place: a thirtieth fewer instructions a turn."""

LENIENT = ("--config-file=", "--ignore-missing-imports")
"""What mypy is told before the files: `make lint` is strict, and here libraries may be without their types."""


def main() -> int:
    """Make it. What stands in the way is said and is no failure, because all works without."""
    if is_fresh():
        return 0
    if (missing := lacking()) is not None:
        print(
            f"poolgate will run interpreted, at nearly twice the CPU a turn: to compile it, {missing} is missing.\n"
            "On Debian and Ubuntu: apt-get install gcc python3-dev; then run the same command again.",
            file=sys.stderr,
        )
        return 0
    print(f"compiling the {len(MODULES)} modules that every turn passes through (about a minute)", flush=True)
    said = StringIO()  # mypyc's advice is of use only where it fails
    try:
        with redirect_stdout(said), redirect_stderr(said):
            _make(FOLDER)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - another version of mypy, a disk that is full
        print(
            f"{said.getvalue()}poolgate will run interpreted: it could not be compiled: {error}",
            file=sys.stderr,
        )
    return 0


def lacking() -> str | None:
    """What is needed and not here."""
    compiler = _compiler()
    if shutil.which(compiler) is None:
        return f"a C compiler ({compiler})"
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    if not headers.exists():
        return f"{headers} of Python's headers"
    if not os.access(FOLDER.parent, os.W_OK):
        return f"the right to write to {FOLDER.parent}"
    return "mypy (pip install 'poolgate[compile]')" if find_spec("mypyc") is None else None


def _compiler() -> str:
    """What the build calls."""
    told: str = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    return told.split()[0]


def _make(folder: Path) -> None:
    """All of it or nothing: it is made beside `folder` and then takes its place."""
    from mypyc.build import mypycify
    from setuptools import Distribution

    making = folder.with_name(f"{folder.name}.{os.getpid()}")
    # A copy: where the packages are installed, mypy would take their neighbours for modules of ours.
    sources, scaffolding = making / "sources", making / "scaffolding"
    try:
        for package in PACKAGES:
            shutil.copytree(ROOT / package, sources / package, ignore=shutil.ignore_patterns("__pycache__"))
        with chdir(sources):
            library = mypycify(
                [*LENIENT, *(path_of(name, ".py") for name in MODULES)], group_name="poolgate", opt_level="2",
                debug_level="0", multi_file=True, target_dir=str(scaffolding / "c"),
            )  # fmt: skip
            if "gcc" in _compiler():
                for extension in library:
                    for name, flags in GCC_FLAGS.items():
                        getattr(extension, name).extend(flags)
            command = Distribution({"name": "poolgate", "ext_modules": library}).get_command_obj("build_ext")
            command.build_lib, command.build_temp = str(making), str(scaffolding / "o")
            command.ensure_finalized()
            command.run()
        (making / STAMP).write_text(digest(sources))
        shutil.rmtree(sources)
        shutil.rmtree(scaffolding)
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
