"""Every setting, typed. A field's docstring is its help text on the command line. Imports nothing heavy."""

from resnet_bk.config.checks import (
    ConfigError,
    all_fields,
    check_boolean,
    check_choice,
    check_fields,
    check_integer,
    check_range,
    check_text,
    in_words,
    is_section,
    number_kind,
    shown,
    unknown_field,
)
from resnet_bk.config.commands import DataConfig, EvalConfig, GenerateConfig, InspectConfig, TrainConfig, TuneConfig
from resnet_bk.config.model import (
    BYTE_OFFSET,
    BYTE_VOCABULARY,
    END_OF_DOCUMENT,
    ModelConfig,
)
from resnet_bk.config.rooms import DepthConfig, ExpertsConfig, LengthConfig, MultiScaleConfig, SparsityConfig

__all__ = [
    "BYTE_OFFSET",
    "BYTE_VOCABULARY",
    "END_OF_DOCUMENT",
    "ConfigError",
    "DataConfig",
    "DepthConfig",
    "EvalConfig",
    "ExpertsConfig",
    "GenerateConfig",
    "InspectConfig",
    "LengthConfig",
    "ModelConfig",
    "MultiScaleConfig",
    "SparsityConfig",
    "TrainConfig",
    "TuneConfig",
    "all_fields",
    "check_boolean",
    "check_choice",
    "check_fields",
    "check_integer",
    "check_range",
    "check_text",
    "in_words",
    "is_section",
    "number_kind",
    "shown",
    "unknown_field",
]
