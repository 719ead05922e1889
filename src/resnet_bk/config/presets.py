"""Presets: models to start from, by name. Each is a YAML file in the folder ``presets`` of this package."""

from pathlib import Path
from typing import Any

from resnet_bk.config.checks import ConfigError, read_yaml, shown

PRESETS = ("plain", "quality", "balanced", "fast")  # from the most to the fewest FLOPs
_FOLDER = Path(__file__).resolve().parent.parent / "presets"


def preset_file(name: str) -> Path:
    """Return the file of a preset. Raise ConfigError if there is no preset of that name."""
    if name not in PRESETS:
        raise ConfigError(f"preset: got {shown(name)}, allowed {', '.join(map(repr, PRESETS))}")
    return _FOLDER / f"{name}.yaml"


def preset(name: str) -> dict[str, Any]:
    """Return the model fields of a preset, as :class:`resnet_bk.config.ModelConfig` takes them, not its batch size."""
    fields: dict[str, Any] = read_yaml("preset", preset_file(name))["model"]
    return fields
