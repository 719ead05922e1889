"""Trained models from their folders."""

from resnet_bk.adaptive.depth import AdaptiveDepth
from resnet_bk.checkpoint import CheckpointError
from resnet_bk.config import ConfigError
from resnet_bk.folders import model_folder
from resnet_bk.hf import ResNetBKForCausalLM, Tokenizer, load_tokenizer, on_device


def load(path: str, threshold: float | None = None) -> tuple[ResNetBKForCausalLM, Tokenizer]:
    """The model and its tokenizer. threshold: of its adaptive depth, instead of that it was trained with."""
    folder = model_folder(path)
    try:
        model = ResNetBKForCausalLM.from_pretrained(folder)
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # transformers and safetensors raise whatever they find
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder}: cannot be loaded as a ResNet-BK model ({reason})") from error
    if threshold is not None:
        layers = [module for module in model.modules() if isinstance(module, AdaptiveDepth)]
        if not layers:
            raise ConfigError(f"depth_threshold: got {threshold}, but {folder} has no adaptive depth; leave it out")
        for layer in layers:
            layer.threshold = threshold
    return on_device(model).eval(), load_tokenizer(str(folder))
