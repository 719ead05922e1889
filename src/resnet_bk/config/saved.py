"""The ``config.json`` of a model folder: the fields of ModelConfig, under the names that transformers has for them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from resnet_bk.config.checks import ConfigError, shown
from resnet_bk.config.model import ModelConfig

LARGEST = 1 << 20  # bytes of a config.json
# Names of ModelConfig's fields there. Every generate() of transformers would take `top_k` for the setting of sampling.
NAMES = {f.name: f.name for f in dataclasses.fields(ModelConfig)} | {"top_k": "num_experts_per_tok"}


def read_json(path: Path) -> dict[str, Any]:
    """Return the fields in a config.json.

    Raises:
        ConfigError: it is too long, or not a mapping in JSON.
    """
    if (size := path.stat().st_size) > LARGEST:
        raise ConfigError(f"{path}: got {size} bytes, allowed at most {LARGEST}; give a model's config.json")
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{path}: expected JSON in UTF-8, got something else ({reason})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of fields to values, got {shown(values)}")
    return values


def saved_config(folder: Path) -> ModelConfig:
    """Return the settings of the model in a folder.

    Raises:
        ConfigError: its config.json cannot be read, or has settings that no model can have.
    """
    path = folder / "config.json"
    values = read_json(path)
    try:
        return ModelConfig.from_dict({name: values[there] for name, there in NAMES.items() if there in values})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
