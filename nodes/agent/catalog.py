"""What is on this host's disk: models that an engine can serve, and LoRA adapters. Only reads.

Models are the folders that the agent was given, and those in `models` of its data folder, where downloads go.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nodes.agent.command import BadModel, ModelSpec, read_model
from nodes.protocol import CACHED_MODELS_MAX

ADAPTER_FILE = "adapter_config.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter's folder; `base` is the model that it was trained for, as its file tells."""

    name: str
    folder: Path
    base: str = ""


@dataclass(frozen=True, slots=True)
class Catalog:
    """`given` are model folders from the command line, `folder` is the data folder."""

    folder: Path
    given: tuple[ModelSpec, ...] = field(default=())

    @property
    def models_folder(self) -> Path:
        return self.folder / "models"

    def models(self) -> tuple[ModelSpec, ...]:
        """Every model that is whole. The first of a name counts."""
        found: dict[str, ModelSpec] = {model.name: model for model in self.given}
        for path in sorted(self.models_folder.glob("*/config.json")):
            try:
                model = read_model(path.parent)
            except BadModel:
                continue  # its owner sees why when he asks for it by --model
            found.setdefault(model.name, model)
        return tuple(found.values())[:CACHED_MODELS_MAX]

    def model(self, name: str) -> ModelSpec | None:
        return next((model for model in self.models() if model.name == name), None)

    def adapters(self) -> tuple[Adapter, ...]:
        """Those in `adapters` of the data folder."""
        found = []
        for path in sorted((self.folder / "adapters").glob(f"*/{ADAPTER_FILE}")):
            try:
                base = json.loads(path.read_text()).get("base_model_name_or_path", "")
            except (OSError, ValueError, AttributeError):
                continue
            found.append(Adapter(path.parent.name, path.parent, base if isinstance(base, str) else ""))
        return tuple(found)

    def adapter(self, name: str) -> Adapter | None:
        return next((adapter for adapter in self.adapters() if adapter.name == name), None)

    def place_for(self, name: str) -> Path:
        """Where a download of that model goes; `org/model` becomes a folder without a slash."""
        return self.models_folder / slug(name)


def weights_bytes(folder: Path) -> int:
    """Size of a model's weights: safetensors if there are any, since folders may hold them twice."""
    for pattern in WEIGHTS:
        size = sum(path.stat().st_size for path in folder.glob(pattern))
        if size:
            return size
    return 0


def slug(name: str) -> str:
    """A name as part of a path or of an engine's id."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:100] or "engine"


def unique(names: Sequence[str]) -> list[str]:
    """A second `llama` becomes `llama-2`."""
    chosen: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in chosen:
            number += 1
            candidate = f"{name}-{number}"
        chosen.append(candidate)
    return chosen
