"""Modules made anew of their sources where machine code of them is used, for tests that watch them from inside."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from config.compiled import MODULES, CompiledFinder, is_used
from config.compiling import PACKAGES


@contextmanager
def interpreted() -> Iterator[None]:
    """What is imported inside is interpreted, so that its classes can be subclassed, and nobody else gets it."""
    if not is_used():
        yield
        return
    for package in PACKAGES:  # each asks for machine code when it is first imported
        import_module(package)
    known = _ours()
    for name in MODULES:
        sys.modules.pop(name, None)
    sys.meta_path.remove(CompiledFinder)  # type: ignore[arg-type]
    try:
        yield
    finally:
        sys.meta_path.insert(0, CompiledFinder)  # type: ignore[arg-type]
        for name in _ours():
            del sys.modules[name]
        sys.modules.update(known)
        for name, module in known.items():
            package, _, last = name.rpartition(".")
            if package:
                setattr(sys.modules[package], last, module)


def _ours() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in PACKAGES}
