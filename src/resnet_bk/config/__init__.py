"""Every setting, typed. A field's docstring is its help text on the command line. Imports nothing heavy."""

from resnet_bk.config.checks import (
    ConfigError,
    check_boolean,
    check_choice,
    check_fields,
    check_integer,
    check_range,
    check_text,
    shown,
    unknown_field,
)
from resnet_bk.config.commands import DataConfig, EvalConfig, GenerateConfig, TrainConfig
from resnet_bk.config.model import (
    BYTE_OFFSET,
    BYTE_VOCABULARY,
    END_OF_DOCUMENT,
    LengthConfig,
    ModelConfig,
    MultiScaleConfig,
)

__all__ = [
    "BYTE_OFFSET",
    "BYTE_VOCABULARY",
    "END_OF_DOCUMENT",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "GenerateConfig",
    "LengthConfig",
    "ModelConfig",
    "MultiScaleConfig",
    "TrainConfig",
    "check_boolean",
    "check_choice",
    "check_fields",
    "check_integer",
    "check_range",
    "check_text",
    "shown",
    "unknown_field",
]
