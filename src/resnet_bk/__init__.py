"""ResNet-BK: language models that spend compute where the text is hard.

Importing this package is cheap: torch is imported when a name below is first used, transformers never by us alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from resnet_bk.adaptive.length_predictor import SequenceLengthPredictor
    from resnet_bk.adaptive.multiscale import LearnedDownsampling, LearnedUpsampling
    from resnet_bk.adaptive.multiscale_blocks import (
        HierarchicalMultiScaleLayer,
        MultiScaleResNetBKBlock,
        MultiScaleResNetBKLayer,
        count_flops_multi_scale,
    )
    from resnet_bk.config import ConfigError, ModelConfig
    from resnet_bk.layers.sparse import SparseBKCore
    from resnet_bk.model import ConfigurableResNetBK, LanguageModel, ModelOutput
    from resnet_bk.training.length_trainer import LearnedSequenceLengthTrainer
    from resnet_bk.wrapper import AdaptiveSequenceLengthWrapper

__version__ = "0.1.0"

_NAMES = {
    "resnet_bk.config": ("ConfigError", "ModelConfig"),
    "resnet_bk.layers.sparse": ("SparseBKCore",),
    "resnet_bk.model": ("ConfigurableResNetBK", "LanguageModel", "ModelOutput"),
    "resnet_bk.wrapper": ("AdaptiveSequenceLengthWrapper",),
    "resnet_bk.training.length_trainer": ("LearnedSequenceLengthTrainer",),
    "resnet_bk.adaptive.length_predictor": ("SequenceLengthPredictor",),
    "resnet_bk.adaptive.multiscale": ("LearnedDownsampling", "LearnedUpsampling"),
    "resnet_bk.adaptive.multiscale_blocks": (
        "HierarchicalMultiScaleLayer",
        "MultiScaleResNetBKBlock",
        "MultiScaleResNetBKLayer",
        "count_flops_multi_scale",
    ),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [
    "AdaptiveSequenceLengthWrapper",
    "ConfigError",
    "ConfigurableResNetBK",
    "HierarchicalMultiScaleLayer",
    "LanguageModel",
    "LearnedDownsampling",
    "LearnedSequenceLengthTrainer",
    "LearnedUpsampling",
    "ModelConfig",
    "ModelOutput",
    "MultiScaleResNetBKBlock",
    "MultiScaleResNetBKLayer",
    "SequenceLengthPredictor",
    "SparseBKCore",
    "__version__",
    "count_flops_multi_scale",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def _register_config(auto: Any) -> None:
    from resnet_bk.hf.configuration import ResNetBKConfig

    auto.AutoConfig.register(ResNetBKConfig.model_type, ResNetBKConfig, exist_ok=True)


def _register_model(auto: Any) -> None:
    from resnet_bk.hf.configuration import ResNetBKConfig
    from resnet_bk.hf.modeling import ResNetBKForCausalLM

    auto.AutoModelForCausalLM.register(ResNetBKConfig, ResNetBKForCausalLM, exist_ok=True)


# Two hooks, because AutoConfig can be imported without the model classes, and while they are only half imported.
register_post_import_hook(_register_config, "transformers.models.auto.configuration_auto")
register_post_import_hook(_register_model, "transformers.models.auto.modeling_auto")
