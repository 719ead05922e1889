"""Models to start from, by name: a recipe's settings, packaged as the YAML files of :mod:`resnet_bk.presets`."""

from pathlib import Path
from typing import Any

from resnet_bk.config.checks import ConfigError, read_yaml, shown

PRESETS = ("plain", "quality", "balanced", "fast")  # from the dearest to the cheapest in operations
_FOLDER = Path(__file__).resolve().parent.parent / "presets"


def preset_file(name: str) -> Path:
    """The file of a preset; ConfigError where there is none of that name."""
    if name not in PRESETS:
        raise ConfigError(f"preset: got {shown(name)}, allowed {', '.join(map(repr, PRESETS))}")
    return _FOLDER / f"{name}.yaml"


def preset(name: str) -> dict[str, Any]:
    """Fields of the model of a preset, as :class:`resnet_bk.config.ModelConfig` takes them."""
    fields: dict[str, Any] = read_yaml("preset", preset_file(name))["model"]
    return fields
