"""ResNet-BK: language models that spend compute where the text is hard.

Importing this package is cheap: torch is imported when a name below is first used, and transformers is not imported.
"""

import importlib
from typing import TYPE_CHECKING, Any

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
    from resnet_bk.data.tokens import decode, encode
    from resnet_bk.layers.sparse import SparseBKCore
    from resnet_bk.model import ConfigurableResNetBK, LanguageModel, ModelOutput
    from resnet_bk.training.length_trainer import LearnedSequenceLengthTrainer
    from resnet_bk.wrapper import AdaptiveSequenceLengthWrapper

__version__ = "0.2.0"

_NAMES = {
    "resnet_bk.config": ("ConfigError", "ModelConfig"),
    "resnet_bk.data.tokens": ("decode", "encode"),
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
    "decode",
    "encode",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


# Register with transformers' Auto classes once those are imported. There are two hooks, because AutoConfig can be
# imported without the model classes, and while they are only half imported.
try:
    from wrapt import register_post_import_hook
except ImportError:  # then resnet_bk.hf registers them when it is imported
    pass
else:
    register_post_import_hook("resnet_bk.hf:register_config", "transformers.models.auto.configuration_auto")
    register_post_import_hook("resnet_bk.hf:register_model", "transformers.models.auto.modeling_auto")
